"""A save to the mounted name replaces the file that the mount knows, and no other."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import Mounted

ANOTHER = r"is not the file that this mount came from or last wrote.*save elsewhere.*`save force`"
APPEARED = r"was made by somebody else since this guest was mounted.*save elsewhere.*`save force`"
VANISHED = r"is gone.*save elsewhere.*`save force`"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "storage/vm.ckpt"
    path.parent.mkdir()
    MigrationFile(blocks=[Block("pc.ram", 256)]).write(path)
    return path


def patch(mounted: Mounted, page: int, data: bytes) -> None:
    with (mounted.ram / "pc.ram").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, page * 4096)


def saved(path: Path, page: int) -> bytes:
    return decode(path).blocks["pc.ram"][page * 4096 :][:4].tobytes()


def assert_refused(mounted: Mounted, words: str, command: str = "save") -> None:
    with pytest.raises(OSError, match=words) as caught:
        mounted.ctl(command)
    assert caught.value.errno == errno.ESTALE


def test_one_checkpoint_that_is_mounted_twice(path: Path, mount: Mount, tmp_path: Path) -> None:
    first, second = mount(path), mount(path)
    patch(first, 0, b"AAAA")
    patch(second, 1, b"BBBB")
    first.ctl("save")
    assert_refused(second, ANOTHER)
    assert_refused(second, ANOTHER, f"save {path.parent}/../storage/vm.ckpt")
    assert_refused(second, ANOTHER, f"migrate file:{path}")
    assert (saved(path, 0), saved(path, 1)) == (b"AAAA", b"\0\0\0\0")
    assert os.listdir(path.parent) == ["vm.ckpt"]
    first.ctl("save")  # its own may be replaced, as often as it likes
    first.ctl("save")
    second.ctl(f"save {tmp_path}/other")
    assert (saved(tmp_path / "other", 0), saved(tmp_path / "other", 1)) == (b"\0\0\0\0", b"BBBB")
    assert_refused(second, ANOTHER)
    second.ctl("save force")
    assert (saved(path, 0), saved(path, 1)) == (b"\0\0\0\0", b"BBBB")
    second.ctl("save")
    assert_refused(first, ANOTHER)


def test_a_save_in_the_background(path: Path, mount: Mount) -> None:
    first, second = mount(path), mount(path)
    first.ctl("save")
    second.expect_log(ANOTHER)
    second.ctl("save nowait")
    status = second.wait_for(lambda status: status["migration"].get("status") == "failed")
    assert "is not the file that this mount came from" in status["migration"]["error-desc"]


@pytest.mark.parametrize("restored", [False, True], ids=["lazy", "restored"])
def test_a_file_that_was_changed_in_place(restored: bool, path: Path, mount: Mount) -> None:
    mounted = mount(path)
    if restored:
        mounted.ctl("restore")
    inode = path.stat().st_ino
    with path.open("r+b") as file:  # as `cp` and QEMU's migrate do
        file.write(path.read_bytes())
    assert path.stat().st_ino == inode
    assert_refused(mounted, ANOTHER)


def test_what_changes_no_content(path: Path, mount: Mount) -> None:
    mounted = mount(path)
    path.chmod(0o640)
    os.chown(path, 1000, 1000)
    path.read_bytes()
    os.link(path, path.parent / "link")
    (path.parent / "link").unlink()
    path.rename(path.parent / "elsewhere")
    (path.parent / "elsewhere").rename(path)
    mounted.ctl("save")


def test_a_name_that_is_gone(path: Path, mount: Mount) -> None:
    mounted = mount(path)
    path.rename(path.parent / "rotated")
    assert_refused(mounted, VANISHED)
    assert os.listdir(path.parent) == ["rotated"]
    mounted.ctl("save force")
    mounted.ctl("save")
    assert sorted(os.listdir(path.parent)) == ["rotated", "vm.ckpt"]


def test_a_name_that_has_appeared(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "vm.ckpt"
    first, second = mount(path, "ram=pc.ram:1M"), mount(path, "ram=pc.ram:1M")
    patch(first, 0, b"AAAA")
    first.ctl("save")
    assert_refused(second, APPEARED)
    assert saved(path, 0) == b"AAAA"
    second.ctl("save force")
    assert saved(path, 0) == b"\0\0\0\0"


def test_an_empty_file_is_nothing_that_could_be_lost(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "vm.ckpt", "ram=pc.ram:1M")
    (tmp_path / "vm.ckpt").touch()
    mounted.ctl("save")


def test_another_place_keeps_its_rules(path: Path, mount: Mount, tmp_path: Path) -> None:
    first, second = mount(path), mount(path)
    other = tmp_path / "other"
    for mounted in (first, second, first, second):
        mounted.ctl(f"save {other}")
    other.rename(tmp_path / "rotated")
    first.ctl(f"save {other}")
    second.ctl("save")  # nobody else has saved there
    assert_refused(first, ANOTHER)


@pytest.mark.parametrize("exists", [False, True], ids=["a new name", "a checkpoint"])
def test_of_two_that_save_at_once_one_is_refused(exists: bool, mount: Mount, tmp_path: Path) -> None:
    for attempt in range(5):
        path = tmp_path / f"vm{attempt}.ckpt"
        if exists:
            MigrationFile(blocks=[Block("pc.ram", 256)]).write(path)
        options = () if exists else ("ram=pc.ram:1M",)
        mounts = [mount(path, *options), mount(path, *options)]
        for number, mounted in enumerate(mounts):
            patch(mounted, 0, bytes([65 + number]) * 4)
        with ThreadPoolExecutor() as threads:
            errors = [threads.submit(mounted.ctl, "save") for mounted in mounts]
        failures = [future.exception() for future in errors]
        (winner,) = [number for number, failure in enumerate(failures) if failure is None]
        (failure,) = [failure for failure in failures if failure is not None]
        assert isinstance(failure, OSError)
        assert failure.errno in (errno.ESTALE, errno.EBUSY), failure
        assert saved(path, 0) == bytes([65 + winner]) * 4
        for mounted in mounts:
            mounted.umount()
