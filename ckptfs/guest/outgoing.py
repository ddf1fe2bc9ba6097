"""Writing a checkpoint: what one epoch holds, through multifd channels, into a mapped-ram file.

Every chunk of 256 pages is one payload: its pages come straight out of the memory that holds them or, where
only the base has them, through a buffer; zero pages are found and left as holes; the rest goes out in runs.
Bitmaps come last, as QEMU writes them, and the stream's header very last.
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import trio

from ckptfs.channels.backing_file import BackingFile, DirectIO, pwrite_all
from ckptfs.channels.channels import Channel, Channels
from ckptfs.guest.base import Base
from ckptfs.guest.block import Content, PageStack, Segment
from ckptfs.guest.layer import Layer
from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.mapped_ram.layout import Image, layout
from ckptfs.migration.outgoing import coalesce, nonzero_pages, page_chunks
from ckptfs.migration.parameters import ZeroPageDetection


@dataclass(frozen=True)
class Epoch:
    """RAM as it was at one moment: one frozen stack a block, and the base below them.

    ``carried`` are the blocks whose content the machine handed over: they are not frozen, but copies.
    """

    stacks: dict[str, PageStack]
    base: Base | None
    carried: frozenset[str] = frozenset()


@dataclass
class Progress:
    """Counts of a running save, in pages and bytes."""

    total_pages: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    remaining_pages: int = 0
    transferred: int = 0


@dataclass(frozen=True)
class SaveOptions:
    """The migration parameters that a save goes by."""

    channel_count: int
    direct_io: DirectIO
    zero_page_detection: ZeroPageDetection
    wait_for_bandwidth: Callable[[int], Awaitable[None]]
    """Returns when a payload of so many bytes may go, and counts them."""
    charge: Callable[[int], None]
    """Corrects the count."""


@dataclass(frozen=True)
class Written:
    """What is left to do: the stream's header, position and bytes; and whether pages bypassed the page cache."""

    header: tuple[int, bytes]
    direct_io: bool


@dataclass(frozen=True)
class _OutgoingBlock:
    """A block of the file that is being written: where its pages go, and which have gone."""

    pages_offset: int
    file_bmap: PagesBitmap


@dataclass(frozen=True)
class _Chunk:
    """One payload: pages of one block, all inside one aligned window."""

    idstr: str
    runs: tuple[Run, ...]


async def write_checkpoint(
    file: BackingFile, stream_offset: int, image: Image, epoch: Epoch, options: SaveOptions, progress: Progress
) -> Written:
    """Write ``epoch`` into ``file``, all but the stream's header; nothing is durable yet when this returns.

    Raises OSError, StorageError, or BadPagesError for a page of the base that can't be read.
    """
    plan = layout(image, stream_offset)
    kept = [block for block in plan.blocks if not block.ignored]
    blocks = {block.idstr: _OutgoingBlock(block.pages_offset or 0, PagesBitmap(block.page_count)) for block in kept}
    await trio.to_thread.run_sync(_write_extents, file.fd, plan.extents[1:])
    channels = await trio.to_thread.run_sync(Channels.open, file, options.direct_io, options.channel_count)
    try:
        with_data = {idstr: epoch.stacks[idstr].with_data() for idstr in blocks}
        progress.total_pages = sum(bitmap.page_count for bitmap in with_data.values())
        progress.remaining_pages = sum(bitmap.count() for bitmap in with_data.values())
        progress.zero_pages = progress.total_pages - progress.remaining_pages
        chunks = (_Chunk(idstr, runs) for idstr, bitmap in with_data.items() for runs in page_chunks(bitmap))
        async with trio.open_nursery() as nursery:
            for _ in range(channels.channel_count):
                nursery.start_soon(
                    _write_chunks, chunks, channels, blocks, image.page_size, epoch, options, progress
                )
    finally:
        channels.close()
    bitmaps = [
        (block.bitmap_offset or 0, blocks[block.idstr].file_bmap.to_bytes(image.bitmap_byteorder)) for block in kept
    ]
    await trio.to_thread.run_sync(_write_extents, file.fd, bitmaps)
    return Written(plan.header, channels.direct_io)


