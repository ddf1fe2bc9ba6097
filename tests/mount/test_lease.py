"""-o exclusive of a file: one mount has it, and what becomes of the others."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptfs.namespace.lease import Holder
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.harness import BIN, DEADLINE, is_mounted, run_mount

SHORT_TERM = str(Path(__file__).parents[1] / "doubles/lease_term.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "vm1"
    MigrationFile(blocks=[Block("pc.ram", 256, {0: b"A" * 4096})]).write(path)
    return path


def test_umount_gives_it_back_and_kill_does_when_its_term_is_over(path: Path, mount: Mount, tmp_path: Path) -> None:
    how = {"program": (sys.executable, SHORT_TERM, "2")}
    lock = tmp_path / "vm1.lock"
    first = mount(path, "exclusive", **how)
    assert first.status()["lease"] == "held"
    assert first.ctl("save").startswith("ok ")
    first.umount()
    assert not lock.exists()
    second = mount(path, "exclusive", **how)
    second.kill()
    assert lock.exists()
    (tmp_path / "third").mkdir()
    third = run_mount(path, tmp_path / "third", "exclusive", flags=("-f",))
    assert third.returncode == 0, third
    assert f"{lock}: is held by process {second.pid} on host" in third.stderr
    assert "looking for up to 2 s whether it is alive" in third.stderr
    assert not lock.exists()


def test_stolen_it_stops_saving_and_not_reading(path: Path, mount: Mount, tmp_path: Path) -> None:
    first = mount(path, "exclusive", program=(sys.executable, SHORT_TERM, "6"))
    second = mount(path)
    assert second.status()["lease"] is None
    second.expect_log(f"WARNING: .*vm1.lock: taken from process {first.pid}")
    first.expect_log(f"ERROR: .*vm1.lock: the lease is lost: process {second.pid} on host .* has taken it")
    assert f"taken from process {first.pid} on host" in second.ctl("lock steal")
    assert second.status()["lease"] == "held"
    words = first.wait_for(lambda status: status["lease"] != "held")["lease"]
    assert words.startswith(f"lost: process {second.pid} on host")
    for command in ("save", "save force", f"save {path}"):
        with pytest.raises(OSError, match=r"has lost its lease .*save elsewhere .*`lock steal`") as refused:
            first.ctl(command)
        assert refused.value.errno == errno.EBUSY
    assert (first.ram / "pc.ram").read_bytes()[:4096] == b"A" * 4096
    assert first.ctl(f"save {tmp_path}/elsewhere").startswith("ok ")
    assert second.ctl("save").startswith("ok ")
    with pytest.raises(OSError, match="usage: lock steal"):
        second.ctl("lock")


def test_who_has_the_file_mounted_over_its_directory_renews_it_below(mount: Mount, tmp_path: Path) -> None:
    """The path of the lock leads to the mount itself then."""
    directory = tmp_path / "storage"
    directory.mkdir()
    MigrationFile(blocks=[Block("pc.ram", 256)]).write(directory / "vm1")
    mounted = mount(directory / "vm1", "exclusive", path=directory, program=(sys.executable, SHORT_TERM, "6"))
    (below,) = (fd for fd in Path(f"/proc/{mounted.pid}/fd").iterdir() if os.readlink(fd) == str(directory))
    first = (below / "vm1.lock").read_bytes()
    while (below / "vm1.lock").read_bytes() == first:
        pass
    with pytest.raises(OSError, match="lies on this mount"):
        mounted.ctl("save")
    assert mounted.status()["lease"] == "held"
    mounted.umount()
    assert [path.name for path in directory.iterdir()] == ["vm1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_gives_up_waiting_gets_no_mount_later(path: Path, tmp_path: Path, number: signal.Signals) -> None:
    text = Holder("a", 7, "", "yesterday", "abc").text()
    (tmp_path / "vm1.lock").write_bytes(text)
    (tmp_path / "mnt").mkdir()
    arguments = [BIN / "mount.ckptfs", path, tmp_path / "mnt", "-o", "exclusive"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE) as mounting:
        assert mounting.stderr is not None
        assert b"looking for up to 30 s" in mounting.stderr.readline()
        mounting.send_signal(number)
        assert mounting.stderr.read() == b""  # also the daemon's, which has ended
        assert mounting.wait(DEADLINE) == 8
    assert not is_mounted(tmp_path / "mnt")
    assert (tmp_path / "vm1.lock").read_bytes() == text


def test_what_has_no_place_beside_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    result = run_mount("none", tmp_path / "mnt", "exclusive")
    assert (result.returncode, result.stderr.count("\n")) == (32, 1)
    assert "lies beside a file or an object" in result.stderr
