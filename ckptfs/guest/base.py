"""The checkpoint that RAM is restored from: an open backing file, its layout, and channels to read pages."""

import contextlib
import errno
import logging
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

import numpy as np
import numpy.typing as npt
import trio

from ckptfs.channels.backing_file import BackingFile, DirectIO, OpenedFile
from ckptfs.channels.buffers import BUFFER_LENGTH, AlignedBuffers
from ckptfs.channels.channels import BACKING_DEADLINE, CLOSING_DEADLINE, Channel, Channels, NoAnswerError
from ckptfs.channels.identity import Identity
from ckptfs.channels.reflink import share
from ckptfs.channels.ring import PlainRead
from ckptfs.channels.working_set import ByteRange
from ckptfs.errors import CheckpointError, CkptfsError, CommandError, StorageError
from ckptfs.foreign.content import Content, read_content, read_header
from ckptfs.foreign.libvirt import Domain
from ckptfs.guest.block import BaseBlock
from ckptfs.guest.pages import MappedPages, PageSource, RecordedPages
from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.mapped_ram.checkpoint import Checkpoint, read_device_state, read_setup
from ckptfs.mapped_ram.checksums import checksums_in, wrong_parts
from ckptfs.mapped_ram.layout import Image, image_of
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.stream import Source, is_mapped_ram, uuid_of
from ckptfs.mapped_ram.trailer import Trailer

log = logging.getLogger(__name__)

_OF_SOME_PAGES = {errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EREMOTEIO, errno.EBADMSG, errno.EUCLEAN}
"""Errors of single sectors (Linux, block/blk-core.c, blk_errors) and checksums; others are the whole file's."""


class BadPagesError(StorageError):
    """Pages that are in the checkpoint can't be read; ``pages`` are their numbers in block ``idstr``.

    ``data``, if it is there, is all that was asked for, and sound but for these pages.
    """

    def __init__(self, idstr: str, bad: dict[int, str], data: memoryview | None = None) -> None:
        """``bad`` says of each page why."""
        pages = list(bad)
        super().__init__(
            f"{idstr}: page {', '.join(map(str, pages[:8]))} can't be read: {bad[pages[0]]}", errno.EIO
        )
        self.idstr = idstr
        self.pages = pages
        self.data = data


@dataclass(frozen=True)
class BaseOptions:
    """How a checkpoint is read; ``shared`` names the files of RAM that it leaves out, by idstr.

    One that has a uuid has to have this ``uuid``, if there is one. ``verify``: what is read has to have the
    checksum that was saved with it.
    """

    direct_io: DirectIO
    channel_count: int
    shared: dict[str, str] = field(default_factory=dict)
    deadline: float = BACKING_DEADLINE
    uuid: UUID | None = None
    verify: bool = False


@dataclass(slots=True)
class _Fetch:
    """A read that is under way; readers of the same pages wait for it together.

    When it has ended with neither ``data`` nor ``error``, it was cancelled. ``bad`` says of bad pages why.
    """

    start: int
    stop: int
    read: object = None
    """What a channel carries for it."""
    ended: trio.Event = field(default_factory=trio.Event)
    data: memoryview | None = None
    bad: dict[int, str] = field(default_factory=dict)
    error: CkptfsError | OSError | None = None

    def part(self, idstr: str, start: int, stop: int, page_size: int) -> memoryview:
        """Return pages [start, stop) of it; BadPagesError if any of them is bad."""
        assert self.data is not None
        data = self.data[(start - self.start) * page_size : (stop - self.start) * page_size]
        bad = {page: reason for page, reason in self.bad.items() if start <= page < stop}
        if bad:
            raise BadPagesError(idstr, bad, data)
        return data


@dataclass(frozen=True)
class Unanswered:
    """Pages [start, stop) of a block that a thread waits for past its deadline."""

    idstr: str
    start: int
    stop: int
    returned: trio.Event
    """Set when the thread comes back."""


