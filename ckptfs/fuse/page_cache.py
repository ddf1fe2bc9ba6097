"""The kernel's page cache of RAM files, and how it is brought to rest for the one moment of an epoch.

Pages dirtied through a shared mmap live in the kernel until it writes them back, one after another: between
the first and the last of them the writers go on, so a plain flush is no moment. FUSE can't stop such a
writer, but it can take his pages away: evicting a page (FUSE_NOTIFY_INVAL_INODE) writes it back and unmaps
it, and the next access must ask the daemon, which lets him wait until the epoch has begun.

Evicting waits for the lock of every page that it meets, and a page whose READ or WRITE has not been answered is
locked. So, for every request that comes in while RAM is brought to rest (`_Settling`):

========================================  =========================================================
pages of the request                      what happens to it
========================================  =========================================================
outside of what is evicted just now,      held: its pages are not in the cache, or locked by it, and
and evicted already                       no mapping shows them
still to be evicted                       served; they are evicted later
evicted just now, READ                    held for `PATIENCE`: if the eviction ends first, it has passed
                                          them, and they stay held; else it is waiting for them: served,
                                          and evicted once more
evicted just now, WRITE                   served (most of them are the eviction's own), evicted once more
========================================  =========================================================

When nothing is left to evict, every page is held by the daemon alone, and whoever touches one waits.
"""

import errno
import mmap
import os
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import cached_property
from typing import NamedTuple, Protocol

import trio

from ckptfs.errors import StateError
from ckptfs.qemu.backends import RAMFile

PATIENCE = 0.005
"""Seconds that a READ in the range which is evicted just now waits for the eviction to end."""

SETTLE_DEADLINE = 20.0
PIECE_LENGTH = 64 << 20
WARM_LENGTH = 4 << 20

_FUSE_NOTIFY_INVAL_INODE = 2
_NOTIFICATION = struct.Struct("=IiQQqq")  # fuse_out_header, fuse_notify_inval_inode_out (linux/fuse.h)