async def _write_chunks(
    chunks: Iterator[_Chunk],
    channels: Channels,
    blocks: dict[str, _OutgoingBlock],
    page_size: int,
    epoch: Epoch,
    options: SaveOptions,
    progress: Progress,
) -> None:
    """Carry chunks until none is left; as many of these tasks run as there are channels."""
    for chunk in chunks:
        pieces = await _pieces(chunk, page_size, epoch)
        length = sum(len(view) for _, view in pieces)
        if options.zero_page_detection is ZeroPageDetection.LEGACY:
            pieces = list(_nonzero_pieces(pieces, page_size))
        await options.wait_for_bandwidth(length)
        payload = partial(
            _write_pieces,
            pieces=pieces,
            block=blocks[chunk.idstr],
            page_size=page_size,
            detect_zero_pages=options.zero_page_detection is ZeroPageDetection.MULTIFD,
        )
        normal_pages = await channels.carry(payload)
        options.charge(normal_pages * page_size - length)  # zero pages cost nothing
        page_count = length // page_size
        progress.normal_pages += normal_pages
        progress.zero_pages += page_count - normal_pages
        progress.remaining_pages -= page_count
        progress.transferred += normal_pages * page_size


async def _pieces(chunk: _Chunk, page_size: int, epoch: Epoch) -> list[tuple[int, memoryview]]:
    """Return (first page, bytes) for all of a chunk, in order; what only the base has is read first."""
    stack = epoch.stacks[chunk.idstr]
    segments = [segment for run in chunk.runs for segment in stack.segments(*run)]
    in_base = [segment for segment in segments if segment.source is Content.BASE]
    window = memoryview(b"")
    if in_base:
        assert epoch.base is not None
        window = await epoch.base.fetch(chunk.idstr, in_base[0].start, in_base[-1].stop, page_size, urgent=False)

    def view(segment: Segment) -> memoryview:
        if isinstance(segment.source, Layer):
            return segment.source.view(segment.start, segment.stop)
        first = in_base[0].start
        return window[(segment.start - first) * page_size : (segment.stop - first) * page_size]

    return [(segment.start, view(segment)) for segment in segments]


def _write_pieces(
    channel: Channel,
    *,
    pieces: list[tuple[int, memoryview]],
    block: _OutgoingBlock,
    page_size: int,
    detect_zero_pages: bool,
) -> int:
    """Write the pages that are not zero and mark them; return how many they were. Runs in a worker thread."""
    normal_pages = 0
    if detect_zero_pages:
        pieces = list(_nonzero_pieces(pieces, page_size))
    for page, views in _contiguous(pieces, page_size):
        channel.pwritev_all(views, block.pages_offset + page * page_size)
        page_count = sum(map(len, views)) // page_size
        block.file_bmap.set(page, page + page_count)
        normal_pages += page_count
    return normal_pages


def _nonzero_pieces(pieces: list[tuple[int, memoryview]], page_size: int) -> Iterator[tuple[int, memoryview]]:
    """Cut the zero pages out of pieces, each (first page, bytes)."""
    for page, view in pieces:
        for run in coalesce(nonzero_pages(np.frombuffer(view, np.uint8), page_size)):
            yield page + run.start, view[run.start * page_size : run.stop * page_size]


def _contiguous(pieces: list[tuple[int, memoryview]], page_size: int) -> Iterator[tuple[int, list[memoryview]]]:
    """Join pieces that follow one another in the block, whatever memory they come from, into vectored writes."""
    first, stop = 0, -1
    views: list[memoryview] = []
    for page, view in pieces:
        if page != stop and views:
            yield first, views
            views = []
        if not views:
            first = page
        views.append(view)
        stop = page + len(view) // page_size
    if views:
        yield first, views


def _write_extents(fd: int, extents: list[tuple[int, bytes]]) -> None:
    for file_offset, data in extents:
        pwrite_all(fd, data, file_offset)
