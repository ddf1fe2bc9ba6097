"""RAM blocks as buffers, filled when they are looked at; and physical memory made of them."""

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.physical.look import Place, physical, seen
from ckptfs.physical.memory_map import MemoryMap, Region

Pages = npt.NDArray[np.uint8]

_READ_LENGTH = 4 << 20
_MAP_NORESERVE = 0x4000
"""Of Linux; the module mmap has it since Python 3.13."""


class Block:
    """One RAM block, read-only. ``block[start:stop]`` is a numpy array of its bytes.

    Where a file can be mapped, that is a view of the file: nothing is copied, and the kernel reads a page when it
    is touched. Elsewhere its pages are read at that moment, and kept. ``numpy.asarray(block)`` is all of it.
    """

    def __init__(
        self,
        idstr: str,
        page_size: int,
        with_data: PagesBitmap,
        read_pages: Callable[[int, int], Pages],
        mapped: Callable[[], Pages | None] = lambda: None,
    ) -> None:
        """``with_data`` are the pages that may be other than zeros, ``read_pages`` reads pages ``start`` to
        ``stop``; ``mapped`` maps all of it, if it can.
        """
        self.idstr = idstr
        """QEMU's name of it."""
        self.page_size = page_size
        """Bytes of a page."""
        self.with_data = with_data
        """The pages that may be other than zeros."""
        self.read_pages = read_pages
        """Reads pages ``start`` to ``stop``, as a new array."""
        self._mapped = mapped

    @property
    def page_count(self) -> int:
        """How many pages it has."""
        return self.with_data.page_count

    def __len__(self) -> int:
        """Its size in bytes."""
        return self.page_count * self.page_size

    def __getitem__(self, part: slice) -> Pages:
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise TypeError("a part of a block is [start:stop]")
        start, stop, _ = part.indices(len(self))
        if self._whole is not None:
            return self._whole[start:stop]
        return self._filled.part(start, max(start, stop))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self[:], dtype=dtype, copy=copy)

    def read(self, offset: int, length: int) -> bytes:
        """A copy of ``length`` bytes from ``offset`` on; fewer only where the block ends.

        Raises StorageError, CheckpointError or OSError for what can't be read; a mapped array would be SIGBUS then.
        """
        stop = min(offset + length, len(self))
        if offset >= stop:
            return b""
        parts = []
        for start in range(offset, stop, _READ_LENGTH):
            end = min(start + _READ_LENGTH, stop)
            first = start // self.page_size
            pages = self.read_pages(first, -(-end // self.page_size))
            parts.append(pages[start - first * self.page_size : end - first * self.page_size].tobytes())
        return b"".join(parts)

    def has_data(self) -> npt.NDArray[np.bool_]:
        """For each page, whether it may hold anything but zeros."""
        return self.with_data.expand(0, self.page_count).view(np.bool_)

    def __repr__(self) -> str:
        return f"<Block {self.idstr!r}: {len(self)} bytes, {self.with_data.count()} pages with data>"

    @cached_property
    def _whole(self) -> Pages | None:
        return self._mapped()

    @cached_property
    def _filled(self) -> "_Filled":
        return _Filled(self)


class _Filled:
    """Memory of our own that is filled with the pages that somebody looks at."""

    def __init__(self, block: Block) -> None:
        self._block = block
        memory = mmap.mmap(-1, max(len(block), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self._pages = np.frombuffer(memory, np.uint8)[: len(block)]
        self._shown = self._pages.view()
        self._shown.flags.writeable = False
        self._missing = block.with_data.copy()

    def part(self, start: int, stop: int) -> Pages:
        """Bytes ``start`` to ``stop``."""
        page_size, most = self._block.page_size, _READ_LENGTH // self._block.page_size
        for run in list(self._missing.runs(start // page_size, -(-stop // page_size))):
            for first in range(run.start, run.stop, most):
                last = min(first + most, run.stop)
                self._pages[first * page_size : last * page_size] = self._block.read_pages(first, last)
                self._missing.clear(first, last)
        return self._shown[start:stop]


@dataclass(frozen=True)
class PhysicalMemory:
    """Memory by guest-physical address, made of blocks."""

    map: MemoryMap
    blocks: Mapping[str, Block]

    @property
    def regions(self) -> tuple[Region, ...]:
        """Where RAM is, in ascending order: (start, length, idstr, block_offset) each."""
        return self.map.regions

    def read(self, address: int, length: int) -> bytes:
        """Bytes from ``address`` on. Raises CheckpointError where there is no RAM; what a block's `read` does."""
        return seen(physical(self.map, address, length), self._read)

    def places(self, idstr: str, block_offset: int, length: int) -> Iterator[tuple[int, int, int | None]]:
        """Where bytes of a block are seen: (block_offset, length, address) of each piece, None if nowhere."""
        stop = block_offset + length
        regions = [region for region in self.regions if region.idstr == idstr]
        for region in sorted(regions, key=lambda region: region.block_offset):
            start, end = max(region.block_offset, block_offset), min(region.block_offset + region.length, stop)
            if start >= end:
                continue
            if block_offset < start:
                yield block_offset, start - block_offset, None
            yield start, end - start, region.start + start - region.block_offset
            block_offset = end
        if block_offset < stop:
            yield block_offset, stop - block_offset, None

    def _read(self, place: Place) -> bytes:
        return read_place(self.blocks, place)


def read_place(blocks: Mapping[str, Block], place: Place) -> bytes:
    """The bytes that a look asks for."""
    if place.idstr not in blocks:
        raise CheckpointError(f"the RAM of {place.idstr} is not in the file")
    return blocks[place.idstr].read(place.block_offset, place.length)
