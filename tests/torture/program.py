"""One of many programs that use the same RAM at once, in every way a program has. Run with a JSON of its `Part`.

It owns a range of bytes that begins and ends anywhere, so that others write into its first and last page. What it
does comes from its seed alone, a step at a time. After each step it stores the step's number into its slot, through
a mapping, and then the number that it sees in somebody else's slot. So a checkpoint tells which step was its last,
what its range has to hold then, and whether somebody knew of a step that is not there.

It prints "ready", runs until its stdin is closed, looks whether all is as it left it, and prints how many steps it
did.
"""

import contextlib
import ctypes
import json
import mmap
import os
import select
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

PAGE = 4096
SLOT = struct.Struct("<Q")
NUMBER_OF_PROGRAMS = 6
SLOTS_LENGTH = NUMBER_OF_PROGRAMS * (NUMBER_OF_PROGRAMS + 1) * SLOT.size
"""Bytes at the beginning of RAM: for each program its last step, and what it has seen of the others'."""


@dataclass(frozen=True)
class Part:
    """What a program knows: the file, its bytes [start, stop) of it, its number among all, its seed."""

    path: str
    start: int
    stop: int
    number: int
    seed: int

    @property
    def slot(self) -> int:
        """Where its last step's number is."""
        return slot_of(self.number)

    def seen_slot(self, other: int) -> int:
        """Where the last step is that it has seen of another program's."""
        return self.slot + (1 + other) * SLOT.size


def slot_of(number: int) -> int:
    """Where the number of a program's last step is."""
    return number * (NUMBER_OF_PROGRAMS + 1) * SLOT.size


@dataclass(frozen=True)
class Step:
    """``way`` names a method of `Program`; bytes [start, stop) are concerned; ``data`` is what is written."""

    way: str
    start: int
    stop: int
    data: bytes = b""
    source: int = 0
    """Where what is copied to [start, stop) comes from."""
    other: int = 0
    """Whose slot is looked at afterwards."""

    def apply(self, model: bytearray, part: Part) -> None:
        """Do to a model of the part what this does to RAM."""
        if self.way.startswith("copy"):
            length = self.stop - self.start
            at = self.source - part.start
            model[self.start - part.start : self.stop - part.start] = bytes(model[at : at + length])
        elif self.data:
            model[self.start - part.start : self.stop - part.start] = self.data


WRITES = ("write", "write_direct", "store", "store_few", "write_many")
COPIES = ("copy_file_range", "copy_by_splice", "copy_by_write", "copy_by_store")
OTHERS = (
    "read",
    "read_direct",
    "load",
    "msync",
    "fsync",
    "fallocate",
    "open_again",
    "map_again",
    "drop_mapping",
    "drop_cache",
)
RARE = ("truncate",)
WAYS = (*WRITES * 20, *COPIES * 8, *OTHERS * 8, *RARE)


def steps(part: Part) -> Iterator[Step]:
    """What a program does, for ever."""
    random = Random(part.seed)
    while True:
        way = random.choice(WAYS)
        longest = random.choice([1, 8, 100, 1000, PAGE, 2 * PAGE, 30_000, 200_000])
        length = random.randint(1, min(longest, part.stop - part.start))
        start = random.randrange(part.start, part.stop - length + 1)
        stop = start + length
        if way.endswith("_direct"):
            start, stop = _aligned(start, part)
        if way == "store_few":
            stop = min(stop, start + 8)
        data = random.randbytes(stop - start) if way in WRITES else b""
        source = random.randrange(part.start, part.stop - (stop - start) + 1)
        yield Step(way, start, stop, data, source, random.randrange(NUMBER_OF_PROGRAMS))


