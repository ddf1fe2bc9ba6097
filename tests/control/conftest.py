"""Real mounts, as in tests/mount, and what the daemon of one has open and mapped."""

from tests.mount.conftest import _adopt_orphans, mount, mount_point, public, standing

__all__ = ["_adopt_orphans", "mount", "mount_point", "public", "standing"]
