"""Every system call of a save, a restore, a mount fails in its turn: nothing is left over, and all goes on.

After each failure the daemon has the descriptors and the layers of RAM that it had before, no more threads than
work that succeeds needs, the former checkpoint is whole, no temporary file is left, and the next command works.
"""

import errno
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from tests.control.faults import delayed, failures, run_failing
from tests.control.footprint import footprint, thread_count
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import PAGE, decode
from tests.mount.harness import BIN, Mounted

MiB = 1 << 20
MOUNT_FAILURE = 32
CHANNELS = 2
THREADS = 1 + 2 * CHANNELS + 2
"""The daemon's main thread, those of the channels of a base and of a target, and what else runs beside them."""
BLOCKS = {"pc.ram": 2 * MiB, "vga.vram": MiB}


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
        """See `faults.failures`."""
        return failures(self.mounted, self._log, command, call, error)

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


@pytest.mark.parametrize(("call", "error"), [("copy_file_range", "EIO"), ("openat", "EIO"), ("pread64", "EIO")])
def test_a_save_behind_a_prefix_in_which_a_call_fails(call: str, error: str, guest: Guest) -> None:
    mounted = guest.mounted
    prefix = b"prefix " * 1000
    path = guest.directory / "with prefix"
    path.write_bytes(prefix)
    command = f"save 'file:{path},offset={len(prefix)}'"
    mounted.ctl(command)
    guest.path.unlink()
    before = footprint(guest.pid)
    for noticed in guest.failures(command, call, error):
        assert noticed is None or noticed.strerror.startswith(f"error: {path}: ")
        assert footprint(guest.pid) == before
        assert os.listdir(guest.directory) == [path.name]
        assert path.read_bytes()[: len(prefix)] == prefix
        assert decode(path, len(prefix)).blocks["pc.ram"].tobytes() == guest.ram["pc.ram"]


@pytest.mark.parametrize(("call", "error"), [("fsync", "EIO")])
def test_a_save_whose_name_may_be_lost_is_an_error(call: str, error: str, guest: Guest) -> None:
    # The directory could not be synced after the rename: the new checkpoint is there, but a power cut may take it.
    before = sum(footprint(guest.pid).descriptors.values()), footprint(guest.pid).layers
    for noticed in guest.failures("save", call, error):
        assert noticed is not None
        assert noticed.strerror.startswith(f"error: {guest.path}: the new checkpoint is in place, but")
        assert noticed.errno == errno.EIO
        guest.assert_saved()
        assert (sum(footprint(guest.pid).descriptors.values()), footprint(guest.pid).layers) == before
        guest.assert_ram()
        guest.write(0, PAGE)
    guest.assert_saved()


@pytest.mark.parametrize(
    ("call", "error"),
    [("preadv2", "EIO"), ("preadv2", "EINTR"), ("memfd_create", "EMFILE"), ("ftruncate", "ENOMEM")],
)
def test_a_restore_in_which_a_call_fails(call: str, error: str, guest: Guest) -> None:
    if (call, error) == ("preadv2", "EIO"):
        guest.mounted.expect_log(r"page\(s\) .* can't be read from the checkpoint")
    before = footprint(guest.pid)
    held = Counter({f"/memfd:ckptfs:{idstr} (deleted)": 1 for idstr in BLOCKS})
    for noticed in guest.failures("restore", call, error):
        after = footprint(guest.pid)
        # What was restored stays, so that it need not be read again: one layer a block, however often it fails.
        assert after.layers - before.layers <= held
        assert set(after.descriptors - before.descriptors) <= set(held)
        assert thread_count(guest.pid) <= THREADS
        guest.assert_ram()
        if noticed is None:
            break  # it was tried again, and all is restored
    guest.mounted.ctl("restore")
    assert guest.mounted.status()["restored"] is True
    after = footprint(guest.pid)
    assert after.layers - before.layers == held
    assert str(guest.path) not in after.descriptors
    guest.assert_ram()


