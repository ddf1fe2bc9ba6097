"""The checkpoint that RAM is restored from: an open backing file, its layout, and channels to read pages."""

import errno
import logging
import os
from dataclasses import dataclass, field

import trio

from ckptfs.channels.backing_file import DirectIO, FileSource
from ckptfs.channels.buffers import AlignedBuffers
from ckptfs.channels.channels import BACKING_DEADLINE, Channel, Channels
from ckptfs.errors import CkptfsError, StorageError
from ckptfs.guest.block import BaseBlock
from ckptfs.mapped_ram.bitmap import Run
from ckptfs.mapped_ram.checkpoint import read_checkpoint, read_device_state, read_setup
from ckptfs.mapped_ram.layout import Image, image_of

log = logging.getLogger(__name__)


class BadPagesError(StorageError):
    """Pages that are in the checkpoint can't be read; ``pages`` are their numbers in block ``idstr``."""

    def __init__(self, idstr: str, pages: list[int], reason: str) -> None:
        super().__init__(f"{idstr}: page {', '.join(map(str, pages[:8]))} can't be read: {reason}", errno.EIO)
        self.idstr = idstr
        self.pages = pages


@dataclass
class _Fetch:
    """A read that is under way; readers of the same pages wait for it together."""

    start: int
    stop: int
    ended: trio.Event = field(default_factory=trio.Event)
    data: memoryview | None = None
    error: CkptfsError | OSError | None = None


class Base:
    """An open checkpoint; ``blocks`` by idstr. Its device state is held in memory, its pages stay in the file."""

    def __init__(
        self,
        path: str,
        fd: int,
        stream_offset: int,
        direct_io: DirectIO,
        channel_count: int,
        deadline: float = BACKING_DEADLINE,
    ) -> None:
        """Read the checkpoint behind ``fd`` and take the descriptor over (blocking).

        Raises CheckpointError, naming the byte, for anything that is not a whole and honest checkpoint.
        """
        self.path = path
        source = FileSource(fd)
        self.checkpoint, file_bmaps = read_checkpoint(source, stream_offset)
        self.setup = read_setup(source, self.checkpoint)
        self.device_state = read_device_state(source, self.checkpoint)
        self.blocks = {
            block.idstr: BaseBlock(block.pages_offset, file_bmaps[block.idstr])
            for block in self.checkpoint.blocks
            if block.pages_offset is not None
        }
        self.bytes_read = 0
        self.read_count = 0
        self._fd = fd
        self._in_flight: dict[str, list[_Fetch]] = {idstr: [] for idstr in self.blocks}
        self._buffers = AlignedBuffers()
        self._channels = Channels.open(fd, os.O_RDONLY, direct_io, channel_count, deadline)

    def image(self) -> Image:
        """All of the checkpoint but its pages, to be written beside newer ones."""
        return image_of(self.checkpoint, self.setup, self.device_state)

    @property
    def direct_io(self) -> bool:
        """Whether pages are read past the page cache of the backing file."""
        return self._channels.direct_io

    async def fetch(self, idstr: str, start: int, stop: int, page_size: int, *, urgent: bool) -> memoryview:
        """Return pages [start, stop) as the checkpoint has them; pages it has no data for are zeros.

        One I/O for each run of pages, all on one channel; a reader of pages that somebody is reading already
        waits for him. Raises BadPagesError for pages that can't be read, StorageError if the base was closed.
        """
        for fetch in self._in_flight[idstr]:
            if fetch.start <= start and stop <= fetch.stop:
                await fetch.ended.wait()
                if fetch.error is not None:
                    raise fetch.error
                assert fetch.data is not None
                return fetch.data[(start - fetch.start) * page_size : (stop - fetch.start) * page_size]
        fetch = _Fetch(start, stop)
        self._in_flight[idstr].append(fetch)
        try:
            fetch.data = await self._read(idstr, start, stop, page_size, urgent)
            return fetch.data
        except (CkptfsError, OSError) as error:
            fetch.error = error
            raise
        except trio.Cancelled:
            fetch.error = StorageError("the reader before was cancelled", errno.EINTR)
            raise
        finally:
            self._in_flight[idstr].remove(fetch)
            fetch.ended.set()

    async def _read(self, idstr: str, start: int, stop: int, page_size: int, urgent: bool) -> memoryview:
        block = self.blocks[idstr]
        buffer = self._buffers.take((stop - start) * page_size)
        runs = list(block.file_bmap.runs(start, stop))

        def read_runs(channel: Channel) -> None:
            position = start
            for run in runs:
                _zero(buffer, (position - start) * page_size, (run.start - start) * page_size)
                part = buffer[(run.start - start) * page_size : (run.stop - start) * page_size]
                _read_run(channel, part, idstr, block, run, page_size)
                position = run.stop
            _zero(buffer, (position - start) * page_size, len(buffer))

        await self._channels.carry(read_runs, urgent=urgent)
        self.read_count += len(runs)
        self.bytes_read += sum(run.stop - run.start for run in runs) * page_size
        return buffer

    async def read_into(self, idstr: str, run: Run, view: memoryview, page_size: int) -> None:
        """Read a run of pages that are all in the checkpoint into ``view``, behind all readers."""
        block = self.blocks[idstr]
        await self._channels.carry(
            lambda channel: _read_run(channel, view, idstr, block, run, page_size), urgent=False
        )
        self.read_count += 1
        self.bytes_read += len(view)

    def close(self) -> None:
        """Close the backing file; reads that are under way end first."""
        self._channels.close()
        os.close(self._fd)


def _read_run(channel: Channel, part: memoryview, idstr: str, block: BaseBlock, run: Run, page_size: int) -> None:
    file_offset = block.pages_offset + run.start * page_size
    try:
        channel.pread_exactly(part, file_offset)
    except (OSError, StorageError) as error:
        bad = _bad_pages(channel, part, file_offset, page_size)
        log.error("%s: page(s) %s can't be read from the checkpoint: %s", idstr, bad, error)
        raise BadPagesError(idstr, [run.start + page for page in bad], str(error)) from error


def _bad_pages(channel: Channel, part: memoryview, file_offset: int, page_size: int) -> list[int]:
    """Find out which pages of a failed read are the bad ones (a loop over the pages of one failed request)."""
    bad = []
    for page in range(len(part) // page_size):
        try:
            channel.pread_exactly(part[page * page_size : (page + 1) * page_size], file_offset + page * page_size)
        except (OSError, StorageError):
            bad.append(page)
    return bad or list(range(len(part) // page_size))


def _zero(buffer: memoryview, start: int, stop: int) -> None:
    if start < stop:
        buffer[start:stop] = bytes(stop - start)
