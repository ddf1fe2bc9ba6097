"""The kernel's page cache of RAM files: flushed, brought to rest for an epoch, forgotten, filled.

All of that is system calls on our own mount, in threads: they wait for requests that this daemon answers, and
nobody waits for them without an end. A thread is left behind when the command that wanted it is given up, and when
nothing was written back for `KERNEL_DEADLINE`.
"""

import math
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from ckptfs.errors import StateError
from ckptfs.fuse import connection
from ckptfs.fuse.settling import FileRange, Settling, UnderWay, kernel_silent
from ckptfs.qemu.backends import RAMFile

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

KERNEL_DEADLINE = 20.0
"""Seconds for which a flush or an eviction may go on without any WRITE."""

WARM_LENGTH = 4 << 20


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
        self._settling: Settling | None = None
        self._under_way = UnderWay()
        self._one_at_a_time = trio.Lock()
        self._threads = trio.CapacityLimiter(math.inf)  # the default one's might all wait for what we hold
        self._watched: list[trio.CancelScope] = []

    @property
    def device(self) -> int:
        """st_dev of the mount."""
        return self._ram.device

    def files(self, idstrs: Iterable[str]) -> list[RAMFile]:
        """The files that the blocks are seen as."""
        return self._ram.files(idstrs)

    def read(self, request: FileRange, *, for_cache: bool) -> "_Read":
        """Within this a READ may be carried out, which is the page cache's own or may be one for O_DIRECT."""
        return _Read(self._settling, self._under_way, request, for_cache=for_cache)

    def written(self, request: FileRange) -> "_Write":
        """Within this a WRITE is carried out; left when it may be answered."""
        for scope in self._watched:
            scope.deadline = trio.current_time() + KERNEL_DEADLINE
        return _Write(self._settling, self._under_way, request)

    async def flush(self, idstrs: list[str]) -> None:
        """Have every page that was dirtied through mmap written to the daemon (fsync, in a worker thread)."""
        if self._ram.may_be_mapped:
            paths = [self._ram.file_of(idstr)[1] for idstr in idstrs]
            await self._watch(self._fsync, paths)

    @asynccontextmanager
    async def settled(self, idstrs: list[str]) -> AsyncIterator[None]:
        """The daemon holds the newest content of every page, and nobody has seen a newer one, until the next await.

        Writers that were quicker have a moment of rest until this ends.
        """
        if not self._ram.may_be_mapped:
            yield
            return
        async with self._one_at_a_time:
            await self.flush(idstrs)  # in large runs; evicting alone writes back page by page
            files = [self._ram.file_of(idstr)[0] for idstr in idstrs]
            settling = Settling(files, self._evict, self._under_way)
            self._settling = settling
            try:
                await settling.settle()
                yield
            finally:
                self._settling = None
                settling.release()

    async def forget(self, idstrs: Iterable[str]) -> None:
        """Have the kernel drop what it holds: the content has changed below it."""
        async with self._one_at_a_time:
            for idstr in idstrs:
                await self._watch(connection.evict, *self._ram.file_of(idstr)[0])

    async def _evict(self, piece: FileRange) -> None:
        await self._in_thread(connection.evict, *piece)

    async def _watch(self, call: Callable[[*Ts], object], *args: *Ts) -> None:
        """Run ``call`` in a thread; StateError (EBUSY) if it does not return and nothing is written back."""
        with trio.CancelScope(deadline=trio.current_time() + KERNEL_DEADLINE) as scope:
            self._watched.append(scope)
            try:
                await self._in_thread(call, *args)
                return
            finally:
                self._watched.remove(scope)
        raise kernel_silent(KERNEL_DEADLINE)

    async def _in_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        try:
            return await trio.to_thread.run_sync(call, *args, abandon_on_cancel=True, limiter=self._threads)
        except (OSError, StateError):
            if connection.is_gone():  # at its path there is nothing now, or another directory
                raise connection.taken_away() from None
            raise

    async def come_back(self) -> None:
        """Wait until no thread is in a system call on the mount."""
        while self.in_kernel:  # noqa: ASYNC110 - those that were left behind tell nobody
            await trio.sleep(0.01)

    @property
    def in_kernel(self) -> bool:
        """Whether a thread is in a system call on the mount."""
        return self._threads.borrowed_tokens > 0

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
                count = await self._in_thread(self._read, path, at, stop - at)
                warmed += count  # only now: the others have counted meanwhile

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


class _Read:
    """A READ (a class, as `asynccontextmanager` costs several times as much for every request)."""

    def __init__(
        self, settling: Settling | None, under_way: UnderWay, request: FileRange, *, for_cache: bool
    ) -> None:
        self._held = None if settling is None else settling.read_comes(request, for_cache=for_cache)
        self._under_way = under_way
        self._request = request

    async def __aenter__(self) -> None:
        if self._held is not None:
            await self._held.wait()
        self._under_way.begins(self, self._request, writing=False)

    async def __aexit__(self, *error: object) -> None:
        self._under_way.ends(self, writing=False)


class _Write:
    """A WRITE; one that has failed is answered at once."""

    def __init__(self, settling: Settling | None, under_way: UnderWay, request: FileRange) -> None:
        self._held = None if settling is None else settling.write_comes(request)
        self._under_way = under_way
        self._request = request

    async def __aenter__(self) -> None:
        self._under_way.begins(self, self._request, writing=True)

    async def __aexit__(self, error: object, *_: object) -> None:
        self._under_way.ends(self, writing=True)
        if self._held is not None and error is None:
            await self._held.wait()
