"""Writing a plain migration stream: what one epoch holds, as page records one after another (no mapped-ram).

QEMU's ``file:`` without capabilities, for whoever reads that. There is one channel, and it writes sequentially
through the page cache: records are never aligned. Of each block the pages without data come first, as ZERO
records: whatever has never been written need not be looked at. Then window after window, its zero pages before
the others: long stretches of one kind are indexed fast when the stream is read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from ckptfs.channels.backing_file import BackingFile, DirectIO
from ckptfs.channels.buffers import AlignedBuffers
from ckptfs.channels.channels import Channel, Channels
from ckptfs.channels.lane import Lane
from ckptfs.guest.checksums import Summing
from ckptfs.guest.outgoing import (
    Epoch,
    Progress,
    SaveOptions,
    Window,
    Written,
    data_windows,
    open_channels,
    read_window,
)
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.layout import Image, frame
from ckptfs.mapped_ram.precopy import page_records, zero_records
from ckptfs.migration.outgoing import nonzero_pages
from ckptfs.migration.parameters import ZeroPageDetection

_ZERO_PAGES = 1 << 16
"""Pages without data that are looked for at once: up to 576 KiB of records."""


async def write_stream(
    lane: Lane,
    file: BackingFile,
    stream_offset: int,
    image: Image,
    epoch: Epoch,
    options: SaveOptions,
    progress: Progress,
) -> Written:
    """Write ``epoch`` into ``file``, all but the stream's header; nothing is durable yet when this returns.

    The header is all that comes before the first record. Raises OSError, StorageError, or BadPagesError for a page
    of the base that can't be read.
    """
    before, _ = frame(image)
    page_size, buffers = image.page_size, AlignedBuffers()
    with_data = {block.idstr: epoch.stacks[block.idstr].with_data() for block in image.blocks if not block.ignored}
    progress.total_pages = progress.remaining_pages = sum(pages.page_count for pages in with_data.values())
    summing = Summing([block for block in image.blocks if not block.ignored], page_size)
    look_for_zeros = options.zero_page_detection is not ZeroPageDetection.NONE
    channels = await open_channels(lane, file, DirectIO(False), 1, options.deadline)
    stream = _Stream(channels, stream_offset + len(before), options, progress)
    try:
        for idstr, pages in with_data.items():
            summing.forget(idstr, pages)
            summing.carry(idstr, epoch.stacks[idstr], None if epoch.base is None else epoch.base.checksums)
            for start in range(0, pages.page_count, _ZERO_PAGES):
                await stream.append(partial(_without_data, idstr, pages, start, page_size))
            for window in data_windows({idstr: pages}, page_size, summing.width):
                data = await read_window(epoch, window, page_size, buffers)
                await stream.append(
                    partial(_window, window, data, page_size, summing, look_for_zeros=look_for_zeros)
                )
        await stream.append(partial(_end, image, summing))
    finally:
        await channels.aclose()
    return Written((stream_offset, before), direct_io=None)


@dataclass(frozen=True)
class _Records:
    """A piece of the stream, and how many pages it holds."""

    views: list[memoryview]
    normal_pages: int = 0
    zero_pages: int = 0


@dataclass
class _Stream:
    """The stream that is being written, up to ``file_offset``."""

    channels: Channels
    file_offset: int
    options: SaveOptions
    progress: Progress

    async def append(self, encode: Callable[[], _Records]) -> None:
        """Write what ``encode`` makes, in a worker thread."""
        await self.options.wait_for_bandwidth(0)  # the length is known afterwards, and nobody else writes
        records = await self.channels.carry(partial(_write, encode=encode, file_offset=self.file_offset))
        length = sum(map(len, records.views))
        self.options.charge(length)
        self.file_offset += length
        self.progress.transferred += length
        self.progress.normal_pages += records.normal_pages
        self.progress.zero_pages += records.zero_pages
        self.progress.remaining_pages -= records.normal_pages + records.zero_pages


def _write(channel: Channel, *, encode: Callable[[], _Records], file_offset: int) -> _Records:
    records = encode()
    channel.pwritev_all(records.views, file_offset)
    return records


def _without_data(idstr: str, pages: PagesBitmap, start: int, page_size: int) -> _Records:
    """The ZERO records of all clear ``pages`` from ``start`` on, out of `_ZERO_PAGES`."""
    stop = min(start + _ZERO_PAGES, pages.page_count)
    zero_pages = start + np.flatnonzero(pages.expand(start, stop) == 0)
    return _Records(zero_records(idstr, zero_pages, page_size), zero_pages=zero_pages.size)


def _end(image: Image, summing: Summing) -> _Records:
    """What comes after the records, the trailer included."""
    _, after = frame(replace(image, trailer=summing.in_trailer(image.trailer)))
    return _Records([memoryview(after)])


def _window(
    window: Window, data: npt.NDArray[np.uint8], page_size: int, summing: Summing, *, look_for_zeros: bool
) -> _Records:
    """The records of a window's pages with data."""
    summing.note(window.idstr, window.start, data.data)
    normal = window.mask & nonzero_pages(data, page_size) if look_for_zeros else window.mask
    normal_pages = window.start + np.flatnonzero(normal)
    zero_pages = window.start + np.flatnonzero(window.mask & ~normal)
    content = data.reshape(-1, page_size)
    content = content if normal.all() else content[normal]
    views = zero_records(window.idstr, zero_pages, page_size) + page_records(window.idstr, normal_pages, content)
    return _Records(views, normal_pages.size, zero_pages.size)