class FileRange(NamedTuple):
    """Bytes [start, stop) of the file with inode number ``inode``."""

    inode: int
    start: int
    stop: int

    def whole_pages(self) -> "FileRange":
        """The pages that this range touches: the kernel locks a page as a whole, for a byte of it as well."""
        start = self.start // mmap.PAGESIZE * mmap.PAGESIZE
        stop = -(-self.stop // mmap.PAGESIZE) * mmap.PAGESIZE
        return FileRange(self.inode, start, stop)

    def overlaps(self, other: "FileRange") -> bool:
        """Whether the two share a byte."""
        return self.inode == other.inode and self.start < other.stop and other.start < self.stop

    def contains(self, other: "FileRange") -> bool:
        """Whether all of ``other`` lies in this range."""
        return self.inode == other.inode and self.start <= other.start and other.stop <= self.stop

    def without(self, others: list["FileRange"]) -> list["FileRange"]:
        """What is left of this range when ``others`` are cut out of it."""
        left = []
        start = self.start
        for other in sorted(other for other in others if self.overlaps(other)):
            if start < other.start:
                left.append(FileRange(self.inode, start, other.start))
            start = max(start, other.stop)
        if start < self.stop:
            left.append(FileRange(self.inode, start, self.stop))
        return left


class Settling:
    """One attempt to bring all of ``files`` to rest; ``evict`` blocks and is called in a worker thread."""

    def __init__(self, files: list[FileRange], evict: Callable[[FileRange], None]) -> None:
        self._evict = evict
        self._pending = [piece for file in files for piece in _pieces(file)]
        self._active: FileRange | None = None
        self._active_ended = trio.Event()
        self._colliding: list[FileRange] = []
        self._held: list[FileRange] = []
        self._over = trio.Event()

    async def admit(self, request: FileRange, *, writing: bool) -> None:
        """Return when ``request`` may be served: now, or after the epoch has begun."""
        if self._over.is_set():
            return
        request = request.whole_pages()
        if self._active is not None and self._active.overlaps(request):
            if writing or not await self._outlasts_eviction(request):
                self._pending.append(request)
                return
        elif any(pending.overlaps(request) for pending in self._pending):
            if not any(pending.contains(request) for pending in self._pending):
                self._pending.append(request)
            return
        else:
            self._held.append(request)
        await self._over.wait()

    async def _outlasts_eviction(self, request: FileRange) -> bool:
        """Wait for the eviction to end; False if it does not, so that it may be waiting for ``request``."""
        self._colliding.append(request)
        ended = self._active_ended
        with trio.move_on_after(PATIENCE):
            await ended.wait()
        if ended.is_set():
            return True  # `evict_all` has moved the request to the held ones
        self._colliding.remove(request)
        return False

    async def evict_all(self) -> None:
        """Evict until nothing is left to evict. Raises StateError (EBUSY) if writers don't let that happen."""
        with trio.move_on_after(SETTLE_DEADLINE):
            while self._pending:
                pieces = self._pending.pop().without(self._held)
                self._pending += pieces[1:]
                for piece in pieces[:1]:
                    await self._evict_piece(piece)
            return
        raise StateError(
            f"programs that write RAM through mmap did not let it come to rest in {SETTLE_DEADLINE:g} s; "
            "stop them and try again"
        )

    async def _evict_piece(self, piece: FileRange) -> None:
        self._active, self._active_ended = piece, trio.Event()
        try:
            await trio.to_thread.run_sync(self._evict, piece)
        finally:
            self._held += self._colliding
            self._colliding = []
            self._active = None
            self._active_ended.set()

    def release(self) -> None:
        """Let every held request go on."""
        self._over.set()


def _pieces(file: FileRange) -> list[FileRange]:
    """Cut a file into pieces, few enough for a huge one; the last comes first, for `list.pop`."""
    length = max(PIECE_LENGTH, (file.stop - file.start) // 256 // PIECE_LENGTH * PIECE_LENGTH)
    starts = range(file.start, file.stop, length)
    return [FileRange(file.inode, start, min(start + length, file.stop)) for start in reversed(starts)]


class CachedFiles(Protocol):
    """What the page cache has to know of the files in ram/."""

    @property
    def device(self) -> int:
        """st_dev of the mount."""
        ...

    def file_of(self, idstr: str) -> tuple[FileRange, str]:
        """Inode number, length in bytes and path of a block's file."""
        ...

    def files(self, idstrs: Iterable[str]) -> list[RAMFile]:
        """The same as stat(2) tells files apart."""
        ...

    @property
    def may_be_mapped(self) -> bool:
        """Whether any is open for reading and writing, without which there is no shared writable mapping."""
        ...


class KernelPageCache:
    """The kernel's page cache of the files in ram/, as `guest.PageCache` wants it."""

    def __init__(self, ram: CachedFiles) -> None:
        self._ram = ram
        self.settling: Settling | None = None

    @property
    def device(self) -> int:
        """st_dev of the mount."""
        return self._ram.device

    @cached_property
    def _fuse_fd(self) -> int:
        return _find_fuse_descriptor()

    def files(self, idstrs: Iterable[str]) -> list[RAMFile]:
        """The files that the blocks are seen as."""
        return self._ram.files(idstrs)

    async def flush(self, idstrs: list[str]) -> None:
        """Have every page that was dirtied through mmap written to the daemon (fsync, in a worker thread)."""
        if self._ram.may_be_mapped:
            paths = [self._ram.file_of(idstr)[1] for idstr in idstrs]
            await trio.to_thread.run_sync(self._fsync, paths)

    @asynccontextmanager
    async def settled(self, idstrs: list[str]) -> AsyncIterator[None]:
        """Within this, the daemon holds the newest content of every page, and nothing can change it."""
        if not self._ram.may_be_mapped:
            yield
            return
        await self.flush(idstrs)  # in large runs; evicting alone writes back page by page
        self.settling = Settling([self._ram.file_of(idstr)[0] for idstr in idstrs], self._evict)
        try:
            await self.settling.evict_all()
            yield
        finally:
            self.settling.release()
            self.settling = None

    async def forget(self, idstrs: Iterable[str]) -> None:
        """Have the kernel drop what it holds: the content has changed below it."""
        for idstr in idstrs:
            await trio.to_thread.run_sync(self._evict, self._ram.file_of(idstr)[0])

    async def warm(self, idstrs: list[str], start: int, length: int | None, channel_count: int) -> int:
        """Bring bytes of files into the cache, ``channel_count`` requests at a time; return how many bytes.

        They are read through the mount itself, in worker threads, so that pages which the kernel holds already,
        perhaps newer than the daemon knows, stay as they are.
        """
        pieces = (piece for idstr in idstrs for piece in self._pieces(idstr, start, length))
        warmed = 0

        async def warm_pieces() -> None:
            nonlocal warmed
            for path, at, stop in pieces:
                warmed += await trio.to_thread.run_sync(self._read, path, at, stop - at)

        async with trio.open_nursery() as nursery:
            for _ in range(channel_count):
                nursery.start_soon(warm_pieces)
        return warmed

    def _pieces(self, idstr: str, start: int, length: int | None) -> Iterator[tuple[str, int, int]]:
        file, path = self._ram.file_of(idstr)
        stop = file.stop if length is None else min(file.stop, start + length)
        for at in range(start, stop, WARM_LENGTH):
            yield path, at, min(at + WARM_LENGTH, stop)

    def _read(self, path: str, start: int, length: int) -> int:
        with open(path, "rb", buffering=0) as file:
            return len(os.pread(file.fileno(), length, start))

    def _fsync(self, paths: list[str]) -> None:
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if os.fstat(fd).st_dev != self._ram.device:
                    raise StateError(f"{path}: another file system is mounted over it")
                os.fsync(fd)
            finally:
                os.close(fd)

    def _evict(self, piece: FileRange) -> None:
        message = _NOTIFICATION.pack(
            _NOTIFICATION.size,
            _FUSE_NOTIFY_INVAL_INODE,
            0,
            piece.inode,
            piece.start,
            piece.stop - piece.start,
        )
        try:
            os.write(self._fuse_fd, message)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the kernel does not know the inode: nothing of it is cached
                raise


def _find_fuse_descriptor() -> int:
    """The descriptor of /dev/fuse that this process serves (pyfuse3 has one session a process)."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
        except OSError:
            continue
    raise StateError("no open descriptor of /dev/fuse: nothing is mounted")
