"""`ckptfs run`: stock QEMU maps the checkpoint file itself, without a mount."""

import hashlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckptfs.channels.backing_file import FileSource
from ckptfs.mapped_ram.checkpoint import Checkpoint, read_checkpoint
from tests.doubles.migration_file import MigrationFile
from tests.live.machines import SMALL, LiveCheckpoint, LiveCheckpoints, goes_on
from tests.mount.decode import decode
from tests.mount.harness import BIN, Mounted
from tests.qemu.firmware import write_rom
from tests.qemu.guest import KERNEL_COMMAND_LINE, Guest
from tests.qemu.machine import Qemu

CKPTFS = BIN / "ckptfs"


def resumed(checkpoint: LiveCheckpoint, *options: str, path: Path | None = None) -> Qemu:
    """The QEMU that `ckptfs run` becomes."""
    machine = checkpoint.machine
    return Qemu(
        checkpoint.guest,
        *machine.devices,
        machine=machine.type,
        memory=machine.memory,
        program=(CKPTFS, "run", *options, path or checkpoint.path),
    )


def is_qemu_on(pid: int, path: Path) -> bool:
    """Whether the process is QEMU, and has mapped the file."""
    program = os.readlink(f"/proc/{pid}/exe")
    return program.endswith("qemu-system-x86_64") and str(path) in Path(f"/proc/{pid}/maps").read_text()


def copy(checkpoint: LiveCheckpoint, path: Path) -> Path:
    """A copy with the same holes."""
    subprocess.run(["cp", "--sparse=always", checkpoint.path, path], check=True)
    return path


def read(path: Path) -> Checkpoint:
    """All of a file but its pages."""
    with path.open("rb") as file:
        return read_checkpoint(FileSource(file.fileno()))[0]


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look again and again, as nothing tells."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("origin", ["live", "stock"])
async def test_a_machine_goes_on(checkpoints: LiveCheckpoints, origin: str) -> None:
    checkpoint = checkpoints.live(SMALL) if origin == "live" else checkpoints.stock(SMALL)
    before = sha256(checkpoint.path)
    async with resumed(checkpoint) as vm:
        if origin == "stock":  # it was stopped
            await vm.cont()
        assert await vm.tick() > checkpoint.last_tick
        await goes_on(vm)
        assert is_qemu_on(vm.pid, checkpoint.path)
    assert sha256(checkpoint.path) == before


async def test_a_save_over_its_name_changes_nothing_of_it(
    checkpoints: LiveCheckpoints, mount: Callable[..., Mounted], tmp_path: Path
) -> None:
    checkpoint = checkpoints.live(SMALL)
    path = copy(checkpoint, tmp_path / "vm")
    mounted = mount(path)
    async with resumed(checkpoint, path=path) as vm:
        await vm.tick()
        with (mounted.ram / "pc.ram").open("r+b") as ram:
            ram.write(bytes(64 << 20))
        mounted.ctl("save ram-only")
        await goes_on(vm)
        await goes_on(vm)


AS_NOBODY = """\
import locale, os, sys
from ckptfs.cli import run
from ckptfs.cli.ckptfs import main
os.setgroups([])
os.setgid(65534)
os.setuid(65534)  # with all modules loaded: a user need not be able to read root's Python
sys.exit(main())
"""


def for_nobody(checkpoint: LiveCheckpoint, public: Path) -> tuple[Path, Guest]:
    """All that another user needs to read, in a directory where he may make sockets."""
    path = copy(checkpoint, public / "vm")
    path.chmod(0o444)
    kernel, initrd = (public / name for name in ("vmlinuz", "initrd"))
    for source, target in ((checkpoint.guest.kernel, kernel), (checkpoint.guest.initrd, initrd)):
        target.write_bytes(source.read_bytes())
    public.chmod(0o777)
    return path, replace(checkpoint.guest, kernel=kernel, initrd=initrd)


async def test_it_needs_neither_root_nor_fuse(checkpoints: LiveCheckpoints, public: Path) -> None:
    checkpoint = checkpoints.live(SMALL)
    path, guest = for_nobody(checkpoint, public)
    program = (sys.executable, "-c", AS_NOBODY, "run", path)
    async with Qemu(guest, *SMALL.devices, memory=SMALL.memory, program=program, directory=public) as vm:
        assert await vm.tick() > checkpoint.last_tick
        assert os.stat(f"/proc/{vm.pid}").st_uid == 65534


