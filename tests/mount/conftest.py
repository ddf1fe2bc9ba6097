"""Real mounts: `mount(SPEC, OPTION...)` gives one that is gone when the test ends."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.mount.harness import MODULE_DEADLINE, Mounted, adopt_orphans, is_mounted, unmount_by_force

Mount = Callable[..., Mounted]


@pytest.fixture(autouse=True, scope="session")
def _adopt_orphans() -> None:
    adopt_orphans()


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    """A directory for a test that mounts by itself; it may leave nothing mounted there."""
    directory = tmp_path / "mount_point"
    directory.mkdir()
    yield directory
    left = is_mounted(directory)
    unmount_by_force(directory)
    assert not left


@pytest.fixture
def mount(tmp_path: Path, public: Path) -> Iterator[Mount]:
    """`mount(SPEC, OPTION...)`: a new `Mounted` on a directory of its own; gone before tmp_path and public are."""
    with ExitStack() as stack:
        count = 0

        def new_mount(spec: str | Path, *options: str, **how: Any) -> Mounted:
            nonlocal count
            count += 1
            path = how.pop("path", tmp_path / f"mnt{count}")
            log = how.pop("log", tmp_path / f"log{count}")
            mounted = Mounted(spec, path, log, *options, **how)
            stack.callback(mounted.clean_up)
            return mounted

        yield new_mount


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may pass through, as pytest's own are not."""
    with TemporaryDirectory(prefix="public-") as directory:
        path = Path(directory)
        path.chmod(0o755)
        yield path


@pytest.fixture
def fresh(mount: Mount, tmp_path: Path) -> Mounted:
    """A new guest of 16 MiB, to be saved to `tmp_path / "checkpoint"`."""
    return mount(tmp_path / "checkpoint", "ram=pc.ram:16M")


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A new guest of 1 MiB for all tests of a module, none of which changes anything that the others look at."""
    directory = tmp_path_factory.mktemp("standing")
    spec, path, log = directory / "checkpoint", directory / "mnt", directory / "log"
    mounted = Mounted(spec, path, log, "ram=pc.ram:1M", deadline=MODULE_DEADLINE)
    yield mounted
    mounted.clean_up()
