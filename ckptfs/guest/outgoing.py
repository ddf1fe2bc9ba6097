"""Writing a checkpoint: what one epoch holds, through multifd channels, into a mapped-ram file.

Windows of 1 MiB are what the channels write: pages come straight out of the memory that holds them or, where it
takes more than one memory or the base, through a buffer; zero pages are found and left as holes; the rest goes
out in runs. A payload takes one window after another by itself, for a moment, as long as they are in memory: going
back to trio for each costs more than writing it. Pages that nobody has written since the base need not be read
where the file system lets two files share extents. Bitmaps come last, as QEMU writes them, and the stream's header
very last.
"""

import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
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
from ckptfs.guest.checksums import Summing
from ckptfs.guest.layer import Layer
from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.mapped_ram.checksums import stream_entry
from ckptfs.mapped_ram.layout import Image, layout
from ckptfs.mapped_ram.trailer import NO_TRAILER
from ckptfs.migration.outgoing import coalesce, nonzero_pages, page_windows
from ckptfs.migration.parameters import ZeroPageDetection

STRETCH = 0.1
"""Seconds: short enough for progress, deadlines, and whoever waits for a channel."""


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
    stretch: Callable[[], float] = lambda: STRETCH
    """Seconds for which a payload may take windows by itself: 0, where each has to wait for bandwidth."""


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
    """One payload: pages [start, stop) of one block, of which those in ``mask`` hold data.

    ``beside_shared``: others are in the file already, as they were in the base.
    """

    idstr: str
    start: int
    stop: int
    mask: npt.NDArray[np.bool_]
    beside_shared: bool = False

    @property
    def page_count(self) -> int:
        """How many pages hold data."""
        return int(self.mask.sum())


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
    plan = layout(replace(image, trailer=NO_TRAILER), stream_offset)
    kept = [block for block in plan.blocks if not block.ignored]
    summing = Summing(kept, image.page_size)
    blocks = {block.idstr: _OutgoingBlock(block.pages_offset or 0, PagesBitmap(block.page_count)) for block in kept}
    await write_extents(lane, file, plan.extents[1:], options.deadline)
    channels = await open_channels(lane, file, options.direct_io, options.channel_count, options.deadline)
    try:
        with_data = {idstr: epoch.stacks[idstr].with_data() for idstr in blocks}
        progress.total_pages = sum(bitmap.page_count for bitmap in with_data.values())
        progress.remaining_pages = sum(bitmap.count() for bitmap in with_data.values())
        progress.zero_pages = progress.total_pages - progress.remaining_pages
        shared = {}
        for idstr, block in blocks.items():
            summing.forget(idstr, with_data[idstr])
            summing.carry(idstr, epoch.stacks[idstr], None if epoch.base is None else epoch.base.checksums)
            shared[idstr] = await _share_unchanged(lane, file, epoch, idstr, block, options.deadline)
            progress.normal_pages += shared[idstr].count()
            progress.remaining_pages -= shared[idstr].count()
            with_data[idstr] = with_data[idstr].difference(shared[idstr])
        detect = options.zero_page_detection is not ZeroPageDetection.NONE
        windows = summed_windows(with_data, shared, image.page_size, summing)
        writer = _Writer(windows, epoch, blocks, image.page_size, detect, summing)
        async with trio.open_nursery() as nursery:
            for _ in range(channels.channel_count):
                nursery.start_soon(_write_windows, writer, channels, options, progress)
    finally:
        await channels.aclose()
    bitmaps = [
        (block.bitmap_offset or 0, blocks[block.idstr].file_bmap.to_bytes(image.bitmap_byteorder)) for block in kept
    ]
    trailer = await trio.to_thread.run_sync(trailer_of, image, summing, [*plan.extents, *bitmaps])
    await write_extents(lane, file, [*bitmaps, (plan.end_offset, trailer)], options.deadline)
    return Written(plan.header, channels.direct_io if options.direct_io.wanted else None)


def trailer_of(image: Image, summing: Summing, extents: list[tuple[int, bytes]]) -> bytes:
    """The trailer of a file that has ``extents`` beside its pages, with all checksums: up to 64 MiB (blocking).

    Empty where nobody would find it.
    """
    if image.opaque:
        return b""
    parts = (data for _, data in sorted(extents))
    return summing.in_trailer(image.trailer).with_room_for(stream_entry(parts)).encode()


