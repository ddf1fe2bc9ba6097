"""What the log of a mount tells, and where it is."""

import os
import re
import signal
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.mount.conftest import Mount
from tests.mount.harness import BIN, DEADLINE, Mounted, in_a_mount_namespace, unmount_by_force

MiB = 1 << 20


def wait_for_line(path: Path, pattern: str) -> None:
    """Follow a log until a line of it matches."""
    follower = subprocess.Popen(["tail", "--retry", "-n", "+1", "-F", path], stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    try:
        assert any(re.search(pattern, line) for line in follower.stdout)
    finally:
        follower.kill()
        follower.communicate()


# --- what it tells ----------------------------------------------------------------------------------------


def test_each_command_with_who_and_what_came_of_it(fresh: Mounted, tmp_path: Path) -> None:
    fresh.ctl("save")
    fresh.ctl("reset")
    fresh.ctl("help")
    fresh.ctl("save nowait")
    fresh.wait_for(lambda status: status["state"] == "idle")
    for command in ("nonsense\x1b", "cancel"):
        with pytest.raises(OSError, match="error: "):
            fresh.ctl(command)
    (fresh.path / "parameters/max-bandwidth").write_text("100M\n")
    with pytest.raises(OSError, match="Invalid argument"):
        (fresh.path / "capabilities/multifd").write_text("perhaps\n")
    log = fresh.log.read_text()
    who = rf"\(uid {os.getuid()}, pid {os.getpid()}\)"
    for line in (
        rf"INFO: ctl: save {who}: ok saved {tmp_path}/checkpoint: \d+ pages",
        rf"INFO: ctl: reset {who}: ok 0 written pages dropped",
        rf"INFO: ctl: help {who}: save .* \.\.\.$",
        rf"INFO: ctl: save nowait {who}: ok saving to {tmp_path}/checkpoint in the background",
        rf"INFO: saved {tmp_path}/checkpoint: ",
        rf"INFO: ctl: nonsense\\x1b {who}: error: unknown command",
        rf"INFO: ctl: cancel {who}: error: nothing is running",
        rf"INFO: parameters/max-bandwidth: 100M {who}: ok$",
        rf"INFO: capabilities/multifd: perhaps {who}: error: Expected 'on' or 'off'$",
    ):
        assert re.search(line, log, re.MULTILINE), line


def test_a_save_in_the_background_is_told_though_the_mount_has_gone(fresh: Mounted, tmp_path: Path) -> None:
    fresh.fill(1)
    fresh.ctl("migrate_set_parameter max-bandwidth 16")  # a second
    holder = os.open(fresh.ram / "pc.ram", os.O_RDONLY)  # so that there is something to look at after the save
    fresh.ctl("save nowait")
    fresh.wait_for(lambda status: status["migration"].get("status") == "active")
    subprocess.run(["umount", "--force", fresh.path], check=False, timeout=DEADLINE, capture_output=True)
    assert fresh.wait() == 0
    with pytest.raises(OSError, match="not connected"):
        os.close(holder)
    assert re.search(rf"INFO: saved {tmp_path}/checkpoint: 4096 pages", fresh.log.read_text())


def test_status_tells_of_the_last_save(fresh: Mounted, tmp_path: Path) -> None:
    assert (fresh.status()["last-save"], fresh.status()["last-save-to"]) == (None, None)
    before = datetime.now(UTC).replace(microsecond=0)
    fresh.ctl(f"save {tmp_path}/other")
    with pytest.raises(OSError, match="No such file"):
        fresh.ctl(f"save {tmp_path}/missing/other")
    fresh.ctl("restore")
    status = fresh.status()
    assert before <= datetime.fromisoformat(status["last-save"]) <= datetime.now(UTC)
    assert status["last-save-to"] == f"{tmp_path}/other"
    assert status["log"] == str(fresh.log)


@pytest.mark.parametrize(
    "end", [Mounted.umount, lambda mounted: mounted.signal(signal.SIGTERM)], ids=["umount", "SIGTERM"]
)
@pytest.mark.parametrize(
    ("length", "text"),
    [
        (5 * MiB + 4096, r"1281 written pages \(5\.004 MiB\) "),
        (1, r"1 written page \(0\.003906 MiB\) "),
        (0, ""),
    ],
)
def test_what_was_not_saved(length: int, text: str, end: Callable[[Mounted], None], fresh: Mounted) -> None:
    with (fresh.ram / "pc.ram").open("r+b") as file:
        file.write(b"x" * 4096)
        file.flush()
        fresh.ctl("save")
        os.pwrite(file.fileno(), b"y" * length, 0)
    end(fresh)
    if end is not Mounted.umount:
        assert fresh.wait() == 0
    lines = [line for line in fresh.log.read_text().splitlines() if "unmounted" in line]
    assert len(lines) == 1
    assert re.search(rf"WARNING: {fresh.path}: unmounted, {text}" if text else "INFO: .*: unmounted$", lines[0])


# --- where it is ------------------------------------------------------------------------------------------


def test_after_sighup_it_goes_on_in_the_file_that_has_its_name(fresh: Mounted, tmp_path: Path) -> None:
    with (fresh.ram / "pc.ram").open("r+b") as file:
        file.write(b"precious")
    rotated = tmp_path / "rotated"
    fresh.log.rename(rotated)
    fresh.ctl("stop")
    assert "ctl: stop" in rotated.read_text()
    fresh.signal(signal.SIGHUP)
    wait_for_line(fresh.log, "SIGHUP: the log goes on here")
    fresh.ctl("cont")
    assert "ctl: cont" in fresh.log.read_text()
    assert "ctl: cont" not in rotated.read_text()
    assert (fresh.ram / "pc.ram").read_bytes().startswith(b"precious")


def test_a_log_that_can_not_be_opened_again_goes_on(mount: Mount, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:1M", log=folder / "log")
    moved = folder.rename(tmp_path / "moved")
    mounted.log = moved / "log"
    mounted.expect_log(f"the log can't be reopened, and continues where it was: {folder}/log: No such file")
    mounted.signal(signal.SIGHUP)
    wait_for_line(moved / "log", "can't be reopened")
    mounted.ctl("stop")
    assert "ctl: stop" in (moved / "log").read_text()


def test_a_log_that_the_mount_has_hidden_is_not_looked_for_on_it(tmp_path: Path, mount: Mount) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    (tmp_path / "log").touch()
    os.link(tmp_path / "log", path / "status")
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:1M", path=path, log=path / "status")
    mounted.log = tmp_path / "log"
    mounted.expect_log(f"continues where it was: {path}/status: ")
    mounted.signal(signal.SIGHUP)
    wait_for_line(mounted.log, "can't be reopened")
    assert mounted.ctl("stop").startswith("ok ")


def test_a_fifo_that_nobody_reads_is_no_log(tmp_path: Path, mount_point: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    result = subprocess.run(
        [BIN / "mount.ckptfs", "none", mount_point, "-o", f"ram=pc.ram:1M,log={tmp_path}/fifo"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (result.returncode, result.stderr) == (32, f"mount.ckptfs: {tmp_path}/fifo: No such device or address\n")


WITHOUT_SYSLOG = """
set -eu
mount -t tmpfs none /dev        # as in a container; nobody else sees this one
mknod -m 666 /dev/null c 1 3
mknod -m 666 /dev/urandom c 1 9
mknod -m 600 /dev/fuse c 10 229
{bin}/mount.ckptfs none {directory} -o ram=pc.ram:1M
grep '^log ' {directory}/status
kill -HUP $(awk '$1 == "pid" {{ print $2 }}' {directory}/status)
umount {directory}
"""


def test_a_mount_without_syslog_says_so(public: Path) -> None:
    directory = public / "mnt"
    directory.mkdir()
    script = WITHOUT_SYSLOG.format(bin=BIN, directory=directory)
    result = in_a_mount_namespace(script)
    unmount_by_force(directory)
    assert result.returncode == 0
    assert result.stderr == (
        "mount.ckptfs: there is no syslog here (/dev/log: No such file or directory):"
        " to have a log, give log=FILE\n"
    )
    assert re.fullmatch(r"log none: syslog: No such file or directory \(\d lines? lost\)\n", result.stdout)