def _aligned(start: int, part: Part) -> tuple[int, int]:
    """A page that is the program's own as a whole."""
    page = max(-(-part.start // PAGE), min(start // PAGE, part.stop // PAGE - 1))
    return page * PAGE, (page + 1) * PAGE


class Program:
    """The ways to use a file; every one that reads sees to it that it reads what it should."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._file = os.open(part.path, os.O_RDWR)
        self._model = bytearray(os.pread(self._file, part.stop - part.start, part.start))
        self._direct = os.open(part.path, os.O_RDWR | os.O_DIRECT)
        self._length = os.fstat(self._file).st_size
        self._memory = mmap.mmap(self._file, self._length)
        self._buffer = mmap.mmap(-1, PAGE)
        self._pipe = os.pipe()

    def run(self, go_on: Callable[[], bool]) -> int:
        """Do steps while ``go_on``; return how many."""
        for number, step in enumerate(steps(self._part), 1):
            getattr(self, step.way)(step)
            step.apply(self._model, self._part)
            self._note(step, number)
            if not go_on():
                break
        self._expect("the end", self._part.start, os.pread(self._file, len(self._model), self._part.start))
        return number

    def _note(self, step: Step, number: int) -> None:
        """Store what was done and seen, each at once: Struct.pack_into would clear the bytes first."""
        with memoryview(self._memory) as memory, memory.cast("Q") as slots:
            slots[self._part.slot // SLOT.size] = number
            slots[self._part.seen_slot(step.other) // SLOT.size] = slots[slot_of(step.other) // SLOT.size]

    def _expect(self, way: str, start: int, found: bytes) -> None:
        expected = self._model[start - self._part.start : start - self._part.start + len(found)]
        if found != expected:
            at = next(n for n, (x, y) in enumerate(zip(found, expected, strict=True)) if x != y)
            raise AssertionError(
                f"{way}: byte {start + at:#x} is {found[at : at + 8].hex()}, not {expected[at : at + 8].hex()}"
            )

    def read(self, step: Step) -> None:
        self._expect("read", step.start, os.pread(self._file, step.stop - step.start, step.start))

    def read_direct(self, step: Step) -> None:
        os.preadv(self._direct, [self._buffer], step.start)
        self._expect("read_direct", step.start, self._buffer[:])

    def load(self, step: Step) -> None:
        self._expect("load", step.start, self._memory[step.start : step.stop])

    def write(self, step: Step) -> None:
        self._write_all(step.data, step.start)

    def _write_all(self, data: bytes | memoryview, start: int) -> None:
        rest = memoryview(data)
        while rest:
            count = os.pwrite(self._file, rest, start)
            start, rest = start + count, rest[count:]

    def write_many(self, step: Step) -> None:
        half = len(step.data) // 2
        os.pwritev(self._file, [step.data[:half], step.data[half:]], step.start)

    def write_direct(self, step: Step) -> None:
        self._buffer[:] = step.data
        os.pwritev(self._direct, [self._buffer], step.start)

    def store(self, step: Step) -> None:
        self._memory[step.start : step.stop] = step.data

    store_few = store

    def copy_file_range(self, step: Step) -> None:
        source, at, left = step.source, step.start, step.stop - step.start
        if source < step.stop and step.start < source + left:  # the kernel refuses what overlaps
            self.copy_by_write(step)
            return
        while left:
            count = os.copy_file_range(self._file, self._file, left, source, at)
            source, at, left = source + count, at + count, left - count

    def copy_by_splice(self, step: Step) -> None:
        if step.source < step.stop and step.start < step.source + (step.stop - step.start):
            self.copy_by_write(step)  # the pipe holds pages, not copies: what overlaps is anything
            return
        reading, writing = self._pipe
        source, at, left = step.source, step.start, step.stop - step.start
        while left:
            count = os.splice(self._file, writing, min(left, 1 << 15), offset_src=source)
            done = 0
            while done < count:
                done += os.splice(reading, self._file, count - done, offset_dst=at + done)
            source, at, left = source + count, at + count, left - count

    def copy_by_write(self, step: Step) -> None:
        length = step.stop - step.start
        if step.source < step.stop and step.start < step.source + length:
            self._write_all(self._memory[step.source : step.source + length], step.start)
        else:  # out of the mapping: the kernel faults while it holds the inode
            with memoryview(self._memory) as memory:
                self._write_all(memory[step.source : step.source + length], step.start)

    def copy_by_store(self, step: Step) -> None:
        self._memory[step.start : step.stop] = self._memory[step.source : step.source + step.stop - step.start]

    def msync(self, step: Step) -> None:
        start = step.start // PAGE * PAGE
        self._memory.flush(start, step.stop - start)

    def fsync(self, step: Step) -> None:
        os.fsync(self._file)

    def fallocate(self, step: Step) -> None:
        with contextlib.suppress(OSError):
            os.posix_fallocate(self._direct, self._length, PAGE)

    def truncate(self, step: Step) -> None:
        for length in (0, self._length + PAGE):
            try:
                os.ftruncate(self._file, length)
            except OSError:
                continue
            raise AssertionError(f"truncate to {length} was not refused")

    def open_again(self, step: Step) -> None:
        os.close(self._file)
        self._file = os.open(self._part.path, os.O_RDWR)

    def map_again(self, step: Step) -> None:
        self._memory.close()
        self._memory = mmap.mmap(self._file, self._length)

    def drop_mapping(self, step: Step) -> None:
        start = step.start // PAGE * PAGE
        self._memory.madvise(mmap.MADV_DONTNEED, start, step.stop - start)

    def drop_cache(self, step: Step) -> None:
        os.posix_fadvise(self._file, step.start, step.stop - step.start, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Run the part that the only argument describes."""
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: nobody would close stdin any more
    program = Program(Part(**json.loads(sys.argv[1])))
    print("ready", flush=True)
    print(program.run(lambda: not select.select([0], [], [], 0)[0]), flush=True)


if __name__ == "__main__":
    main()
