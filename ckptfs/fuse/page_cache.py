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
import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio

from ckptfs.errors import StateError

PATIENCE = 0.005
"""Seconds that a READ in the range which is evicted just now waits for the eviction to end."""

SETTLE_DEADLINE = 20.0
PIECE_LENGTH = 64 << 20

_FUSE_NOTIFY_INVAL_INODE = 2
_NOTIFICATION = struct.Struct("=IiQQqq")  # fuse_out_header, fuse_notify_inval_inode_out (linux/fuse.h)


class FileRange(NamedTuple):
    """Bytes [start, stop) of the file with inode number ``inode``."""

    inode: int
    start: int
    stop: int

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


class KernelPageCache:
    """The kernel's page cache of the files in ram/, as `guest.PageCache` wants it.

    ``file_of`` tells inode number, length in bytes and path of a block's file; ``may_be_mapped`` whether
    any process holds one open for reading and writing, without which there is no shared writable mapping.
    """

    def __init__(
        self,
        file_of: Callable[[str], tuple[FileRange, str]],
        may_be_mapped: Callable[[], bool],
        device: int,
    ) -> None:
        self._file_of = file_of
        self._may_be_mapped = may_be_mapped
        self._device = device
        self._fuse_fd = _find_fuse_descriptor()
        self.settling: Settling | None = None

    async def flush(self, idstrs: list[str]) -> None:
        """Have every page that was dirtied through mmap written to the daemon (fsync, in a worker thread)."""
        if self._may_be_mapped():
            paths = [self._file_of(idstr)[1] for idstr in idstrs]
            await trio.to_thread.run_sync(self._fsync, paths)

    @asynccontextmanager
    async def settled(self, idstrs: list[str]) -> AsyncIterator[None]:
        """Within this, the daemon holds the newest content of every page, and nothing can change it."""
        if not self._may_be_mapped():
            yield
            return
        await self.flush(idstrs)  # in large runs; evicting alone writes back page by page
        self.settling = Settling([self._file_of(idstr)[0] for idstr in idstrs], self._evict)
        try:
            await self.settling.evict_all()
            yield
        finally:
            self.settling.release()
            self.settling = None

    def _fsync(self, paths: list[str]) -> None:
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if os.fstat(fd).st_dev != self._device:
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