async def _share_unchanged(
    lane: Lane, file: BackingFile, epoch: Epoch, idstr: str, block: _OutgoingBlock, deadline: float
) -> PagesBitmap:
    """Share with the base what it alone has of a block, as far as that can be done, and mark it; return it."""
    stack, base = epoch.stacks[idstr], epoch.base
    if base is None or stack.base is None:
        return block.file_bmap
    unchanged = stack.base.file_bmap
    for layer in stack.layers:
        unchanged = unchanged.difference(layer.present)
    page_size = base.checkpoint.page_size
    runs = unchanged.runs()

    def share_some() -> bool:
        """Share runs for a moment; return whether to go on."""
        end = time.monotonic() + STRETCH
        for run in runs:
            if not base.share(idstr, run, page_size, file.fd, block.pages_offset + run.start * page_size):
                return False
            block.file_bmap.set(*run)
            if time.monotonic() >= end:
                return True
        return False

    while await lane.ask(share_some, deadline=deadline):
        pass
    return block.file_bmap.copy()


async def open_channels(
    lane: Lane, file: BackingFile, direct_io: DirectIO, channel_count: int, deadline: float
) -> Channels:
    """Create the channels of a save."""
    opening = partial(Channels.open, file, direct_io, channel_count, deadline)
    return await lane.ask(opening, undo=Channels.close, deadline=deadline)


def data_windows(with_data: dict[str, PagesBitmap], page_size: int, width: int = 1) -> Iterator[Window]:
    """The windows of all blocks in which pages hold data; they begin and end at a multiple of ``width`` pages."""
    for idstr, pages in with_data.items():
        for first, last in page_windows(pages, page_size):
            start, stop = first // width * width, min(-(-last // width) * width, pages.page_count)
            yield Window(idstr, start, stop, pages.expand(start, stop).view(np.bool_))


def summed_windows(
    with_data: dict[str, PagesBitmap], shared: dict[str, PagesBitmap], page_size: int, summing: Summing
) -> Iterator[Window]:
    """The same for checksums; what lies beside shared pages comes as the windows that were written, and no more."""
    for window in data_windows(with_data, page_size, summing.width):
        if not shared[window.idstr].any(window.start, window.stop):
            yield window
            continue
        for start, stop in coalesce(_spread(window.mask, summing.width)):
            first, last = window.start + start, window.start + stop
            yield Window(window.idstr, first, last, window.mask[start:stop], shared[window.idstr].any(first, last))


def _spread(mask: npt.NDArray[np.bool_], width: int) -> npt.NDArray[np.bool_]:
    """Every ``width`` pages as a whole, if any of them is in ``mask``."""
    windows = np.pad(mask, (0, -mask.size % width)).reshape(-1, width)
    return np.repeat(windows.any(axis=1), width)[: mask.size]


async def _write_windows(writer: "_Writer", channels: Channels, options: SaveOptions, progress: Progress) -> None:
    """Carry windows until none is left; as many of these tasks run as there are channels."""
    page_size = writer.page_size
    while (window := writer.take()) is not None:
        left: Window | None = window
        while left is not None:
            data = await read_window(writer.epoch, left, page_size, writer.buffers)
            awaited = left.page_count * page_size
            await options.wait_for_bandwidth(awaited)
            stretch = await channels.carry(partial(writer.write, left, data, options.stretch()))
            options.charge(stretch.normal_pages * page_size - awaited)  # zero pages cost nothing
            progress.normal_pages += stretch.normal_pages
            progress.zero_pages += stretch.page_count - stretch.normal_pages
            progress.remaining_pages -= stretch.page_count
            progress.transferred += stretch.normal_pages * page_size
            left = stretch.left


@dataclass
class _Stretch:
    """What one payload did, in pages; ``left`` is a window that it took and could not write without the base."""

    page_count: int = 0
    normal_pages: int = 0
    left: Window | None = None


