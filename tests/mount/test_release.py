"""A file that a program has closed is closed for us: its RELEASE may come later, and is waited for."""

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.mount.conftest import Mount
from tests.mount.harness import Mounted

MiB = 1 << 20


@pytest.fixture
def incoming(fresh: Mounted, mount: Mount, tmp_path: Path) -> Mounted:
    """A mount of a checkpoint of 16 MiB of data."""
    with (fresh.ram / "pc.ram").open("r+b", buffering=0) as file:
        file.write(np.random.default_rng(1).bytes(16 * MiB))
    fresh.ctl("save")
    return mount(tmp_path / "checkpoint")


def read_ahead_and_close(fd: int) -> None:
    """Close a file while the kernel still reads ahead on it: RELEASE comes after that."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
    os.close(fd)


def test_reset_as_soon_as_the_writer_has_closed(incoming: Mounted) -> None:
    for _ in range(10):
        fd = os.open(incoming.ram / "pc.ram", os.O_RDWR)
        os.write(fd, b"x" * 4096)
        read_ahead_and_close(fd)
        assert incoming.ctl("reset") == "ok 1 written page dropped"


def test_reset_as_soon_as_the_writer_has_ended(incoming: Mounted) -> None:
    path = incoming.ram / "pc.ram"
    program = f"""
import mmap, os
fd = os.open({str(path)!r}, os.O_RDWR)
shared = mmap.mmap(fd, 0)
shared[:3] = b"abc"
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
os.kill(os.getpid(), 9)
"""
    for _ in range(3):
        subprocess.run([sys.executable, "-c", program])
        assert incoming.ctl("reset") == "ok 1 written page dropped"


def test_o_trunc_as_soon_as_a_reader_has_closed(fresh: Mounted) -> None:
    for _ in range(30):
        read_ahead_and_close(os.open(fresh.ram / "pc.ram", os.O_RDONLY))
        (fresh.ram / "pc.ram").open("wb").close()


def test_a_writer_that_is_there_is_not_waited_for_for_long(incoming: Mounted) -> None:
    with (incoming.ram / "pc.ram").open("r+b") as file:
        shared = mmap.mmap(file.fileno(), MiB)
    with pytest.raises(OSError, match="has a file in ram/ open for writing: stop it first") as caught:
        incoming.ctl("reset")  # it is closed, but mapped
    assert caught.value.errno == errno.EBUSY
    shared.close()
    incoming.ctl("reset")