def refusal(*arguments: str | Path) -> str:
    """The one line with which `ckptfs run` refuses to start."""
    ended = subprocess.run([CKPTFS, "run", *arguments], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1
    return ended.stderr


def test_bytes_below_a_clear_bit(checkpoints: LiveCheckpoints, tmp_path: Path) -> None:
    path = copy(checkpoints.live(SMALL), tmp_path / "vm")
    block = next(block for block in read(path).blocks if block.idstr == "pc.ram")
    zeros = np.flatnonzero(~decode(path).blocks["pc.ram"].reshape(-1, 4096).any(axis=1))
    page = int(zeros[-1])
    with path.open("r+b") as file:
        file.seek((block.pages_offset or 0) + page * 4096 + 17)
        file.write(b"!")
    assert refusal(path, "-nodefaults").startswith(
        f"{path}: page {page} of pc.ram is zeros, but the file has other bytes"
    )


def test_what_holds_no_machine(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    MigrationFile(devices=()).write(path)
    assert refusal(path) == f"{path}: contains RAM but no machine: there is nothing to run\n"


# ---- as the checkpoint remembers ---------------------------------------------------------------------------


@contextmanager
def started(guest: Guest, directory: Path) -> Iterator[None]:
    """A machine as a user starts it, in a folder of his: its memory is its own, its serial line goes to a file."""
    command = [
        "qemu-system-x86_64", "-accel", "tcg,thread=single", "-nodefaults", "-display", "none", "-m", "128M", "-S",
        "-kernel", guest.kernel, "-initrd", guest.initrd, "-append", KERNEL_COMMAND_LINE,
        "-serial", "file:serial", "-qmp", "unix:qmp,server=on,wait=off", "-pidfile", "pid",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=directory)
    try:
        wait_until((directory / "qmp").exists)
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def remembered(guest_files: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A live checkpoint of such a machine, which has ended; beside it is its serial line."""
    directory = tmp_path_factory.mktemp("remembered")
    with started(guest_files, directory):
        qmp(directory / "qmp", "cont")
        wait_until(lambda: b"MD5OK" in (directory / "serial").read_bytes())
        done = subprocess.run([CKPTFS, "save", "--qmp", directory / "qmp", directory / "vm"], capture_output=True)
        assert done.returncode == 0, done
    yield directory / "vm"
    shutil.rmtree(directory)


def qmp(path: Path, command: str) -> None:
    """Run one command of QEMU's monitor."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        with connection.makefile("rw") as stream:
            for line in ("qmp_capabilities", command):
                stream.readline()
                stream.write(f'{{"execute": "{line}"}}\n')
                stream.flush()
            stream.readline()


def last_tick(serial: Path) -> int:
    found = re.findall(rb"tick (\d+) MD5OK", serial.read_bytes())
    return int(found[-1]) if found else 0


def test_it_needs_to_be_told_nothing(remembered: Path, tmp_path: Path) -> None:
    serial = remembered.with_name("serial")
    before = last_tick(serial)
    serial.unlink()
    process = subprocess.Popen([CKPTFS, "run", remembered], cwd=tmp_path)
    try:
        wait_until(lambda: serial.exists() and last_tick(serial) > before)
        assert is_qemu_on(process.pid, remembered)
    finally:
        process.kill()
        process.wait()


def test_a_machine_that_had_left_its_directory(tmp_path: Path) -> None:
    write_rom(tmp_path / "rom")
    command = [
        "qemu-system-x86_64", "-nodefaults", "-display", "none", "-m", "16M", "-bios", "rom",
        "-serial", "file:serial", "-qmp", "unix:qmp,server=on,wait=off", "-daemonize", "-pidfile", "pid",
    ]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=True)
    pid = int((tmp_path / "pid").read_text())
    pidfd = os.pidfd_open(pid)
    try:
        subprocess.run([CKPTFS, "save", "--quiet", "--qmp", "qmp", "vm"], cwd=tmp_path, check=True)
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [])
        os.close(pidfd)
    (tmp_path / "serial").unlink()
    with subprocess.Popen([CKPTFS, "run", "vm"], cwd=tmp_path) as process:
        wait_until(lambda: (tmp_path / "serial").exists() and (tmp_path / "serial").stat().st_size > 0)
        process.kill()


def test_what_a_start_touches_is_kept(remembered: Path, tmp_path: Path) -> None:
    kept = remembered.with_name("vm.working-set")
    process = subprocess.Popen([CKPTFS, "run", "--record", "2", remembered], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    process.terminate()
    process.communicate()
    assert re.fullmatch(rf"{kept}: \d+ MiB will be read first from now on\n", line)
    head, *ranges = kept.read_text().splitlines()
    assert head.startswith("ckptfs working set 1 ")
    assert 0 < len(ranges) < 1000
    with subprocess.Popen([CKPTFS, "run", remembered]) as again:
        wait_until(lambda: is_qemu_on(again.pid, remembered))
        again.kill()
    kept.unlink()


def test_clones_of_what_is_remembered(remembered: Path, tmp_path: Path) -> None:
    command = [CKPTFS, "run", "--count", "2", "--directory", "clones", remembered]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"2 clones run: N.qmp, N.serial and N.log are in {tmp_path}/clones\n"
        wait_until(lambda: all(last_tick(tmp_path / "clones" / f"{number}.serial") for number in (1, 2)))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


def test_a_file_that_others_may_write_says_no_command(remembered: Path) -> None:
    try:
        remembered.chmod(0o666)
        words = f"{remembered}: others may write it (mode 0o666): chmod go-w; `ckptfs run --show` prints"
        assert refusal(remembered).startswith(words)
        shown = subprocess.run([CKPTFS, "run", "--show", remembered], capture_output=True, text=True, check=True)
    finally:
        remembered.chmod(0o600)
    words = shown.stdout.split()
    assert words[0].endswith("qemu-system-x86_64")
    assert "-S" not in words
    assert f"file:{remembered}" not in words
    assert words[-1] == "file:VMSTATE"


def test_what_remembers_nothing_asks_for_arguments(checkpoints: LiveCheckpoints) -> None:
    ended = subprocess.run(
        [CKPTFS, "run", checkpoints.stock(SMALL).path], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert "does not say how its machine was started" in ended.stderr


def test_options_of_ours_behind_the_file(checkpoints: LiveCheckpoints) -> None:
    path = checkpoints.stock(SMALL).path
    ended = subprocess.run([CKPTFS, "run", path, "--count", "2"], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (
        2,
        "ckptfs: --count goes before the file: what follows that is QEMU's\n",
    )


async def test_the_arguments_alone(checkpoints: LiveCheckpoints, tmp_path: Path) -> None:
    """`ckptfs qemu-args FILE` and `ckptfs vmstate FILE`, for whoever starts QEMU himself."""
    checkpoint = checkpoints.live(SMALL)
    arguments, stream = words_and_stream(checkpoint.path)
    (tmp_path / "vmstate").write_bytes(stream)
    async with Qemu(
        checkpoint.guest, *checkpoint.machine.devices, *arguments, incoming=f"file:{tmp_path / 'vmstate'}"
    ) as vm:
        assert await vm.tick() > checkpoint.last_tick


def words_and_stream(path: Path) -> tuple[list[str], bytes]:
    """What the two commands print."""
    words = subprocess.run([CKPTFS, "qemu-args", path], capture_output=True, text=True, check=True).stdout.split()
    return words, subprocess.run([CKPTFS, "vmstate", path], capture_output=True, check=True).stdout


# ---- many --------------------------------------------------------------------------------------------------


@contextmanager
def herd(checkpoint: LiveCheckpoint, directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`ckptfs run --count`, up to the line that says that all run; ended by force if the test does not."""
    machine = checkpoint.machine
    command = [
        CKPTFS, "run", *options, "--directory", directory, checkpoint.path, "--",
        "-accel", "tcg,thread=single", "-nodefaults", "-serial", "stdio", "-m", machine.memory, *machine.devices,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def pids_of(directory: Path) -> list[int]:
    """The QEMUs whose QMP sockets are there."""
    found = []
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"unix:{directory}/".encode() in command_line.read_bytes():
                found.append(int(command_line.parent.name))
    return found


def pss_of_file(pid: int, path: Path) -> tuple[int, int]:
    """(Rss, Pss) in KiB of what a process has of a file (proc(5), smaps)."""
    rss = pss = 0
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text()):
        if area.partition("\n")[0].endswith(str(path)):
            clean = sum(map(int, re.findall(r"Shared_Clean: +(\d+)", area)))
            rss += clean
            pss += int(re.findall(r"^Pss: +(\d+)", area, re.MULTILINE)[0])
    return rss, pss


def test_three_clones_tick_share_and_end(checkpoints: LiveCheckpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.live(SMALL)
    before = sha256(checkpoint.path)
    directory = tmp_path / "clones"
    with herd(checkpoint, directory, "--count", "3") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"3 clones run: N.qmp, N.serial and N.log are in {directory}\n"
        serials = [directory / f"{number}.serial" for number in (1, 2, 3)]
        wait_until(lambda: all(serial.read_text().count("MD5OK\n") > 2 for serial in serials))
        pids = pids_of(directory)
        assert len(pids) == 3
        for pid in pids:
            shared, _ = pss_of_file(pid, checkpoint.path)
            assert shared > 4 << 10  # the blob, which every guest reads, and the kernel's text
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    assert pids_of(directory) == []
    assert all("BAD" not in serial.read_text() for serial in serials)
    assert sha256(checkpoint.path) == before


def test_clones_die_with_it(checkpoints: LiveCheckpoints, tmp_path: Path) -> None:
    directory = tmp_path / "clones"
    with herd(checkpoints.live(SMALL), directory, "--count", "2") as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(pids_of(directory)) == 2
        process.kill()
        process.wait()
        wait_until(lambda: pids_of(directory) == [])


def test_a_clone_that_fails_ends_all(checkpoints: LiveCheckpoints, tmp_path: Path) -> None:
    path, directory = checkpoints.live(SMALL).path, tmp_path / "clones"
    says = refusal("--count", "2", "--directory", directory, path, "-nodefaults", "-device", "no-such")
    assert re.fullmatch(r"clone [12] ended with exit code 1: .*'no-such' is not a valid device model.*\n", says)
    assert pids_of(directory) == []