class Base:
    """An open checkpoint; ``blocks`` by idstr. Its device state is held in memory, its pages stay in the file."""

    def __init__(self, path: str, file: BackingFile, stream_offset: int, options: BaseOptions) -> None:
        """Read the checkpoint in ``file``, mapped-ram or plain, and take the file over (blocking).

        Raises CheckpointError, naming the byte, for anything that is not a whole and honest checkpoint, or
        another guest's; CommandError if RAM that it leaves out is not given as a file, and OSError.
        """
        self.path = path
        self._file = file
        self.bytes_read = 0
        self.read_count = 0
        self.deadline = options.deadline
        self.verified_windows: tuple[int, int] | None = None
        """How many windows have a checksum that is looked at, and how many there are; None if none is looked at."""
        source = file.source()
        self.version = file.version
        """Which file it is, and as of when."""
        with contextlib.ExitStack() as undo:
            header = read_header(source, stream_offset)
            uuid = uuid_of(header.subsections)
            if uuid is not None and options.uuid not in (None, uuid):
                raise CheckpointError(f"UUID received is {uuid} and local is {options.uuid}", stream_offset)
            mapped = is_mapped_ram(header)
            direct_io = options.direct_io if mapped else DirectIO(False)  # a plain stream's pages are not aligned
            channels = Channels.open(file, direct_io, options.channel_count, options.deadline)
            undo.callback(channels.close)
            content = read_content(source, stream_offset)
            if content.trailer_problem is not None:
                log.warning("%s: what it says of its machine can't be read: %s", path, content.trailer_problem)
            self.checkpoint, self.trailer = content.checkpoint, content.trailer
            self.domain = Domain.of(content.trailer)
            self.checksums = checksums_in(self.trailer, self.checkpoint.blocks)
            self._verified = self.checksums if options.verify else None
            self.blocks = {
                idstr: BaseBlock(bmap, _pages(content, idstr, channels))
                for idstr, bmap in content.file_bmaps.items()
            }
            if self._verified is not None:
                self.verified_windows = self._verified.known(self.blocks)
            elif options.verify:
                log.warning("%s: has no checksums, so what is read of it is not verified", path)
            if options.verify and mapped:
                _refuse_damage(source, self.checkpoint, self.trailer)
            self.setup = read_setup(source, self.checkpoint)
            self.device_state = read_device_state(source, self.checkpoint)
            left_out = [block for block in self.checkpoint.blocks if block.idstr not in self.blocks]
            for block in left_out:
                self.blocks[block.idstr] = _shared_block(path, block, options, undo)
            self._resources = undo.pop_all()
        self._resources.callback(file.close)
        self._channels = [channels, *(self.blocks[block.idstr].pages.channels for block in left_out)]
        self.shared = frozenset(block.idstr for block in left_out)
        """The blocks whose content the checkpoint leaves in a shared file (x-ignore-shared)."""
        self.direct_io = channels.direct_io if direct_io.wanted else None
        self._buffers = AlignedBuffers()
        self._in_flight: dict[str, list[_Fetch]] = {idstr: [] for idstr in self.blocks}
        self._unanswered: list[Unanswered] = []

    def lies_in(self, file: BackingFile) -> bool:
        """Whether ``file`` is the one that this checkpoint is in; not to be asked once it is closed."""
        return os.path.sameopenfile(self._file.fd, file.fd)

    def share(self, idstr: str, run: Run, page_size: int, target_fd: int, target_offset: int) -> bool:
        """Let another file share the pages of a run with this one; False if they can't be shared (blocking).

        Raises OSError. Nothing is read: a page that can't be read here can't be read there either.
        """
        pages = self.blocks[idstr].pages
        if idstr in self.shared or not isinstance(pages, MappedPages):
            return False
        source_offset = pages.pages_offset + run.start * page_size
        length = (run.stop - run.start) * page_size
        if not self._file.holds(source_offset, length):
            return False
        return share(self._file.fd, source_offset, length, target_fd, target_offset)

    def windows_before(self, idstr: str, run: Run, page_size: int) -> npt.NDArray[np.uint8] | None:
        """All pages of whole windows, as a new array of pages; None if they can't be read, or are wrong (blocking).

        Only of blocks of which pages can be shared.
        """
        block = self.blocks[idstr]
        assert isinstance(block.pages, MappedPages)
        data = np.empty((run.stop - run.start, page_size), np.uint8)
        try:
            file_offset = block.pages.pages_offset + run.start * page_size
            self._file.pread_exactly(self._file.fd, data.reshape(-1).data, file_offset)
        except (OSError, StorageError) as error:
            log.error(
                "%s: pages %d to %d can't be read from the checkpoint: %s", idstr, run.start, run.stop - 1, error
            )
            return None
        data[block.file_bmap.expand(*run) == 0] = 0
        wrong = [] if self.checksums is None else self.checksums.wrong(idstr, run, data.reshape(-1).data, page_size)
        for start, stop in wrong:
            log.error("%s: the checksum of pages %d to %d is wrong", idstr, start, stop - 1)
        return None if wrong else data

    def read_working_set(self) -> list[tuple[str, Run]]:
        """The pages that were recorded of this file, by block (blocks): none of a plain stream."""
        pages = [
            (idstr, block.pages) for idstr, block in self.blocks.items() if isinstance(block.pages, MappedPages)
        ]
        found = []
        for start, stop in self._file.read_working_set(self.path):
            for idstr, place in pages:
                first = max(start - place.pages_offset, 0) // place.page_size
                last = min(
                    -(-(stop - place.pages_offset) // place.page_size), self.blocks[idstr].file_bmap.page_count
                )
                if first < last:
                    found.append((idstr, Run(first, last)))
        return found

    def record(self, pages: Mapping[str, PagesBitmap], identity: Identity) -> int:
        """Keep these pages as the file's working set, as ``identity`` may; return how many bytes (blocks).

        Raises StateError for a checkpoint that has no place beside it, OSError, StorageError.
        """
        ranges = [
            ByteRange(*(place.pages_offset + page * place.page_size for page in run))
            for idstr, bitmap in pages.items()
            if isinstance(place := self.blocks[idstr].pages, MappedPages)
            for run in bitmap.runs()
        ]
        return self._file.write_working_set(self.path, ranges, identity)

    def image(self) -> Image:
        """All of the checkpoint but its pages, to be written beside newer ones."""
        return image_of(self.checkpoint, self.setup, self.device_state, self.trailer)

    async def fetch(self, idstr: str, start: int, stop: int, page_size: int, *, urgent: bool) -> memoryview:
        """Return pages [start, stop) as the checkpoint has them; pages it has no data for are zeros.

        One I/O for each run of pages, all on one channel; a reader of pages that somebody is reading already
        waits for him, and makes his read urgent if its own would be. Where checksums are looked at, whole windows
        are read, and all pages of one that is wrong are bad. Raises BadPagesError for pages that can't be
        read, StorageError if the base was closed, NoAnswerError if the storage is silent: at once, where a thread
        waits for these pages past its deadline, as the kernel asks again for what it did not get.
        """
        for late in self._unanswered and self.unanswered:
            if late.idstr == idstr and late.start < stop and start < late.stop:
                raise NoAnswerError(self.deadline)
        while (shared := self._under_way(idstr, start, stop)) is not None:
            if urgent:
                self.blocks[idstr].pages.channels.hurry(shared.read)
            await shared.ended.wait()
            if shared.error is not None:
                raise shared.error
            if shared.data is not None:
                return shared.part(idstr, start, stop, page_size)
        fetch = _Fetch(*self._to_be_read(idstr, start, stop, page_size))
        self._in_flight[idstr].append(fetch)
        try:
            await self._read(fetch, idstr, page_size, urgent)
        except (CkptfsError, OSError) as error:
            fetch.error = error
            if isinstance(error, NoAnswerError) and error.returned is not None:
                self._note_unanswered(Unanswered(idstr, fetch.start, fetch.stop, error.returned), str(error))
            raise
        finally:
            self._in_flight[idstr].remove(fetch)
            fetch.ended.set()
        return fetch.part(idstr, start, stop, page_size)

    def _to_be_read(self, idstr: str, start: int, stop: int, page_size: int) -> Run:
        """The pages that have to be read for [start, stop): whole windows, where checksums are looked at."""
        if self._verified is None:
            return Run(start, stop)
        return self._verified.around(Run(start, stop), page_size, self.blocks[idstr].file_bmap.page_count)

    def _note_unanswered(self, late: Unanswered, reason: str) -> None:
        self._unanswered.append(late)
        pages = f"pages {late.start} to {late.stop - 1}"
        log.error("%s: %s can't be read from the checkpoint: %s", late.idstr, pages, reason)

    @property
    def unanswered(self) -> list[Unanswered]:
        """The pages that the storage gave no answer for, and owes one still."""
        self._unanswered = [late for late in self._unanswered if not late.returned.is_set()]
        return self._unanswered

    def _under_way(self, idstr: str, start: int, stop: int) -> _Fetch | None:
        """A read of all these pages that somebody waits for."""
        return next((x for x in self._in_flight[idstr] if x.start <= start and stop <= x.stop), None)

    async def _read(self, fetch: _Fetch, idstr: str, page_size: int, urgent: bool) -> None:
        block, wanted = self.blocks[idstr], Run(fetch.start, fetch.stop)
        runs = list(block.file_bmap.runs(*wanted))
        buffer = self._buffer((wanted.stop - wanted.start) * page_size)
        # what is called knows nothing of `fetch`, which knows it: no cycle keeps the buffer
        read = fetch.read = partial(self._read_all, idstr, wanted, page_size, buffer)
        channels = block.pages.channels
        place = block.pages.place(wanted) if runs == [wanted] and self._verified is None else None
        if place is None:
            fetch.bad = await channels.carry(read, urgent=urgent)
        else:
            fetch.bad = await channels.fill(PlainRead(buffer, place), read, urgent=urgent) or {}
        fetch.data = buffer
        self._count(runs, page_size)

    def _read_all(
        self, idstr: str, wanted: Run, page_size: int, buffer: memoryview, channel: Channel
    ) -> dict[int, str]:
        """Read pages into a buffer, zeros where there are none; return which are bad. Runs in a thread."""
        start, stop = wanted
        block, verified = self.blocks[idstr], self._verified
        bad: dict[int, str] = {}
        position = start
        for run in block.file_bmap.runs(start, stop):
            _zero(buffer, (position - start) * page_size, (run.start - start) * page_size)
            part = buffer[(run.start - start) * page_size : (run.stop - start) * page_size]
            bad.update(_read_run(channel, part, idstr, block.pages, run, page_size))
            position = run.stop
        _zero(buffer, (position - start) * page_size, len(buffer))
        if verified is not None:
            for wrong in verified.wrong(idstr, wanted, buffer, page_size):
                bad.update(_wrong_pages(block.file_bmap, idstr, wrong, bad))
        return bad

    def _count(self, runs: Iterable[Run], page_size: int) -> None:
        """Count reads of these pages."""
        for run in runs:
            self.read_count += 1
            self.bytes_read += (run.stop - run.start) * page_size

    async def read_into(
        self, idstr: str, runs: Sequence[Run], view: Callable[[int, int], memoryview], page_size: int
    ) -> None:
        """Read runs of pages that are all in the checkpoint, one after another, behind all readers.

        ``view`` gives the memory for pages [start, stop). Raises BadPagesError, StorageError.
        """
        pages = self.blocks[idstr].pages
        around = self._to_be_read(idstr, runs[0].start, runs[-1].stop, page_size)

        def read_runs(channel: Channel) -> None:
            for run in runs:
                bad = _read_run(channel, view(*run), idstr, pages, run, page_size)
                if bad:
                    raise BadPagesError(idstr, bad)

        def read_windows(channel: Channel) -> None:
            buffer = self._buffer((around.stop - around.start) * page_size)
            bad = {
                page: reason
                for page, reason in self._read_all(idstr, around, page_size, buffer, channel).items()
                if any(start <= page < stop for start, stop in runs)
            }
            if bad:
                raise BadPagesError(idstr, bad)
            for start, stop in runs:
                view(start, stop)[:] = buffer[
                    (start - around.start) * page_size : (stop - around.start) * page_size
                ]

        await pages.channels.carry(read_runs if self._verified is None else read_windows, urgent=False)
        self._count(runs, page_size)

    def _buffer(self, length: int) -> memoryview:
        """A page-aligned buffer; windows may make a read longer than those that are kept."""
        if length <= BUFFER_LENGTH:
            return self._buffers.take(length)
        return np.frombuffer(mmap.mmap(-1, length), np.uint8).data

    def close(self) -> None:
        """Close the backing file; reads that are under way end first."""
        self._resources.close()

    async def aclose(self) -> None:
        """The same, without holding up other tasks.

        The last close of a file that was replaced frees its blocks; and a storage may not answer at all.
        """
        for channels in self._channels:
            await channels.aclose()
        with trio.move_on_after(CLOSING_DEADLINE, shield=True):
            await trio.to_thread.run_sync(self.close, abandon_on_cancel=True)


def _refuse_damage(source: Source, checkpoint: Checkpoint, trailer: Trailer) -> None:
    """Raise CheckpointError if anything beside the pages is not what was saved: without it, pages say nothing."""
    for part in wrong_parts(source, checkpoint, trailer):
        raise CheckpointError(
            f"{part.name} does not have the checksum that was saved with it: `verify=off` mounts it all the same",
            part.start,
        )


def _wrong_pages(file_bmap: PagesBitmap, idstr: str, window: Run, bad: Mapping[int, str]) -> dict[int, str]:
    """The pages with data of a window whose checksum is wrong, and why they are bad."""
    pages = [page for run in file_bmap.runs(*window) for page in range(*run)]
    reason = f"the checksum of pages {window.start} to {window.stop - 1} is wrong"
    if not any(page in bad for page in pages):  # those of a window that can't be read were logged
        log.error("%s: %s", idstr, reason)
    return dict.fromkeys(pages, reason)


def _pages(content: Content, idstr: str, channels: Channels) -> PageSource:
    """Where a block's pages are: at its place in a mapped-ram file, in the newest records of a plain stream."""
    if content.stream is not None:
        return RecordedPages(channels, content.stream, idstr)
    block = next(block for block in content.checkpoint.blocks if block.idstr == idstr)
    assert block.pages_offset is not None
    return MappedPages(channels, block.pages_offset, block.page_size)


def _shared_block(
    checkpoint_path: str, block: RAMBlock, options: BaseOptions, undo: contextlib.ExitStack
) -> BaseBlock:
    """RAM that the checkpoint leaves out: all of a file that was named for it."""
    path = options.shared.get(block.idstr)
    if path is None:
        raise CommandError(
            f"{checkpoint_path}: leaves out {block.idstr} (x-ignore-shared): name its file, "
            f"-o shared={block.idstr}:PATH"
        )
    try:
        file = _open_ram_file(path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", error.errno) from error
    undo.callback(file.close)
    length = os.lseek(file.fd, 0, os.SEEK_END)
    if length < block.used_length:
        raise CommandError(f"{path}: has {length} bytes, block {block.idstr} has {block.used_length}")
    channels = Channels.open(file, options.direct_io, options.channel_count, options.deadline)
    undo.callback(channels.close)
    all_pages = PagesBitmap(block.page_count)
    all_pages.set(0, block.page_count)
    return BaseBlock(all_pages, MappedPages(channels, 0, block.page_size))


def _open_ram_file(path: str) -> OpenedFile:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # NONBLOCK: a FIFO must not hang us
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise CommandError(f"{path}: is not a regular file, so it is no RAM")
    except BaseException:
        os.close(fd)
        raise
    return OpenedFile(fd, os.O_RDONLY)


def _read_run(
    channel: Channel, part: memoryview, idstr: str, pages: PageSource, run: Run, page_size: int
) -> dict[int, str]:
    """Read a run into ``part``; return the pages for which that failed, and why."""
    try:
        pages.read(channel, part, run)
    except (OSError, CkptfsError) as error:
        reason = str(error)
        bad = dict.fromkeys(range(*run), reason)
        if not isinstance(error, OSError) or error.errno in _OF_SOME_PAGES:
            bad = _bad_pages(channel, part, pages, run, page_size) or bad
        if not channel.given_up:
            log.error("%s: page(s) %s can't be read from the checkpoint: %s", idstr, list(bad), reason)
        return bad
    return {}


def _bad_pages(channel: Channel, part: memoryview, pages: PageSource, run: Run, page_size: int) -> dict[int, str]:
    """Find out which pages of a failed read are the bad ones (a loop over the pages of one failed request)."""
    bad = {}
    for page in range(run.start, run.stop):
        if channel.given_up:
            break
        at = (page - run.start) * page_size
        try:
            pages.read(channel, part[at : at + page_size], Run(page, page + 1))
        except (OSError, CkptfsError) as error:
            bad[page] = str(error)
    return bad


def _zero(buffer: memoryview, start: int, stop: int) -> None:
    if start < stop:
        buffer[start:stop] = bytes(stop - start)
