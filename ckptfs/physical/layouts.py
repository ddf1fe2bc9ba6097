"""Files made of memory: which bytes of a file are a head, which are RAM, and which are zeros.

A flat image, an ELF core and LiME's format are all of this kind: extents in the order of the file, and zeros in
between. Whoever serves or writes one asks for its pieces, and reads RAM wherever that is.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ckptfs.physical import lime
from ckptfs.physical.elf_core import Core
from ckptfs.physical.memory_map import MemoryMap, Region

Content = bytes | Region | None
"""Bytes as they are, a part of a RAM block, or zeros."""


class Extent(NamedTuple):
    """What a file has from ``file_offset`` on."""

    file_offset: int
    length: int
    content: bytes | Region


@dataclass(frozen=True)
class Layout:
    """A file of ``length`` bytes; extents are in ascending order and do not overlap."""

    extents: tuple[Extent, ...]
    length: int

    @property
    def has_memory(self) -> bool:
        """Whether any of it is RAM; otherwise it is a text, and stays as it was made."""
        return any(isinstance(extent.content, Region) for extent in self.extents)

    @property
    def memory(self) -> MemoryMap:
        """All RAM that is in it, by physical address."""
        regions = [extent.content for extent in self.extents if isinstance(extent.content, Region)]
        return MemoryMap(tuple(sorted(regions)), "a file made of it")

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, Content]]:
        """Cut bytes from ``offset`` on, up to the end of the file, into pieces: how long each is, and what."""
        stop = min(offset + length, self.length)
        index = max(bisect_right(self.extents, offset, key=lambda extent: extent.file_offset) - 1, 0)
        while offset < stop:
            extent = self.extents[index] if index < len(self.extents) else Extent(stop, 0, b"")
            if offset >= extent.file_offset + extent.length and extent.file_offset < stop:
                index += 1
                continue
            if offset < extent.file_offset:
                end = min(stop, extent.file_offset)
                yield end - offset, None
            else:
                end = min(stop, extent.file_offset + extent.length)
                yield end - offset, _part(extent, offset - extent.file_offset, end - offset)
            offset = end


def _part(extent: Extent, skip: int, length: int) -> bytes | Region:
    if isinstance(extent.content, bytes):
        return extent.content[skip : skip + length]
    region = extent.content
    return Region(region.start + skip, length, region.idstr, region.block_offset + skip)


def text(words: str) -> Layout:
    """A file of text; what is no text in names of blocks stays what it was."""
    data = words.encode("utf-8", "surrogateescape")
    return Layout((Extent(0, len(data), data),), len(data))


def flat(memory: MemoryMap) -> Layout:
    """Memory by its physical address."""
    return Layout(tuple(Extent(region.start, region.length, region) for region in memory.regions), memory.stop)


def core(built: Core, memory: MemoryMap) -> Layout:
    """An ELF core."""
    data = zip(built.segments, memory.regions, strict=True)
    extents = [Extent(segment.file_offset, segment.length, region) for segment, region in data]
    return Layout((Extent(0, len(built.head), built.head), *extents), built.length)


def lime_image(memory: MemoryMap) -> Layout:
    """LiME's format: a header before each region."""
    extents: list[Extent] = []
    position = 0
    for head, region in lime.headers(memory):
        extents += [Extent(position, len(head), head), Extent(position + len(head), region.length, region)]
        position += len(head) + region.length
    return Layout(tuple(extents), position)
