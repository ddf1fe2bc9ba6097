"""RAM as a model has it: a golden checkpoint, and what was written since; saved, restored and reset in between.

A test that begins by writing all of the file can't see a page that was restored wrongly. This one starts from a
golden checkpoint with pages of data, zeros and stale bytes, and goes every way into a block that a program has.
"""

import hashlib
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import PAGE, decode
from tests.mount.harness import DEADLINE, Mounted

PAGE_COUNT = 600  # more than two of the windows in which pages are carried
LENGTH = PAGE_COUNT * PAGE
_RANDOM = np.random.default_rng(5)

# Every third page or so has data, in runs of several lengths; beside them, bytes under clear bits.
GOLDEN = {
    page: _RANDOM.bytes(PAGE) for start in range(0, PAGE_COUNT, 37) for page in range(start, start + 1 + start % 19)
}
STALE = {page: b"stale" * 800 for page in range(30, PAGE_COUNT, 41) if page not in GOLDEN}

places = st.one_of(
    st.integers(0, LENGTH - 1),
    st.integers(0, PAGE_COUNT - 1).map(lambda page: page * PAGE),
    st.sampled_from([LENGTH - 1, LENGTH - PAGE, 256 * PAGE - 1, 512 * PAGE]),
)
lengths = st.one_of(st.integers(1, 3 * PAGE), st.sampled_from([1, PAGE - 1, PAGE, PAGE + 1, 300 * PAGE]))
pages = st.integers(0, PAGE_COUNT - 1)
seeds = st.integers(0, 255)


def content(seed: int, length: int) -> bytes:
    """Bytes to write; seed 0 are zeros."""
    return bytes(length) if seed == 0 else np.random.default_rng(seed).bytes(length)


class RAM(RuleBasedStateMachine):
    """One mount, one block: `model` is what it has to hold, `base` what it held when it was last saved."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory(prefix="model-")
        self.directory = Path(self._directory.name)
        self.path = self.directory / "checkpoint"
        self.saves = 0
        self.mounted_again = False

    @initialize()
    def mount_golden(self) -> None:
        MigrationFile(blocks=[Block("pc.ram", PAGE_COUNT, GOLDEN, STALE)]).write(self.path)
        self.model = bytearray(LENGTH)
        for page, data in GOLDEN.items():
            self.model[page * PAGE : (page + 1) * PAGE] = data
        self._saved()
        self._mount()

    def _mount(self) -> None:
        self.mounted = Mounted(self.path, self.directory / "mnt", self.directory / "log")
        self._open()

    def _open(self) -> None:
        path = self.mounted.ram / "pc.ram"
        self.fd = os.open(path, os.O_RDWR)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.shared = mmap.mmap(self.fd, LENGTH)

    def _close(self) -> None:
        self.shared.close()
        os.close(self.direct)
        os.close(self.fd)

    def _saved(self) -> None:
        self.base = bytes(self.model)

    # ---- ways in -----------------------------------------------------------------------------------

    @rule(offset=places, length=lengths)
    def read(self, offset: int, length: int) -> None:
        assert os.pread(self.fd, length, offset) == self.model[offset : offset + length]

    @rule(offset=places, length=lengths, seed=seeds)
    def write(self, offset: int, length: int, seed: int) -> None:
        data = content(seed, min(length, LENGTH - offset))
        assert os.pwrite(self.fd, data, offset) == len(data)
        self.model[offset : offset + len(data)] = data

    @rule(page=pages, count=st.integers(1, 300))
    def read_directly(self, page: int, count: int) -> None:
        buffer = mmap.mmap(-1, count * PAGE)
        done = os.preadv(self.direct, [buffer], page * PAGE)
        assert buffer[:done] == self.model[page * PAGE : (page + count) * PAGE]

    @rule(page=pages, count=st.integers(1, 300), seed=seeds)
    def write_directly(self, page: int, count: int, seed: int) -> None:
        count = min(count, PAGE_COUNT - page)
        buffer = mmap.mmap(-1, count * PAGE)
        buffer[:] = content(seed, count * PAGE)
        assert os.pwritev(self.direct, [buffer], page * PAGE) == count * PAGE
        self.model[page * PAGE : (page + count) * PAGE] = buffer[:]

    @rule(offset=places, length=lengths)
    def load(self, offset: int, length: int) -> None:
        assert self.shared[offset : offset + length] == self.model[offset : offset + length]

    @rule(offset=places, length=lengths, seed=seeds)
    def store(self, offset: int, length: int, seed: int) -> None:
        data = content(seed, min(length, LENGTH - offset))
        self.shared[offset : offset + len(data)] = data
        self.model[offset : offset + len(data)] = data

    @rule(page=pages, seed=seeds)
    def store_privately(self, page: int, seed: int) -> None:
        with mmap.mmap(self.fd, LENGTH, mmap.MAP_PRIVATE) as private:
            assert private[page * PAGE : (page + 1) * PAGE] == self.model[page * PAGE : (page + 1) * PAGE]
            private[page * PAGE : (page + 1) * PAGE] = content(seed, PAGE)

    # ---- what must make no difference --------------------------------------------------------------

    @rule()
    def msync(self) -> None:
        self.shared.flush()

    @rule()
    def fsync(self) -> None:
        os.fsync(self.fd)

    @rule()
    def drop_the_page_cache(self) -> None:
        os.fsync(self.fd)
        self.shared.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @rule()
    def open_again(self) -> None:
        self._close()
        self._open()

    @rule()
    def prefetch(self) -> None:
        self.mounted.ctl("prefetch")

    @rule()
    def restore(self) -> None:
        self.mounted.ctl("restore")

    @rule()
    def save(self) -> None:
        self.mounted.ctl("save")
        self._saved()
        self._assert_saved(self.path)

    @rule()
    def save_elsewhere(self) -> None:
        self.saves += 1
        other = self.directory / f"other{self.saves}"
        self.mounted.ctl(f"save {other}")
        self._saved()
        self._assert_saved(other)
        other.unlink()  # it is the base now, and stays one without a name

    def _assert_saved(self, path: Path) -> None:
        saved = decode(path)
        assert saved.blocks["pc.ram"].tobytes() == self.base
        assert b"timer" in saved.device_sections

    # ---- what takes back ---------------------------------------------------------------------------

    @rule()
    def reset(self) -> None:
        self._close()
        self.mounted.ctl("reset")
        self.model[:] = self.base
        self._open()

    @precondition(lambda self: not self.mounted_again)
    @rule()
    def mount_again(self) -> None:
        """What was not saved is gone. Once an example, as it takes as long as all else."""
        self.mounted_again = True
        self.mounted.ctl("save")
        self._saved()
        os.pwrite(self.fd, b"not saved", 0)
        self._close()
        self.mounted.umount()
        self._mount()

    @rule()
    def pages_add_up(self) -> None:
        states = np.fromfile(self.mounted.path / "pages/pc.ram", np.uint8)
        status = self.mounted.status()
        counts = [status[key] for key in ("zero-pages", "checkpoint-pages", "read-pages", "written-pages")]
        assert sum(counts) == PAGE_COUNT == states.size
        for page in np.flatnonzero(states == 0):
            assert not any(self.model[page * PAGE : (page + 1) * PAGE]) or self._dirty_in_the_kernel(page)

    def _dirty_in_the_kernel(self, page: int) -> bool:
        """A page that was stored to may not have been written back yet."""
        os.fsync(self.fd)
        with (self.mounted.path / "pages/pc.ram").open("rb") as file:
            return file.read()[page] == 3

    def teardown(self) -> None:
        if not hasattr(self, "mounted"):
            return
        try:
            assert os.pread(self.fd, LENGTH, 0) == self.model
            assert self.shared[:] == self.model
            self._close()
        finally:
            self.mounted.clean_up()
            self._directory.cleanup()


def test_ram_is_what_the_model_has() -> None:
    run_state_machine_as_test(
        RAM,
        settings=settings(
            max_examples=10,
            stateful_step_count=60,
            phases=[Phase.explicit, Phase.generate],  # each attempt to shrink a failure would be mounts anew
            suppress_health_check=list(HealthCheck),
        ),
    )


# ---- several programs at once ----------------------------------------------------------------------

# Goes every way into bytes [start, stop) of RAM, which are its own, and looks each time whether they are what it
# has read or written before; until its stdin is closed. Its last word is what they are then.
PROGRAM = """
import hashlib, mmap, os, random, select, sys

path, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(start)
fd = os.open(path, os.O_RDWR)
shared = mmap.mmap(fd, 0)
model = bytearray(sys.stdin.buffer.read(stop - start))
steps = 0
while not select.select([0], [], [], 0)[0]:
    first = random.randrange(start, stop)
    last = min(stop, first + random.choice([1, 4096, 70000, 300000]))
    mine = slice(first - start, last - start)
    way = random.randrange(6)
    if way == 0:
        assert os.pread(fd, last - first, first) == model[mine], (steps, first, last)
    elif way == 1:
        assert shared[first:last] == model[mine], (steps, first, last)
    elif way == 2:
        model[mine] = random.randbytes(last - first)
        assert os.pwrite(fd, model[mine], first) == last - first
    elif way == 3:
        model[mine] = random.randbytes(last - first)
        shared[first:last] = bytes(model[mine])
    elif way == 4:
        os.fsync(fd)
    else:
        os.posix_fadvise(fd, first, last - first, os.POSIX_FADV_DONTNEED)
    steps += 1
assert os.pread(fd, stop - start, start) == model
print(steps, hashlib.sha256(model).hexdigest())
"""


@contextmanager
def program(ram: Path, start: int, stop: int) -> Iterator[subprocess.Popen[bytes]]:
    """`PROGRAM` on a part of golden RAM."""
    command = [sys.executable, "-c", PROGRAM, ram, str(start), str(stop)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        try:
            assert process.stdin is not None
            process.stdin.write(golden()[start:stop])
            yield process
        finally:
            process.kill()


def golden() -> bytes:
    return b"".join(GOLDEN.get(page, bytes(PAGE)) for page in range(PAGE_COUNT))


def test_ram_is_what_programs_have_while_it_is_saved_and_restored(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", PAGE_COUNT, GOLDEN, STALE)]).write(path)
    mounted = mount(path)
    borders = [0, LENGTH // 3 + 1000, LENGTH // 2 + 3, LENGTH]  # amid pages: two programs share one
    with ExitStack() as stack:
        programs = [
            stack.enter_context(program(mounted.ram / "pc.ram", start, stop)) for start, stop in pairwise(borders)
        ]
        for command in ("save", f"save {tmp_path / 'other'}", "prefetch", "save", "restore", "save", "save"):
            mounted.ctl(command)
        ends = [process.communicate(timeout=DEADLINE)[0].split() for process in programs]
    assert all(int(steps) > 0 for steps, _ in ends)
    mounted.ctl("save")
    saved = decode(path).blocks["pc.ram"].tobytes()
    parts = [saved[start:stop] for start, stop in pairwise(borders)]
    assert [hashlib.sha256(part).hexdigest().encode() for part in parts] == [digest for _, digest in ends]
