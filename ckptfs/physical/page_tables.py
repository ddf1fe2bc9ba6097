"""The kernel's half of an x86-64 address space, out of its page tables (Intel SDM volume 3A, 4.5).

The guest wrote these tables, and may have written anything: a table is read once at each level, entries that point
outside of RAM are passed over, and the number of ranges is limited.

No I/O happens here: `kernel_ranges` is a generator that yields the addresses of the tables it wants, is sent their
contents, and returns the ranges.
"""

import contextlib
from collections.abc import Generator

import numpy as np
import numpy.typing as npt

from ckptfs.errors import CheckpointError
from ckptfs.physical.elf_core import MAX_SEGMENTS, LoadedRange
from ckptfs.physical.memory_map import MemoryMap
from ckptfs.physical.registers import Registers

TABLE_LENGTH = 4096
MAX_TABLES = 1 << 14
"""A kernel has some hundred: a table for each GiB that it maps in pieces of 2 MiB, and some below."""

LA57 = 1 << 12
_USER_TABLES = 1 << 12
"""With page table isolation a program's tables lack the kernel; its own are the page before them (Linux,
PTI_USER_PGTABLE_BIT in arch/x86/include/asm/pgtable.h)."""

_PRESENT = 1
_LARGE = 1 << 7
_ALL_BITS = (1 << 64) - 1
_ADDRESS = (1 << 52) - (1 << 12)

TableWalk = Generator[int, bytes, list[LoadedRange]]


def kernel_ranges(registers: Registers, memory: MemoryMap) -> TableWalk:
    """Walk the upper half of the tables at CR3: yields a table's address, takes its `TABLE_LENGTH` bytes.

    Returns ranges that are whole in one region of ``memory``, in ascending order of their virtual address. Raises
    CheckpointError for tables that have no end.
    """
    levels = 5 if registers.cr[4] & LA57 else 4
    signs = _ALL_BITS & -(1 << 12 + 9 * levels)  # the bits above those that the tables translate
    root = registers.cr[3] & _ADDRESS
    walk = _Walk(memory)
    yield from walk.table(root, levels, signs, first=256)
    if registers.is_user and root & _USER_TABLES:
        kernel = _Walk(memory)
        with contextlib.suppress(CheckpointError):  # without isolation, what lies there may be anything
            yield from kernel.table(root & ~_USER_TABLES, levels, signs, first=256)
            return max(walk.ranges(), kernel.ranges(), key=lambda ranges: sum(one.length for one in ranges))
    return walk.ranges()


class _Walk:
    def __init__(self, memory: MemoryMap) -> None:
        self._memory = memory
        self._left = MAX_TABLES
        self._found: list[LoadedRange] = []

    def table(self, address: int, level: int, virtual: int, first: int = 0) -> Generator[int, bytes, None]:
        """Read the table of ``level`` (1: its entries are pages) for what begins at ``virtual``."""
        if not self._is_ram(address, TABLE_LENGTH):
            return
        self._left -= 1
        if self._left < 0:
            raise CheckpointError(f"the page tables of the guest are more than {MAX_TABLES}")
        data = yield address
        entries = np.frombuffer(data, "<u8")
        shift = 12 + 9 * (level - 1)
        leaves, tables = _split(entries, level, first)
        self._add_leaves(entries, leaves, shift, virtual)
        for index in tables.tolist():
            yield from self.table(int(entries[index]) & _ADDRESS, level - 1, virtual + (index << shift))

    def _add_leaves(
        self, entries: npt.NDArray[np.uint64], indexes: npt.NDArray[np.int64], shift: int, virtual: int
    ) -> None:
        """Add pages of 1 << shift bytes, neighbours in one range."""
        if not indexes.size:
            return
        length = 1 << shift
        physical = (entries[indexes] & np.uint64(_ADDRESS & ~(length - 1))).astype(np.int64)
        follows = (np.diff(indexes) == 1) & (np.diff(physical) == length)
        starts = np.flatnonzero(np.concatenate(([True], ~follows)))
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), indexes.size], strict=True):
            self._add(virtual + (int(indexes[start]) << shift), int(physical[start]), (stop - start) << shift)

    def _add(self, virtual: int, physical: int, length: int) -> None:
        """Add what is in RAM of a range, joined to the last one where it goes on there."""
        for piece, region in self._memory.pieces(physical, length):
            if region is not None:
                self._append(LoadedRange(virtual, physical, piece))
            virtual, physical = virtual + piece, physical + piece

    def _append(self, found: LoadedRange) -> None:
        last = self._found[-1] if self._found else LoadedRange(0, 0, 0)
        joined = last._replace(length=last.length + found.length)
        if found[:2] == (last.virtual + last.length, last.physical + last.length) and self._is_ram(*joined[1:]):
            self._found[-1] = joined
            return
        if len(self._found) >= MAX_SEGMENTS:
            raise CheckpointError(f"the page tables of the guest map more than {MAX_SEGMENTS} ranges")
        self._found.append(found)

    def _is_ram(self, address: int, length: int) -> bool:
        """Whether all of it is in one region."""
        pieces = list(self._memory.pieces(address, length))
        return len(pieces) == 1 and pieces[0][1] is not None

    def ranges(self) -> list[LoadedRange]:
        return sorted(self._found)


def _split(
    entries: npt.NDArray[np.uint64], level: int, first: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The indexes, from ``first`` on, of entries that are pages, and of those that are tables."""
    present = (entries & np.uint64(_PRESENT)) != 0
    present[:first] = False
    if level == 1:
        return np.flatnonzero(present), np.empty(0, np.int64)
    large = (entries & np.uint64(_LARGE)) != 0 if level in (2, 3) else np.zeros(entries.size, np.bool_)
    return np.flatnonzero(present & large), np.flatnonzero(present & ~large)