class _Writer:
    """What the channels of a save share; `take` and `write` are called in their threads."""

    def __init__(
        self,
        windows: Iterator[Window],
        epoch: Epoch,
        blocks: dict[str, _OutgoingBlock],
        page_size: int,
        detect_zero_pages: bool,
        summing: Summing,
    ) -> None:
        self.epoch = epoch
        self.page_size = page_size
        self.buffers = AlignedBuffers()
        self._windows = windows
        self._one_at_a_time = threading.Lock()
        self._blocks = blocks
        self._detect_zero_pages = detect_zero_pages
        self._summing = summing

    def take(self) -> Window | None:
        """Return the next window, None after the last."""
        with self._one_at_a_time:
            return next(self._windows, None)

    def write(self, first: Window, data: npt.NDArray[np.uint8], seconds: float, channel: Channel) -> _Stretch:
        """Write ``first``, which holds ``data``, and what comes next for as long as ``seconds`` and memory last."""
        done = _Stretch()
        end = time.monotonic() + seconds
        window = first
        while True:
            done.normal_pages += self._write_pages(channel, window, data)
            done.page_count += window.page_count
            if channel.given_up or time.monotonic() >= end or (following := self.take()) is None:
                return done
            in_memory = window_in_memory(self.epoch, following, self.page_size, self.buffers)
            if in_memory is None:
                done.left = following
                return done
            window, data = following, in_memory

    def _write_pages(self, channel: Channel, window: Window, data: npt.NDArray[np.uint8]) -> int:
        """Write the pages of a window that are not zero and mark them; return how many."""
        block, page_size, mask = self._blocks[window.idstr], self.page_size, window.mask
        self._sum(window, data)
        if self._detect_zero_pages:
            mask = mask & nonzero_pages(data, page_size)
        for start, stop in coalesce(mask):
            file_offset = block.pages_offset + (window.start + start) * page_size
            channel.pwritev_all([data[start * page_size : stop * page_size].data], file_offset)
        block.file_bmap.set_mask(window.start, mask)
        return int(mask.sum())

    def _sum(self, window: Window, data: npt.NDArray[np.uint8]) -> None:
        """Compute the checksums of a window; what is beside shared pages is read from the base for that."""
        if window.beside_shared:
            assert self.epoch.base is not None
            former = self.epoch.base.windows_before(window.idstr, Run(window.start, window.stop), self.page_size)
            if former is None:
                return
            former[window.mask] = data.reshape(former.shape)[window.mask]
            data = former.reshape(-1)
        self._summing.note(window.idstr, window.start, data.data)


def window_in_memory(
    epoch: Epoch, window: Window, page_size: int, buffers: AlignedBuffers
) -> npt.NDArray[np.uint8] | None:
    """Return the bytes of all pages of a window, page-aligned, None if some of them are in the base.

    The newest layer that has a page counts. Pages that are not in `Window.mask` are zeros: of a layer, only
    those with data are touched, as its memory is allocated by reading it.
    """
    stack, start, stop = epoch.stacks[window.idstr], window.start, window.stop
    segment = stack.locate(start, stop)
    if segment.stop == stop and isinstance(segment.source, Layer):
        return np.frombuffer(segment.source.view(start, stop), np.uint8)
    if _in_base(stack, window).any():
        return None
    data = np.frombuffer(buffers.take((stop - start) * page_size), np.uint8)
    _lay_over(stack, window, data.reshape(-1, page_size))
    return data


async def read_window(
    epoch: Epoch, window: Window, page_size: int, buffers: AlignedBuffers
) -> npt.NDArray[np.uint8]:
    """The same, with pages of the base where no layer has them.

    Raises BadPagesError for a page of the base that can't be read.
    """
    data = window_in_memory(epoch, window, page_size, buffers)
    if data is not None:
        return data
    stack, start, stop = epoch.stacks[window.idstr], window.start, window.stop
    in_base = _in_base(stack, window)
    if np.array_equal(in_base, window.mask):
        return await _fetch(epoch, window.idstr, start, in_base, page_size)
    data = np.frombuffer(buffers.take((stop - start) * page_size), np.uint8)
    pages = data.reshape(-1, page_size)
    first, last = int(in_base.argmax()), in_base.size - int(in_base[::-1].argmax())
    fetched = await _fetch(epoch, window.idstr, start + first, in_base[first:last], page_size)
    pages[first:last] = fetched.reshape(-1, page_size)
    _lay_over(stack, window, pages)
    return data


def _in_base(stack: PageStack, window: Window) -> npt.NDArray[np.bool_]:
    """The pages of a window that are in the base alone."""
    in_base = window.mask.copy()
    for layer in stack.layers:
        in_base &= layer.present.expand(window.start, window.stop) == 0
    return in_base


def _lay_over(stack: PageStack, window: Window, pages: npt.NDArray[np.uint8]) -> None:
    """Copy what layers have of a window over ``pages``, the newest last; what has no data becomes zeros."""
    pages[~window.mask] = 0
    for layer in reversed(stack.layers):
        present = layer.present.expand(window.start, window.stop).view(np.bool_)
        view = layer.view(window.start, window.stop)
        pages[present] = np.frombuffer(view, np.uint8).reshape(pages.shape)[present]


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


async def write_extents(lane: Lane, file: BackingFile, extents: list[tuple[int, bytes]], deadline: float) -> None:
    """Write what is no page: file offsets and bytes."""
    for file_offset, data in extents:
        await lane.ask(partial(pwrite_all, file.fd, data, file_offset), deadline=deadline)
