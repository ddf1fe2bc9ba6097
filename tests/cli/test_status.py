"""ckptfs status: what people see of a mount, at a glance and as it goes."""

import json
import os
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptfs.cli.status import Pace, format_status
from tests.cli.conftest import RunCkptfs
from tests.mount.conftest import Mount
from tests.mount.harness import BIN, DEADLINE, Mounted

MiB = 1 << 20


@pytest.fixture
def mounted(mount: Mount, tmp_path: Path) -> Mounted:
    mounted = mount(tmp_path / "vm", "ram=pc.ram:8M")
    mounted.fill(1, 2 * MiB)
    return mounted


def facts(text: str) -> dict[str, str]:
    """What is said, by its label; lines that go on are joined."""
    found: dict[str, str] = {}
    label = ""
    for line in text.splitlines()[1:]:
        assert len(line) < 80 or line.strip().startswith("/")  # a path that is longer stays whole
        label = line[:10].strip() or label
        found[label] = f"{found.get(label, '')} {line[10:].strip()}".strip()
    return found


def test_a_mount_from_its_beginning(mounted: Mounted, mount: Mount, run_ckptfs: RunCkptfs, tmp_path: Path) -> None:
    text = run_ckptfs("status", mounted.path).stdout
    assert text.startswith(f"{mounted.path}: idle\n")
    new = facts(text)
    assert new["RAM"] == "8 MiB in 1 block, 2048 pages"
    assert new["written"].split() == ["2", "MiB", "512", "25%", "########"]
    assert (new["restore"], new["last save"], new["in use by"]) == (
        "none: there is no checkpoint yet",
        "none since the mount",
        "nobody",
    )
    mounted.ctl("save")
    assert " ago) to " in facts(run_ckptfs("status", mounted.path).stdout)["last save"]

    incoming = mount(tmp_path / "vm")
    with (incoming.ram / "pc.ram").open("r+b", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(4096)
        mine = facts(run_ckptfs("status", incoming.path).stdout)
    assert f"({os.getpid()}, rw)" in mine["in use by"]
    assert mine["restore"] == "4 KiB read, 1.996 MiB left in the checkpoint"
    assert mine["base"] == f"{tmp_path}/vm (RAM alone), vmstate none"
    incoming.ctl("restore")
    incoming.ctl("stop")
    restored = facts(run_ckptfs("status", incoming.path).stdout)
    assert restored["restore"].startswith("all of it is in memory, the file is no longer needed, after ")
    assert restored["stopped"] == "writers of ram/ wait for `cont`"
    assert "no guest's RAM is mounted here" in run_ckptfs("status", tmp_path, code=1).stderr


def test_a_save_that_runs(mounted: Mounted, run_ckptfs: RunCkptfs) -> None:
    (mounted.path / "parameters/max-bandwidth").write_text(f"{2 * MiB // 60}\n")  # so that it takes a minute
    mounted.ctl("save nowait")
    mounted.wait_for(lambda status: status["migration"].get("status") == "active")
    for command in ("status", "info"):
        first = run_ckptfs(command, mounted.path).stdout.splitlines()[0]
        assert "saving (active): " in first
        assert "% of" not in first
        assert " of 8 MiB" in first
    mounted.ctl("cancel")


def test_what_goes_on_between_two_looks() -> None:
    def status(checkpoint: int, written: int) -> dict[str, Any]:
        block = {"page-size": 4096, "checkpoint-pages": checkpoint, "written-pages": written}
        return {"blocks": [block]}

    assert Pace.between(status(1000, 10), status(744, 266), 2.0) == Pace(MiB / 2, MiB / 2)
    assert Pace.between(status(0, 10), status(100, 0), 2.0) == Pace(0, 0)  # after a save, a reset


def test_a_machine_and_its_troubles_in_80_columns(mounted: Mounted) -> None:
    status = mounted.status() | {
        "base": "/ckpt/vm1",
        "base-machine": "pc-i440fx-10.0",
        "vmstate": "in use: a machine was started from it",
        "qmp": "connected /run/vm1.qmp",
        "guest": "running",
        "waiting-readers": 3,
        "storage": "silent: no answer for pages pc.ram 0 to 255",
        "bad-page-count": 1,
        "shared-use": "processes 1 and 2 have pc.ram with share=on and write over one another",
        "last-save": "2026-01-01T00:00:00Z",
        "last-save-to": "/ckpt/vm1",
        "last-save-downtime": 8,
        "migration": {"status": "failed", "error-desc": "No space left on device"},
    }
    shown = facts(format_status("/mnt/vm1", status, Pace(12.5 * MiB, 0)))
    assert shown["now"] == "12.5 MiB/s read, 0.0 MiB/s written, 3 readers waiting"
    assert shown["machine"] == "running, QMP connected /run/vm1.qmp"
    assert shown["last save"].endswith("to /ckpt/vm1, guest paused 8 ms")
    assert shown["failed"] == "No space left on device"
    assert shown["storage"].startswith("silent")
    assert shown["bad"].startswith("1 page can't be read")
    assert "write over one another" in shown["warning"]


# --- --watch ----------------------------------------------------------------------------------------------


class Watching:
    """`ckptfs status --watch` on a terminal."""

    def __init__(self, directory: Path) -> None:
        self._ours, theirs = os.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        command = [BIN / "ckptfs", "status", "--watch", directory]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.shown = ""

    def until(self, wanted: Callable[[str], bool]) -> None:
        """Read what it shows until it is as ``wanted``."""
        while not wanted(self.shown):
            assert select.select([self._ours], [], [], DEADLINE)[0], self.shown
            self.shown += os.read(self._ours, 4096).decode()

    def end(self) -> int:
        """Its exit code."""
        code = self.process.wait(DEADLINE)
        os.close(self._ours)
        return code


def test_a_watched_mount_can_be_unmounted(mounted: Mounted) -> None:
    watching = Watching(mounted.path)
    watching.until(lambda shown: "MiB/s written, 0 readers waiting" in shown)
    mounted.ctl("save")
    watching.until(lambda shown: "s ago)" in shown)
    mounted.umount()
    assert watching.end() == 0
    assert "\x1b[?25l" not in watching.shown


def test_ctrl_c_ends_it(mounted: Mounted) -> None:
    watching = Watching(mounted.path)
    watching.until(lambda shown: "in use by nobody" in shown)
    watching.process.send_signal(signal.SIGINT)
    assert watching.end() == 0


def test_for_programs(mounted: Mounted, run_ckptfs: RunCkptfs) -> None:
    line = run_ckptfs("status", "--json", mounted.path).stdout
    assert line.count("\n") == 1
    assert json.loads(line)["written-pages"] == 512
    command = [BIN / "ckptfs", "status", "--json", "--watch", mounted.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert json.loads(process.stdout.readline())["state"] == "idle"
        process.terminate()
