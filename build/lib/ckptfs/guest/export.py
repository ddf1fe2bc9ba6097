"""Writing memory in another form: a layout's bytes, put where they go, and nothing where there is nothing.

What has no data is neither read nor written. A file gets holes there, a pipe zeros.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import trio

from ckptfs.channels.output import Output
from ckptfs.guest.guest import Guest
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.physical.layouts import Layout
from ckptfs.physical.memory_map import Region

PIECE_LENGTH = 1 << 20
"""Bytes that are read and written at once."""

_WORKERS = 4


class Memory(Protocol):
    """Where the RAM of a layout is."""

    page_size: int
    """In bytes."""

    @property
    def with_data(self) -> Mapping[str, PagesBitmap]:
        """The pages of each block that may be other than zero, by idstr."""
        ...

    async def read(self, region: Region) -> memoryview:
        """All bytes of a region of up to `PIECE_LENGTH`. Raises StorageError for a page that can't be read."""
        ...


class GuestMemory:
    """The RAM of a guest that is not mounted."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self.page_size = guest.page_size
        self.with_data = {idstr: block.stack.with_data() for idstr, block in guest.blocks.items()}

    async def read(self, region: Region) -> memoryview:
        """As FUSE reads it."""
        return await self._guest.read(self._guest.blocks[region.idstr], region.block_offset, region.length)


@dataclass
class Exported:
    """How it goes, in bytes of RAM that has data."""

    total: int = 0
    done: int = 0


async def write_layout(layout: Layout, memory: Memory, output: Output, exported: Exported) -> None:
    """Write all of ``layout`` to ``output``: what is RAM comes from ``memory``, in order where it has to.

    Nothing is durable yet when this returns. Raises StorageError or OSError.
    """
    pieces = [(place, content) for place, content in _pieces(layout, memory)]
    exported.total = sum(len(content) if isinstance(content, bytes) else content.length for _, content in pieces)
    queue = iter(pieces)

    async def write_some() -> None:
        for file_offset, content in queue:
            data = memoryview(content) if isinstance(content, bytes) else await memory.read(content)
            await trio.to_thread.run_sync(output.write, file_offset, data, abandon_on_cancel=output.is_stream)
            exported.done += len(data)

    async with trio.open_nursery() as nursery:
        for _ in range(1 if output.is_stream else _WORKERS):
            nursery.start_soon(write_some)
    await trio.to_thread.run_sync(output.end, layout.length, abandon_on_cancel=output.is_stream)


def _pieces(layout: Layout, memory: Memory) -> Iterator[tuple[int, bytes | Region]]:
    """What of a layout may be other than zeros, each with its place in the file, in order."""
    for extent in layout.extents:
        if isinstance(extent.content, bytes):
            yield extent.file_offset, extent.content
            continue
        for block_offset, length in _with_data(extent.content, memory):
            skip = block_offset - extent.content.block_offset
            region = Region(extent.content.start + skip, length, extent.content.idstr, block_offset)
            yield extent.file_offset + skip, region


def _with_data(region: Region, memory: Memory) -> Iterator[tuple[int, int]]:
    """The pieces of a region that hold data: block offset and length."""
    page_size, pages = memory.page_size, memory.with_data[region.idstr]
    end = region.block_offset + region.length
    stop = -(-end // page_size)
    page = region.block_offset // page_size
    while page < stop:
        has_data, run_stop = pages.run_at(page, stop)
        if has_data:
            run_stop = min(page + PIECE_LENGTH // page_size, stop)  # with what is zero in there: few large reads
            start = max(page * page_size, region.block_offset)
            yield start, min(run_stop * page_size, end) - start
        page = run_stop
