"""Real mounts, as in tests/mount, and what the daemon of one has open and mapped."""

from collections.abc import Iterator

import pytest

from tests.mount.conftest import _adopt_orphans, mount, mount_point, public
from tests.mount.harness import Mounted

__all__ = ["_adopt_orphans", "mount", "mount_point", "public", "standing"]


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A new guest of 1 MiB for all tests of a module, none of which changes anything that the others look at."""
    directory = tmp_path_factory.mktemp("standing")
    mounted = Mounted(directory / "checkpoint", directory / "mnt", directory / "log", "ram=pc.ram:1M")
    yield mounted
    mounted.clean_up()
