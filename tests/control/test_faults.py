"""Every system call of a save, a restore, a mount fails in its turn: nothing is left over, and all goes on.

After each failure the daemon has the descriptors and the layers of RAM that it had before, no more threads than work
that succeeds needs, the former checkpoint is whole, no temporary file is left, and the next command works.
"""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from tests.control.faults import failing
from tests.control.footprint import footprint, thread_count
from tests.mount.conftest import Mount
from tests.mount.decode import PAGE, decode
from tests.mount.harness import Mounted

MiB = 1 << 20
CHANNELS = 2
THREADS = 1 + 2 * CHANNELS + 2
"""The daemon's main thread, those of the channels of a base and of a target, and what else runs beside them."""
BLOCKS = {"pc.ram": 2 * MiB, "vga.vram": MiB}
CALLS_MAX = 60
"""A save of so little RAM makes fewer calls of one kind than that."""


class Guest:
    """A mount of `directory`/checkpoint, and what its RAM has to hold."""

    def __init__(self, mount: Mount, directory: Path, *options: str) -> None:
        self.directory = directory / "storage"
        self.directory.mkdir()
        self.path = self.directory / "checkpoint"
        self._random = np.random.default_rng(1)
        self._log = directory / "strace"
        ram = ",".join(f"ram={idstr}:{length}" for idstr, length in BLOCKS.items())
        self.mounted: Mounted = mount(self.path, ram, f"multifd_channels={CHANNELS}", *options)
        self.ram = {idstr: bytearray(length) for idstr, length in BLOCKS.items()}
        self.write(0, MiB)
        self.mounted.ctl("save")  # so that there is a base
        self.write(MiB, 2 * PAGE)

    @property
    def pid(self) -> int:
        return self.mounted.pid

    def write(self, block_offset: int, length: int) -> None:
        """Write random bytes into pc.ram."""
        data = self._random.bytes(length)
        with (self.mounted.ram / "pc.ram").open("r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), data, block_offset) == length
        self.ram["pc.ram"][block_offset : block_offset + length] = data

    def failures(self, command: str, call: str, error: str) -> Iterator[OSError | None]:
        """Run `command` again and again while the 1st, 2nd, ... `call` of each thread fails with `error`.

        Gives the command's error, if it noticed the failure, each time; ends when there is no such call any more.
        """
        for when in count(1):
            assert when < CALLS_MAX
            noticed = None
            with failing(self.pid, self._log, call, error, when) as injected:
                try:
                    self.mounted.ctl(command)
                except OSError as problem:
                    noticed = problem
            if not injected.calls:
                assert noticed is None
                assert when > 1, f"{command} makes no call of {call}"
                return
            yield noticed

    def assert_saved(self) -> None:
        """See that the checkpoint is whole and holds what was written, and that nothing lies beside it."""
        assert os.listdir(self.directory) == [self.path.name]
        blocks = decode(self.path).blocks
        assert {idstr: ram.tobytes() for idstr, ram in blocks.items()} == self.ram

    def assert_ram(self) -> None:
        """See that RAM holds what was written."""
        assert {idstr: (self.mounted.ram / idstr).read_bytes() for idstr in BLOCKS} == self.ram


@pytest.fixture
def guest(mount: Mount, tmp_path: Path) -> Guest:
    return Guest(mount, tmp_path)


SAVE_FAULTS = [
    ("openat", "EIO"),
    ("openat", "EMFILE"),
    ("newfstatat", "EIO"),
    ("getdents64", "EIO"),
    ("fcntl", "EMFILE"),
    ("flock", "ENOLCK"),
    ("memfd_create", "EMFILE"),
    ("ftruncate", "ENOSPC"),
    ("madvise", "EINVAL"),
    ("pread64", "EIO"),
    ("pwrite64", "ENOSPC"),
    ("pwrite64", "EINTR"),
    ("pwritev2", "EIO"),
    ("pwritev2", "ENOSPC"),
    ("pwritev2", "EINTR"),
    ("lseek", "EIO"),
    ("fdatasync", "EIO"),
    ("fdatasync", "ENOSPC"),
    ("renameat", "EIO"),
]


@pytest.mark.parametrize(("call", "error"), SAVE_FAULTS)
def test_a_save_in_which_a_call_fails(call: str, error: str, guest: Guest) -> None:
    mounted = guest.mounted
    mounted.ctl("save")
    before = footprint(guest.pid)
    former = guest.path.read_bytes()
    for number, noticed in enumerate(guest.failures("save", call, error)):
        if noticed is None:
            guest.assert_saved()
        else:
            assert noticed.strerror.startswith(f"error: {guest.path}: ")
            assert guest.path.read_bytes() == former
            assert os.listdir(guest.directory) == [guest.path.name]
        assert footprint(guest.pid) == before
        assert thread_count(guest.pid) <= THREADS
        guest.assert_ram()
        guest.write(number * PAGE, PAGE + 100)
        mounted.ctl("save")
        assert footprint(guest.pid) == before
        guest.assert_saved()
        former = guest.path.read_bytes()
