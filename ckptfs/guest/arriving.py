"""Writing a checkpoint of pages that arrive: QEMU sends them while its guest runs, in any order, perhaps again.

Each page has its place in the file, and goes there as it comes, through the same channels as in every other save.
So the file does not grow, however often a page is sent. A page that comes once more may overtake its former content
in another channel: everything that is under way has to end before.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import trio

from ckptfs.channels.backing_file import BackingFile, DirectIO, OpenedFile
from ckptfs.channels.buffers import BUFFER_LENGTH, AlignedBuffers
from ckptfs.channels.channels import Channel, Channels
from ckptfs.channels.lane import Lane
from ckptfs.errors import CheckpointError, QemuError, StorageError
from ckptfs.guest.block import PageStack
from ckptfs.guest.checksums import Summing
from ckptfs.guest.layer import Layer
from ckptfs.guest.outgoing import Epoch, Progress, SaveOptions, Written, open_channels, trailer_of, write_extents
from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.mapped_ram.checkpoint import read_device_state, read_setup, with_run_state
from ckptfs.mapped_ram.layout import Image, Layout, image_of, layout
from ckptfs.mapped_ram.page_stream import BATCH_LENGTH, Head, PageBatch, PageStream
from ckptfs.mapped_ram.precopy import read_precopy
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.stream import BytesSource
from ckptfs.mapped_ram.trailer import NO_TRAILER
from ckptfs.migration.outgoing import coalesce, nonzero_pages
from ckptfs.migration.parameters import ZeroPageDetection
from ckptfs.qemu.capture.arriving import Arriving

DEVICE_STATE_LIMIT = 1 << 30
_ZEROS = AlignedBuffers().take(BATCH_LENGTH)


class _Block:
    """A block of the file: where its pages go, which of them hold data, and which may be under way.

    ``batches`` counts the batches that had pages of a window of ``width`` pages, up to 2. One that came in a single
    batch has its checksum computed with that; the others are read again at the end.
    """

    def __init__(self, block: RAMBlock, width: int) -> None:
        self.page_count = block.page_count
        self.pages_offset = block.pages_offset or 0
        self.present = np.zeros(block.page_count, np.bool_)
        self.under_way = np.zeros(block.page_count, np.bool_)
        self.batches = np.zeros(-(-block.page_count // width), np.uint8)


async def write_arriving(
    lane: Lane,
    file: BackingFile,
    stream_offset: int,
    arriving: Arriving,
    accept: Callable[[Head], None],
    configure: Callable[[Image], Image],
    options: SaveOptions,
    progress: Progress,
) -> tuple[Written, Epoch, int]:
    """Write what a machine sends into ``file``, all but the stream's header; nothing is durable when this returns.

    ``accept`` is told what the machine has for RAM, and raises what is wrong with that; ``configure`` gives the
    image the capabilities that it is to have. Returns the page size besides, and an epoch without content: all of
    that is in the file. Raises QemuError, StateError, CheckpointError for a stream that can't be read, OSError, or
    StorageError.
    """
    stream = PageStream()
    batches: list[PageBatch] = []
    while stream.head is None:
        if arriving.ended:
            await arriving.finish(None)  # says what has become of it
            raise QemuError("QEMU sent no RAM")
        batches = list(stream.feed(await arriving.receive()))
    head = stream.head
    accept(head)
    plan = layout(replace(configure(_image_of_pages(head)), trailer=NO_TRAILER), stream_offset)
    channels = await open_channels(lane, file, options.direct_io, options.channel_count, options.deadline)
    try:
        landing = _Landing(plan, head.header.page_size, channels, options, progress)
        async with trio.open_nursery() as nursery, landing.queue:
            for _ in range(channels.channel_count):
                nursery.start_soon(landing.write_batches)
            for batch in batches:
                await landing.take(batch)
            while not arriving.ended:
                for batch in stream.feed(await arriving.receive()):
                    await landing.take(batch)
                if len(stream.rest) > DEVICE_STATE_LIMIT:
                    raise QemuError(f"the device state is larger than {DEVICE_STATE_LIMIT} bytes", errno.EFBIG)
            image = configure(await _finish(arriving, bytes(stream.rest)))
        progress.remaining_pages = 0
        progress.zero_pages = progress.total_pages - progress.normal_pages
    finally:
        await channels.aclose()
    final = layout(replace(image, trailer=NO_TRAILER), stream_offset)
    assert [block.pages_offset for block in final.blocks] == [block.pages_offset for block in plan.blocks]
    bitmaps = landing.bitmaps(final, image)
    await write_extents(lane, file, [*final.extents[1:], *bitmaps], options.deadline)
    await landing.sum_again(lane, file)
    trailer = await trio.to_thread.run_sync(trailer_of, image, landing.summing, [*final.extents, *bitmaps])
    await write_extents(lane, file, [(final.end_offset, trailer)], options.deadline)
    written = Written(final.header, channels.direct_io if options.direct_io.wanted else None)
    return written, _empty_epoch(head.blocks), head.header.page_size


def _image_of_pages(head: Head) -> Image:
    """All that decides where pages go; what comes after them is not known yet."""
    header = head.header
    return Image(
        machine=header.machine,
        subsections=header.subsections,
        capabilities=header.capabilities,
        ram_section_id=head.ram_section_id,
        blocks=head.blocks,
        page_size=header.page_size,
        setup=b"",
        device_state=b"",
        footers=head.footers,
    )


async def _finish(arriving: Arriving, rest: bytes) -> Image:
    """Let the guest go on, if it stands still for us, and return what is to be written beside its pages."""
    source = BytesSource(rest)
    try:
        checkpoint = (await trio.to_thread.run_sync(read_precopy, source)).checkpoint
    except CheckpointError:
        await arriving.finish(None)  # if it was cut short, QEMU says why
        raise
    await arriving.finish(checkpoint.run_state)
    device_state = read_device_state(source, checkpoint)
    if arriving.run_state is not None:
        device_state = with_run_state(device_state, checkpoint, arriving.run_state)
    image = image_of(checkpoint, read_setup(source, checkpoint), device_state)
    return replace(image, run_state=arriving.run_state or checkpoint.run_state)


def _empty_epoch(blocks: tuple[RAMBlock, ...]) -> Epoch:
    stacks = {
        block.idstr: PageStack(
            block.page_count, (Layer(block.idstr, block.page_count, block.page_size),), None, None
        )
        for block in blocks
    }
    return Epoch(stacks, None, frozenset(stacks))


class _Landing:
    """Pages on their way into the file; ``queue`` is to be closed after the last."""

    def __init__(
        self, plan: Layout, page_size: int, channels: Channels, options: SaveOptions, progress: Progress
    ) -> None:
        self.queue, self._batches = trio.open_memory_channel[PageBatch](0)
        self.summing = Summing(plan.blocks, page_size)
        self._blocks = {block.idstr: _Block(block, self.summing.width) for block in plan.blocks}
        self._page_size = page_size
        self._channels = channels
        self._options = options
        self._progress = progress
        self._buffers = AlignedBuffers()
        self._busy = 0
        self._quiet = trio.Event()
        progress.total_pages = progress.remaining_pages = sum(block.page_count for block in plan.blocks)

    async def take(self, batch: PageBatch) -> None:
        """Have a batch written; returns before it is."""
        block = self._blocks[batch.idstr]
        if block.under_way[batch.pages].any():
            await self._all_written()
        self._progress.remaining_pages = max(0, self._progress.remaining_pages - batch.pages.size)
        if batch.content is None and not block.present[batch.pages].any():
            self._progress.zero_pages += batch.pages.size
            return
        block.under_way[batch.pages] = True
        windows = np.unique(batch.pages // self.summing.width)
        block.batches[windows] = np.minimum(block.batches[windows] + 1, 2)
        self.summing.forget_windows(batch.idstr, windows)
        if batch.content is not None:
            await self._options.wait_for_bandwidth(batch.content.size)
        self._busy += 1
        await self.queue.send(batch)

    async def _all_written(self) -> None:
        """Wait until nothing is under way."""
        while self._busy:
            self._quiet = trio.Event()
            await self._quiet.wait()
        for block in self._blocks.values():
            block.under_way[:] = False

    async def write_batches(self) -> None:
        """Write batches until there are no more; as many of these tasks run as there are channels."""
        async for batch in self._batches:
            block = self._blocks[batch.idstr]
            stale = block.present[batch.pages]
            around = self._around(batch)
            if around is None:
                block.batches[batch.pages // self.summing.width] = 2
            payload = partial(
                _write_batch,
                batch=batch,
                stale=stale,
                pages_offset=block.pages_offset,
                page_size=self._page_size,
                buffer=self._buffer(batch, around),
                around=around,
                summing=self.summing,
                detect_zero_pages=self._options.zero_page_detection is not ZeroPageDetection.NONE,
            )
            written = await self._channels.carry(payload)
            block.present[batch.pages] = written
            count = int(written.sum())
            self._options.charge((count - batch.pages.size) * self._page_size if batch.content is not None else 0)
            self._progress.transferred += count * self._page_size
            self._progress.normal_pages += count - int(stale.sum())
            self._progress.zero_pages += batch.pages.size - count
            self._busy -= 1
            if not self._busy:
                self._quiet.set()

    def _around(self, batch: PageBatch) -> Run | None:
        """All pages of the windows that a batch touches, if its own are in a row and a buffer can hold all."""
        first, last = int(batch.pages[0]), int(batch.pages[-1])
        if batch.content is None or (np.diff(batch.pages) != 1).any():
            return None
        width = self.summing.width
        around = Run(first // width * width, min((last // width + 1) * width, self._blocks[batch.idstr].page_count))
        return around if (around.stop - around.start) * self._page_size <= BUFFER_LENGTH else None

    def _buffer(self, batch: PageBatch, around: Run | None) -> memoryview | None:
        if batch.content is None:
            return None
        page_count = batch.pages.size if around is None else around.stop - around.start
        return self._buffers.take(page_count * self._page_size)

    async def sum_again(self, lane: Lane, file: BackingFile) -> None:
        """Read what came in several batches once more, for its checksums; all that is around it is written.

        What can't be read has none.
        """
        windows = []
        for idstr, block in self._blocks.items():
            again = block.batches > 1
            self.summing.forget_windows(idstr, again)
            windows += [(idstr, run) for run in self._pieces(block, again)]
        if not windows:
            return
        reader = OpenedFile(file.fd, os.O_RDONLY)
        try:
            channels = await open_channels(
                lane,
                reader,
                DirectIO(self._channels.direct_io),
                self._channels.channel_count,
                self._options.deadline,
            )
        except OSError:  # a descriptor for writing alone was handed in
            return
        queue = iter(windows)

        async def sum_some() -> None:
            for idstr, run in queue:
                buffer = self._buffers.take((run.stop - run.start) * self._page_size)
                file_offset = self._blocks[idstr].pages_offset + run.start * self._page_size
                await channels.carry(partial(_sum, self.summing, idstr, run.start, buffer, file_offset))

        try:
            async with trio.open_nursery() as nursery:
                for _ in range(channels.channel_count):
                    nursery.start_soon(sum_some)
        finally:
            await channels.aclose()

    def _pieces(self, block: _Block, windows: npt.NDArray[np.bool_]) -> Iterator[Run]:
        """The pages of some windows, in pieces of as many windows as are written at once."""
        width = self.summing.width
        step = BATCH_LENGTH // (width * self._page_size)
        for first, last in coalesce(windows):
            for start in range(first, last, step):
                yield Run(start * width, min(min(start + step, last) * width, block.page_count))

    def bitmaps(self, plan: Layout, image: Image) -> list[tuple[int, bytes]]:
        """Each block's file_bmap, and where it goes."""
        extents = []
        for block in plan.blocks:
            bitmap = PagesBitmap(block.page_count)
            bitmap.set_mask(0, self._blocks[block.idstr].present)
            extents.append((block.bitmap_offset or 0, bitmap.to_bytes(image.bitmap_byteorder)))
        return extents


