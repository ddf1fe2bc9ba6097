"""ckptfs save, restore, prefetch, reset, cancel, wait, on real mounts."""

import json
import os
import re
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import RunCkptfs
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import BIN, DEADLINE, Mounted

MiB = 1 << 20
LENGTH = 8 * MiB


@pytest.fixture
def mounted(mount: Mount, tmp_path: Path) -> Mounted:
    (tmp_path / "storage").mkdir()
    mounted = mount(tmp_path / "storage/vm", f"ram=pc.ram:{LENGTH}")
    with (mounted.ram / "pc.ram").open("r+b", buffering=0) as file:
        file.write(np.random.default_rng(1).bytes(LENGTH))
    return mounted


@pytest.fixture
def slow(mounted: Mounted) -> Mounted:
    """A save of it takes a minute, if nobody is in a hurry."""
    (mounted.path / "parameters/max-bandwidth").write_text(f"{LENGTH // 60}\n")
    return mounted


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen([BIN / "ckptfs", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_active(mounted: Mounted) -> None:
    mounted.wait_for(lambda status: status["migration"].get("status") == "active")


def hurry(mounted: Mounted) -> None:
    (mounted.path / "parameters/max-bandwidth").write_text("0\n")


def test_save(mounted: Mounted, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    result = run_ckptfs("save", mounted.path)
    assert result.stdout.startswith(f"saved {tmp_path}/storage/vm: 2048 pages")
    assert decode(tmp_path / "storage/vm").blocks["pc.ram"].tobytes() == (mounted.ram / "pc.ram").read_bytes()
    assert run_ckptfs("save", "--quiet", mounted.path, f"{tmp_path}/storage/other").stdout == ""
    assert (tmp_path / "storage/other").exists()


def test_a_target_is_meant_from_where_one_stands(mounted: Mounted, tmp_path: Path) -> None:
    for target in ("here", "sub/my vm"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        subprocess.run([BIN / "ckptfs", "save", "-q", mounted.path, target], cwd=tmp_path, check=True)
        assert (tmp_path / target).exists()


def test_a_save_that_fails(mounted: Mounted, run_ckptfs: RunCkptfs, tmp_path: Path) -> None:
    result = run_ckptfs("save", mounted.path, f"{tmp_path}/nosuch/vm", code=1)
    assert result.stderr == f"{mounted.path}: {tmp_path}/nosuch/vm: No such file or directory\n"
    (tmp_path / "storage/vm").write_bytes(b"QEVM")
    assert "`save force`" in run_ckptfs("save", mounted.path, code=1).stderr
    run_ckptfs("save", "--force", mounted.path)
    assert "no guest's RAM is mounted here" in run_ckptfs("save", tmp_path, code=1).stderr
    vm = tmp_path / "storage/vm"
    assert run_ckptfs("save", vm, code=1).stderr.startswith(f"{vm}: is a file: name the directory")


def test_a_target_of_a_machine_that_is_no_checkpoint(run_ckptfs: RunCkptfs, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"precious")
    for name, words in ("disk.img", "exists and holds no checkpoint"), (".", "is a directory"):
        result = run_ckptfs("save", "--qmp", tmp_path / "qmp", tmp_path / name, code=1)
        assert result.stderr.startswith(f"{tmp_path / name}: {words}")
    assert (tmp_path / "disk.img").read_bytes() == b"precious"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_save_that_is_interrupted(number: signal.Signals, slow: Mounted, tmp_path: Path) -> None:
    process = start("save", slow.path)
    wait_until_active(slow)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "cancelling ...\n" in stderr
    assert stderr.endswith(f"{slow.path}: the save was cancelled\n")
    assert os.listdir(tmp_path / "storage") == []
    hurry(slow)
    slow.ctl("save")


def test_a_save_whose_command_is_killed_goes_on(slow: Mounted, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    process = start("save", slow.path)
    wait_until_active(slow)
    for _ in range(100):
        assert Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] != "D"
    process.kill()
    process.communicate(timeout=DEADLINE)
    waiting = start("wait", slow.path)
    hurry(slow)
    waiting.communicate(timeout=DEADLINE)
    assert waiting.returncode == 0
    assert os.listdir(tmp_path / "storage") == ["vm"]
    run_ckptfs("wait", slow.path)


def test_cancel_and_wait(slow: Mounted, run_ckptfs: RunCkptfs) -> None:
    run_ckptfs("wait", slow.path)  # nothing runs
    assert "nothing is running, so there is nothing to cancel" in run_ckptfs("cancel", slow.path, code=1).stderr
    slow.ctl("save nowait")
    waiting = start("wait", slow.path)
    wait_until_active(slow)
    assert run_ckptfs("cancel", slow.path).stdout == "save cancelled\n"
    _, stderr = waiting.communicate(timeout=DEADLINE)
    assert (waiting.returncode, stderr.splitlines()[-1]) == (1, f"{slow.path}: what ran was cancelled")
    assert run_ckptfs("wait", slow.path, code=1).stderr == f"{slow.path}: what ran was cancelled\n"


def test_restore_prefetch_and_reset(mounted: Mounted, mount: Mount, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    mounted.ctl("save")
    incoming = mount(tmp_path / "storage/vm")
    assert run_ckptfs("prefetch", incoming.path, "pc.ram", "0", "1M").stdout.startswith("1048576 bytes")
    *progress, answer = map(json.loads, run_ckptfs("prefetch", "--json", incoming.path).stdout.splitlines())
    assert progress[0]["state"] == "prefetching"
    assert 0 < progress[0]["migration"]["ram"]["total"] <= LENGTH - MiB
    assert answer["answer"].startswith(f"{LENGTH} bytes are in")
    assert "LENGTH goes with START" in run_ckptfs("prefetch", incoming.path, "pc.ram", "4k", code=2).stderr
    assert "bad size 'x'" in run_ckptfs("prefetch", incoming.path, "pc.ram", "x", "1M", code=2).stderr
    assert "there is no ram/nosuch" in run_ckptfs("prefetch", incoming.path, "nosuch", code=1).stderr
    with (incoming.ram / "pc.ram").open("r+b", buffering=0) as file:
        file.write(b"x")
        assert "stop it first" in run_ckptfs("reset", incoming.path, code=1).stderr
    assert run_ckptfs("reset", incoming.path).stdout == "1 written page dropped\n"
    assert run_ckptfs("restore", incoming.path).stdout.startswith(f"restored {tmp_path}/storage/vm")
    assert incoming.status()["restored"] is True


def test_progress_in_lines_and_as_json(mounted: Mounted, run_ckptfs: RunCkptfs) -> None:
    (mounted.path / "parameters/max-bandwidth").write_text(f"{4 * MiB}\n")
    lines = run_ckptfs("save", mounted.path).stderr.splitlines()
    assert lines
    assert all(line.startswith("saving: ") and line.endswith("% of 8 MiB") for line in lines)
    *progress, answer = map(json.loads, run_ckptfs("save", "--json", mounted.path).stdout.splitlines())
    assert {"state", "migration"} == set(progress[0])
    assert answer["answer"].startswith("saved ")


def on_a_terminal(*arguments: str | Path, while_it_runs: Callable[[], None] | None = None) -> tuple[int, str, str]:
    """Run ckptfs with a terminal of 80 columns as its stderr; its exit code, stdout, and all that was shown."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [BIN / "ckptfs", *arguments], stdout=subprocess.PIPE, stderr=theirs, text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
            if while_it_runs is not None and b"%" in shown:
                while_it_runs()
                while_it_runs = None
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    stdout, _ = process.communicate(timeout=DEADLINE)
    return process.returncode, stdout, shown.decode()


def test_progress_on_a_terminal(slow: Mounted) -> None:
    code, stdout, shown = on_a_terminal("save", slow.path, while_it_runs=lambda: hurry(slow))
    assert (code, stdout.startswith("saved ")) == (0, True)
    assert re.search(r"saving \((setup|active)\) .*\d+%.* \d+/8 MiB", shown)


def test_a_terminal_is_left_as_it_was(slow: Mounted) -> None:
    slow.ctl("save nowait")
    code, stdout, shown = on_a_terminal("wait", slow.path, while_it_runs=lambda: hurry(slow))
    assert (code, stdout) == (0, "")
    assert "\x1b[?25l" not in shown  # whoever hides the cursor and is killed leaves no cursor


def test_a_ctl_that_does_not_block(slow: Mounted) -> None:
    fd = os.open(slow.path / "ctl", os.O_RDWR | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(0)  # the outcome of the last command
    os.read(fd, 4096)
    os.write(fd, b"save")
    wait_until_active(slow)
    assert not poll.poll(0)
    with pytest.raises(BlockingIOError):
        os.read(fd, 4096)
    with pytest.raises(BlockingIOError):
        os.write(fd, b"save")
    hurry(slow)
    assert poll.poll(DEADLINE * 1000)
    assert os.read(fd, 4096).startswith(b"ok saved ")
    os.write(fd, b"nosuch")
    assert poll.poll(DEADLINE * 1000)
    assert os.read(fd, 4096).startswith(b"error: unknown command 'nosuch'")
    os.close(fd)
