"""Cancelling in each state: it ends cancelled, or completed where nothing could be undone, and all is usable."""

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.control.descriptors import Handed, fdset_option, mount_inheriting
from tests.control.faults import delayed, wait_inside
from tests.control.footprint import footprint
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import DEADLINE, Mounted

MiB = 1 << 20
LENGTH = 8 * MiB
DATA = os.urandom(LENGTH)
SLOW = "max_bandwidth=128k"


def written(mounted: Mounted) -> Mounted:
    """The mount, with random bytes in all of its RAM."""
    with (mounted.ram / "pc.ram").open("r+b") as file:
        file.write(DATA)
    return mounted


def is_in(state: str) -> Callable[[dict[str, dict[str, str]]], bool]:
    return lambda status: status["migration"].get("status") == state


def assert_usable(mounted: Mounted, path: Path) -> None:
    """See that RAM can be written and read, and saved."""
    with (mounted.ram / "pc.ram").open("r+b") as file:
        file.write(b"written")
    expected = b"written" + DATA[7:]
    assert (mounted.ram / "pc.ram").read_bytes() == expected
    mounted.ctl("migrate_set_parameter max-bandwidth 0")
    mounted.ctl(f"save {path}")
    assert decode(path).blocks["pc.ram"].tobytes() == expected


def test_an_active_save(mount: Mount, tmp_path: Path) -> None:
    directory = tmp_path / "storage"
    directory.mkdir()
    path = directory / "checkpoint"
    mounted = written(mount(path, f"ram=pc.ram:{LENGTH}"))
    mounted.ctl("save")
    former = path.read_bytes()
    before = footprint(mounted.pid)
    mounted.ctl("migrate_set_parameter max-bandwidth 128k")
    with ThreadPoolExecutor() as threads:
        save = threads.submit(mounted.ctl, "save")
        mounted.wait_for(is_in("active"))
        assert len(os.listdir(directory)) == 2
        assert mounted.ctl("migrate_cancel") == "ok save cancelled"
        with pytest.raises(OSError, match="error: the save was cancelled") as caught:
            save.result(DEADLINE)
    assert caught.value.errno == errno.ECANCELED
    assert mounted.status()["migration"]["status"] == "cancelled"
    assert "Migration status: cancelled" in mounted.ctl("info migrate")
    assert os.listdir(directory) == [path.name]
    assert path.read_bytes() == former
    assert footprint(mounted.pid) == before
    assert_usable(mounted, path)


@pytest.mark.parametrize(
    ("call", "state", "end"),
    [("flock", "setup", "cancelled"), ("fdatasync", "device", "cancelled"), ("renameat2", "device", "completed")],
)
def test_a_save_in_a_step_that_takes_long(call: str, state: str, end: str, mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    mounted = written(mount(path, f"ram=pc.ram:{LENGTH}"))
    with delayed(mounted.pid, tmp_path / "strace", call), ThreadPoolExecutor() as threads:
        save = threads.submit(mounted.ctl, "save")
        wait_inside(mounted.pid, call)
        assert mounted.status()["migration"]["status"] == state
        assert mounted.ctl("cancel") == f"ok save {end}"
        if end == "cancelled":
            with pytest.raises(OSError, match="the save was cancelled"):
                save.result(DEADLINE)
        else:
            assert save.result(DEADLINE).startswith("ok saved ")
    assert mounted.status()["migration"]["status"] == end
    assert path.exists() == (end == "completed")
    assert not list(tmp_path.glob(".*"))
    assert_usable(mounted, path)


def test_a_save_to_a_descriptor(mount: Mount, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    file = Handed(target, os.O_WRONLY)
    options = (f"ram=pc.ram:{LENGTH}", fdset_option(file), SLOW)
    mounted = written(mount(tmp_path / "checkpoint", *options, program=mount_inheriting(file)))
    before = footprint(mounted.pid)
    mounted.ctl("migrate -d file:/dev/fdset/1")
    mounted.wait_for(is_in("active"))
    assert mounted.ctl("cancel") == "ok save cancelled"
    assert footprint(mounted.pid) == before
    assert target.read_bytes() == b""
    assert_usable(mounted, tmp_path / "checkpoint")


def test_a_restore(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    source = written(mount(path, f"ram=pc.ram:{LENGTH}"))
    source.ctl("save")
    source.umount()
    mounted = mount(path)
    with delayed(mounted.pid, tmp_path / "strace", "preadv2"), ThreadPoolExecutor() as threads:
        restore = threads.submit(mounted.ctl, "restore")
        mounted.wait_for(is_in("active"))
        assert mounted.ctl("cancel") == "ok restore cancelled"
        with pytest.raises(OSError, match="error: the restore was cancelled") as caught:
            restore.result(DEADLINE)
    assert caught.value.errno == errno.ECANCELED
    assert mounted.status()["restored"] is False
    assert_usable(mounted, path)
    mounted.ctl("restore")
    assert mounted.status()["restored"] is True


@pytest.mark.parametrize("command", ["cancel", "migrate_cancel"])
def test_nothing_to_cancel(command: str, standing: Mounted) -> None:
    with pytest.raises(OSError, match="nothing is running, so there is nothing to cancel") as caught:
        standing.ctl(command)
    assert caught.value.errno == errno.EINVAL


def test_what_is_refused_while_a_save_runs(mount: Mount, tmp_path: Path) -> None:
    mounted = written(mount(tmp_path / "checkpoint", f"ram=pc.ram:{LENGTH}", SLOW))
    mounted.ctl("save nowait")
    mounted.wait_for(is_in("active"))
    for command in (
        "save",
        "save nowait",
        f"migrate file:{tmp_path}/other",
        f"migrate -d file:{tmp_path}/other",
        "reset",
        "qmp none",
        "migrate_set_capability multifd off",
        "migrate_set_capability events off",
        "migrate_set_parameter direct-io off",
        "migrate_set_parameter zero-page-detection none",
    ):
        with pytest.raises(OSError, match="error: ") as caught:
            mounted.ctl(command)
        assert caught.value.errno == errno.EBUSY, command
    with pytest.raises(OSError, match="busy"):
        (mounted.ram / "another").touch()
    mounted.expect_log(r"truncate was refused to process \d+: pc\.ram: has \d+ bytes")
    with pytest.raises(PermissionError):
        os.truncate(mounted.ram / "pc.ram", 2 * LENGTH)
    for name in ("parameters/direct-io", "capabilities/multifd"):
        with pytest.raises(OSError, match="busy") as caught:
            (mounted.path / name).write_text("off\n")
        assert caught.value.errno == errno.EBUSY
    mounted.ctl("migrate_set_parameter multifd-channels 7")
    (mounted.path / "parameters/max-bandwidth").write_text("128k\n")
    mounted.ctl("cancel")
    assert mounted.status()["migration"]["status"] == "cancelled"
    assert (mounted.path / "parameters/multifd-channels").read_text() == "7\n"
    assert (mounted.path / "parameters/direct-io").read_text() == "on\n"
    assert os.listdir(mounted.ram) == ["pc.ram"]