def _write_batch(
    channel: Channel,
    *,
    batch: PageBatch,
    stale: npt.NDArray[np.bool_],
    pages_offset: int,
    page_size: int,
    buffer: memoryview | None,
    around: Run | None,
    summing: Summing,
    detect_zero_pages: bool,
) -> npt.NDArray[np.bool_]:
    """Write the pages that are not zero; where the file holds data of one that is (``stale``), write zeros.

    ``buffer`` has room for ``around``, where that is known: then checksums are computed. Return which pages hold
    data now. Runs in a worker thread.
    """
    holds_data = np.zeros(batch.pages.size, np.bool_)
    if batch.content is not None and buffer is not None:
        data = np.frombuffer(buffer, np.uint8)
        if around is not None:
            skip, length = (int(batch.pages[0]) - around.start) * page_size, batch.content.size
            data[:skip] = data[skip + length :] = 0
            data = data[skip : skip + length]
        data.reshape(batch.content.shape)[:] = batch.content
        if around is not None:
            summing.note(batch.idstr, around.start, buffer)
        holds_data = nonzero_pages(data, page_size) if detect_zero_pages else ~holds_data
        for start, stop in _runs(batch.pages, holds_data):
            file_offset = pages_offset + int(batch.pages[start]) * page_size
            channel.pwritev_all([data[start * page_size : stop * page_size].data], file_offset)
    for start, stop in _runs(batch.pages, stale & ~holds_data):
        first, end = (pages_offset + int(batch.pages[page]) * page_size for page in (start, stop - 1))
        for file_offset in range(first, end + page_size, BATCH_LENGTH):
            channel.pwritev_all([_ZEROS[: min(BATCH_LENGTH, end + page_size - file_offset)]], file_offset)
    return holds_data


def _sum(summing: Summing, idstr: str, start: int, buffer: memoryview, file_offset: int, channel: Channel) -> None:
    """Read windows, and note their checksums; pages without data are zeros in the file, too."""
    with contextlib.suppress(OSError, StorageError):  # what can't be read now will be EIO later, too
        channel.pread_exactly(buffer, file_offset)
        summing.note(idstr, start, buffer)


def _runs(pages: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The runs of True in ``mask`` whose pages follow one another."""
    chosen = np.flatnonzero(mask)
    if not chosen.size:
        return []
    breaks = np.flatnonzero((np.diff(chosen) != 1) | (np.diff(pages[chosen]) != 1)) + 1
    starts, stops = [0, *breaks.tolist()], [*breaks.tolist(), chosen.size]
    return [(int(chosen[start]), int(chosen[stop - 1]) + 1) for start, stop in zip(starts, stops, strict=True)]
