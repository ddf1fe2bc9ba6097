"""Real mounts, as in tests/mount, and what the daemon of one has open and mapped."""

from tests.mount.conftest import _adopt_orphans, mount

__all__ = ["_adopt_orphans", "mount"]
