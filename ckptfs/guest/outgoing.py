"""Writing a checkpoint: what one epoch holds, through multifd channels, into a mapped-ram file.

Every window of 1 MiB is one payload: its pages come straight out of the memory that holds them or, where it
takes more than one memory or the base, through a buffer; zero pages are found and left as holes; the rest goes
out in runs. Bitmaps come last, as QEMU writes them, and the stream's header very last.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import trio

from ckptfs.channels.backing_file import BackingFile, DirectIO, pwrite_all
from ckptfs.channels.buffers import AlignedBuffers
from ckptfs.channels.channels import BACKING_DEADLINE, Channel, Channels
from ckptfs.channels.lane import Lane
from ckptfs.guest.base import BadPagesError, Base
from ckptfs.guest.block import PageStack
from ckptfs.guest.layer import Layer
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.layout import Image, layout
from ckptfs.migration.outgoing import coalesce, nonzero_pages, page_windows
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
    deadline: float = BACKING_DEADLINE
    """Seconds after which the storage counts as silent."""


@dataclass(frozen=True)
class Written:
    """What is left to do: the stream's header, position and bytes; and whether pages bypassed the page cache.

    ``direct_io`` is None where that was not tried.
    """

    header: tuple[int, bytes]
    direct_io: bool | None


@dataclass(frozen=True)
class _OutgoingBlock:
    """A block of the file that is being written: where its pages go, and which have gone."""

    pages_offset: int
    file_bmap: PagesBitmap


@dataclass(frozen=True)
class Window:
    """One payload: pages [start, stop) of one block, of which those in ``mask`` hold data."""

    idstr: str
    start: int
    stop: int
    mask: npt.NDArray[np.bool_]


async def write_checkpoint(
    lane: Lane,
    file: BackingFile,
    stream_offset: int,
    image: Image,
    epoch: Epoch,
    options: SaveOptions,
    progress: Progress,
) -> Written:
    """Write ``epoch`` into ``file``, all but the stream's header; nothing is durable yet when this returns.

    Raises OSError, StorageError, or BadPagesError for a page of the base that can't be read.
    """
    plan = layout(image, stream_offset)
    kept = [block for block in plan.blocks if not block.ignored]
    blocks = {block.idstr: _OutgoingBlock(block.pages_offset or 0, PagesBitmap(block.page_count)) for block in kept}
    await write_extents(lane, file, plan.extents[1:], options.deadline)
    channels = await open_channels(lane, file, options.direct_io, options.channel_count, options.deadline)
    try:
        with_data = {idstr: epoch.stacks[idstr].with_data() for idstr in blocks}
        progress.total_pages = sum(bitmap.page_count for bitmap in with_data.values())
        progress.remaining_pages = sum(bitmap.count() for bitmap in with_data.values())
        progress.zero_pages = progress.total_pages - progress.remaining_pages
        windows = data_windows(with_data, image.page_size)
        buffers = AlignedBuffers()
        async with trio.open_nursery() as nursery:
            for _ in range(channels.channel_count):
                nursery.start_soon(
                    _write_windows, windows, buffers, channels, blocks, image.page_size, epoch, options, progress
                )
    finally:
        await channels.aclose()
    bitmaps = [
        (block.bitmap_offset or 0, blocks[block.idstr].file_bmap.to_bytes(image.bitmap_byteorder)) for block in kept
    ]
    await write_extents(lane, file, bitmaps, options.deadline)
    return Written(plan.header, channels.direct_io if options.direct_io.wanted else None)


async def open_channels(
    lane: Lane, file: BackingFile, direct_io: DirectIO, channel_count: int, deadline: float
) -> Channels:
    """Create the channels of a save."""
    opening = partial(Channels.open, file, direct_io, channel_count, deadline)
    return await lane.ask(opening, undo=Channels.close, deadline=deadline)


def data_windows(with_data: dict[str, PagesBitmap], page_size: int) -> Iterator[Window]:
    """The windows of all blocks in which pages hold data."""
    for idstr, pages in with_data.items():
        for start, stop in page_windows(pages, page_size):
            yield Window(idstr, start, stop, pages.expand(start, stop).view(np.bool_))


async def _write_windows(
    windows: Iterable[Window],
    buffers: AlignedBuffers,
    channels: Channels,
    blocks: dict[str, _OutgoingBlock],
    page_size: int,
    epoch: Epoch,
    options: SaveOptions,
    progress: Progress,
) -> None:
    """Carry windows until none is left; as many of these tasks run as there are channels."""
    for window in windows:
        data = await read_window(epoch, window, page_size, buffers)
        mask = window.mask
        page_count = int(mask.sum())
        if options.zero_page_detection is ZeroPageDetection.LEGACY:
            mask = mask & nonzero_pages(data, page_size)
        await options.wait_for_bandwidth(page_count * page_size)
        payload = partial(
            _write_pages,
            data=data,
            mask=mask,
            first_page=window.start,
            block=blocks[window.idstr],
            page_size=page_size,
            detect_zero_pages=options.zero_page_detection is ZeroPageDetection.MULTIFD,
        )
        normal_pages = await channels.carry(payload)
        options.charge((normal_pages - page_count) * page_size)  # zero pages cost nothing
        progress.normal_pages += normal_pages
        progress.zero_pages += page_count - normal_pages
        progress.remaining_pages -= page_count
        progress.transferred += normal_pages * page_size


async def read_window(
    epoch: Epoch, window: Window, page_size: int, buffers: AlignedBuffers
) -> npt.NDArray[np.uint8]:
    """Return the bytes of all pages of a window, page-aligned; what pages outside its mask hold is undefined.

    The newest layer that has a page counts, and the base where none has. Only pages with data are touched: a
    layer's memory is allocated by reading it. Raises BadPagesError for a page of the base that can't be read.
    """
    stack, start, stop = epoch.stacks[window.idstr], window.start, window.stop
    segment = stack.locate(start, stop)
    if segment.stop == stop and isinstance(segment.source, Layer):
        return np.frombuffer(segment.source.view(start, stop), np.uint8)
    layers = [(layer, layer.present.expand(start, stop).view(np.bool_)) for layer in stack.layers]
    in_base = window.mask.copy()
    for _, present in layers:
        in_base &= ~present
    if np.array_equal(in_base, window.mask):
        return await _fetch(epoch, window.idstr, start, in_base, page_size)
    data = np.frombuffer(buffers.take((stop - start) * page_size), np.uint8)
    pages = data.reshape(-1, page_size)
    if in_base.any():
        first, last = int(in_base.argmax()), in_base.size - int(in_base[::-1].argmax())
        fetched = await _fetch(epoch, window.idstr, start + first, in_base[first:last], page_size)
        pages[first:last] = fetched.reshape(-1, page_size)
    for layer, present in reversed(layers):
        pages[present] = np.frombuffer(layer.view(start, stop), np.uint8).reshape(-1, page_size)[present]
    return data


async def _fetch(
    epoch: Epoch, idstr: str, start: int, in_base: npt.NDArray[np.bool_], page_size: int
) -> npt.NDArray[np.uint8]:
    """Read the pages from ``start`` on of which those in ``in_base`` are wanted."""
    assert epoch.base is not None
    try:
        data = await epoch.base.fetch(idstr, start, start + in_base.size, page_size, urgent=False)
    except BadPagesError as error:
        if error.data is None or in_base[np.array(error.pages) - start].any():
            raise
        data = error.data  # they were all written since
    return np.frombuffer(data, np.uint8)


def _write_pages(
    channel: Channel,
    *,
    data: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.bool_],
    first_page: int,
    block: _OutgoingBlock,
    page_size: int,
    detect_zero_pages: bool,
) -> int:
    """Write the pages of ``mask`` that are not zero and mark them; return how many. Runs in a worker thread."""
    if detect_zero_pages:
        mask = mask & nonzero_pages(data, page_size)
    for start, stop in coalesce(mask):
        file_offset = block.pages_offset + (first_page + start) * page_size
        channel.pwritev_all([data[start * page_size : stop * page_size].data], file_offset)
    block.file_bmap.set_mask(first_page, mask)
    return int(mask.sum())


async def write_extents(lane: Lane, file: BackingFile, extents: list[tuple[int, bytes]], deadline: float) -> None:
    """Write what is no page: file offsets and bytes."""
    for file_offset, data in extents:
        await lane.ask(partial(pwrite_all, file.fd, data, file_offset), deadline=deadline)
