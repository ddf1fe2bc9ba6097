from tests.mount.conftest import _adopt_orphans, mount, public

__all__ = ["_adopt_orphans", "mount", "public"]
