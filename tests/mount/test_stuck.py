"""A page whose lock is never free: no save ends well, and everything else goes on as if nothing was."""

import errno
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.control.faults import wait_inside
from tests.doubles.never_answered import PLACE
from tests.mount.conftest import Mount
from tests.mount.harness import DEADLINE, Mounted, is_mounted

NEVER_ANSWERED = str(Path(__file__).parents[1] / "doubles/never_answered.py")
READER = f"""
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
print("goes on", flush=True)
os.pread(fd, 1, {PLACE})
"""
WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print("goes on", flush=True)
while True:
    os.pwrite(fd, b"x" * 1000, 5000)
"""


# A page that is always dirty, behind the one whose lock is never free: if that is freed, there is more to write.
MAPPER = f"""
import mmap, os, sys
memory = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
memory.madvise(mmap.MADV_RANDOM)
memory[{PLACE} + (1 << 19)] = 1
print("goes on", flush=True)
while True:
    memory[{PLACE} + (1 << 19)] = 1
"""


@contextmanager
def program(code: str, mounted: Mounted) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, str(mounted.ram / "pc.ram")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "goes on\n"
            if code == READER:
                wait_inside(process.pid, "pread64")
            yield process
        finally:
            process.kill()


@pytest.fixture
def stuck(mount: Mount, tmp_path: Path) -> Callable[[float], Mounted]:
    """`stuck(DEADLINE)`: a mount that never answers a READ of `PLACE`."""

    def new_mount(deadline: float) -> Mounted:
        program = (sys.executable, NEVER_ANSWERED, str(deadline))
        return mount(tmp_path / "checkpoint", "ram=pc.ram:4M", program=program)

    return new_mount


def begin_a_save(mounted: Mounted) -> None:
    """One that gets no further than to an eviction, which does not return."""
    mounted.ctl("save nowait")
    mounted.wait_for(lambda status: status["state"] != "idle")


def test_a_save_ends_with_words_and_everything_else_is_answered(stuck: Callable[[float], Mounted]) -> None:
    mounted = stuck(1)
    with program(READER, mounted), program(WRITER, mounted) as writer:
        for command in ("save", "stop", "save"):
            with pytest.raises(OSError, match="the kernel has been busy with the pages of ram/ for 1 s") as error:
                mounted.ctl(command)
            assert error.value.errno == errno.EBUSY
        assert mounted.ctl("info migrate_parameters")
        assert writer.poll() is None
        mounted.expect_log("the kernel does not let go of the mount")
        mounted.signal(signal.SIGTERM)
        assert mounted.wait() == 0


def test_such_a_save_can_be_cancelled(stuck: Callable[[float], Mounted]) -> None:
    mounted = stuck(600)
    with program(READER, mounted):
        begin_a_save(mounted)
        assert mounted.ctl("info migrate_parameters")
        assert mounted.ctl("cancel") == "ok save cancelled"
        mounted.expect_log("the kernel does not let go of the mount")
        mounted.signal(signal.SIGTERM)
        assert mounted.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_during_such_a_save_ends_the_mount(
    number: signal.Signals, stuck: Callable[[float], Mounted]
) -> None:
    mounted = stuck(600)
    with program(READER, mounted) as reader, program(WRITER, mounted) as writer, program(MAPPER, mounted):
        begin_a_save(mounted)
        mounted.expect_log("the kernel does not let go of the mount")
        mounted.signal(number)
        assert mounted.wait() == 0
        assert not is_mounted(mounted.path)
        for process in (reader, writer):
            _, stderr = process.communicate(timeout=DEADLINE)
            assert process.returncode == 1, stderr


def test_umount_by_force_ends_the_mount_during_such_a_save(
    stuck: Callable[[float], Mounted], tmp_path: Path
) -> None:
    mounted = stuck(600)
    with program(READER, mounted) as reader:
        begin_a_save(mounted)
        mounted.expect_log("in the background: .*the mount was taken away by force")
        subprocess.run(["umount", "--force", mounted.path], check=False, timeout=DEADLINE, capture_output=True)
        reader.communicate(timeout=DEADLINE)
        assert reader.returncode == 1
    assert mounted.wait() == 0
    mounted.check_log()
    assert not (tmp_path / "checkpoint").exists()


def test_umount_by_force_ends_the_mount_though_writers_are_held(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:4M")
    mounted.ctl("stop")
    with program(WRITER, mounted) as writer:
        subprocess.run(["umount", "--force", mounted.path], check=False, timeout=DEADLINE, capture_output=True)
        writer.communicate(timeout=DEADLINE)
        assert writer.returncode == 1
    assert mounted.wait() == 0
    mounted.check_log()