def test_a_reset_that_fails_drops_nothing(guest: Guest) -> None:
    guest.mounted.ctl("save")
    saved = {idstr: bytearray(ram) for idstr, ram in guest.ram.items()}
    before = footprint(guest.pid)
    guest.write(3 * PAGE, 5 * PAGE)
    for noticed in guest.failures("reset", "memfd_create", "EMFILE"):
        assert noticed is not None
        assert footprint(guest.pid) == before
        assert guest.mounted.status()["written-pages"] == 5
        guest.assert_ram()
    assert guest.mounted.status()["written-pages"] == 0
    assert footprint(guest.pid) == before
    guest.ram = saved
    guest.assert_ram()


@pytest.mark.parametrize(
    ("call", "error"),
    [("openat", "EMFILE"), ("lseek", "EIO"), ("pread64", "EIO"), ("memfd_create", "EMFILE"), ("newfstatat", "EIO")],
)
def test_an_empty_mount_that_can_not_be_filled_stays_empty(
    call: str, error: str, mount: Mount, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", 512, {3: b"third"}), Block("vga.vram", 16, {1: b"vga"})]).write(path)
    mounted = mount("none")
    before = footprint(mounted.pid)
    for noticed in failures(mounted, tmp_path / "strace", f"migrate_incoming file:{path}", call, error):
        if noticed is None:
            break  # a call that does not matter
        assert noticed.strerror.startswith("error: " if call == "memfd_create" else f"error: {path}: ")
        assert footprint(mounted.pid) == before
        assert list(mounted.ram.iterdir()) == []
        assert mounted.status()["base"] is None
    assert (mounted.ram / "pc.ram").read_bytes()[3 * PAGE :].startswith(b"third")


def test_two_that_fill_an_empty_mount_at_once(mount: Mount, tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "other"]
    for path in paths:
        MigrationFile(blocks=[Block("pc.ram", 512, {3: path.name.encode()})]).write(path)
    mounted = mount("none", f"multifd_channels={CHANNELS}")
    with delayed(mounted.pid, tmp_path / "strace", "pread64", 0.02), ThreadPoolExecutor() as threads:
        answers = [threads.submit(mounted.ctl, f"migrate_incoming file:{path}") for path in paths]
        refused = [answer.exception() for answer in answers]
    assert [type(problem) for problem in refused].count(FileExistsError) == 1
    filled = paths[refused.index(None)]
    descriptors = footprint(mounted.pid).descriptors
    assert [descriptors[str(path)] for path in paths] == [(path == filled) * (1 + CHANNELS) for path in paths]
    assert (mounted.ram / "pc.ram").read_bytes()[3 * PAGE :].startswith(filled.name.encode())


@pytest.mark.parametrize(
    ("call", "error"), [("openat", "EMFILE"), ("newfstatat", "EIO"), ("lseek", "EIO"), ("pread64", "EIO")]
)
def test_a_mount_in_which_a_call_on_the_checkpoint_fails(
    call: str, error: str, mount_point: Path, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", 512, {3: b"third"}), Block("vga.vram", 16, {1: b"vga"})]).write(path)
    command = (BIN / "mount.ckptfs", "-f", path, mount_point)  # -f: all but mounting
    for when in count(1):
        result, injected = run_failing(tmp_path / "strace", call, error, when, *command, path=path)
        if not injected.calls:
            break
        assert result.returncode == MOUNT_FAILURE
        assert result.stderr == f"mount.ckptfs: {path}: {os.strerror(getattr(errno, error))}\n"
    assert (result.returncode, result.stderr) == (0, "")
    assert when > 1


def test_a_mount_that_the_kernel_refuses(mount_point: Path, tmp_path: Path) -> None:
    command = (BIN / "mount.ckptfs", "none", mount_point, "-o", f"log={tmp_path / 'log'}")
    result, injected = run_failing(tmp_path / "strace", "mount", "EPERM", 1, *command)
    assert injected.calls
    assert result.returncode == MOUNT_FAILURE
    assert result.stderr.splitlines()[-1].startswith(f"mount.ckptfs: {mount_point}: ")
