"""The kernel's page cache of one FUSE file, and programs that use it, as one `random.Random` decides.

Pages are numbers and their content is a version: every store makes a new one. What matters of Linux 6.18
(mm/filemap.c, mm/truncate.c, fs/fuse/file.c) is there:

* a page is locked while a READ for it is under way; a fault brings in some pages around it, too;
* a page that is mapped writable is stored to without asking anybody; the first store after it became clean
  takes the page's lock and makes it dirty;
* writeback makes dirty pages clean and write-protects them, and sends them in one WRITE;
* write(2) of a page puts it into the cache, unlocked and up to date, *before* its WRITE is answered;
* write(2) of a part of a page that is not up to date keeps all of the page locked until its WRITE is answered;
* there is one write(2) at a time: it holds the lock of the inode;
* evicting takes the lock of each page in turn, waits for its writeback, unmaps it, writes it if it is dirty,
  and drops it.

The daemon answers each request after a while, which begins when `Settling` has let it in.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import trio

from ckptfs.fuse.page_cache import FileRange, Settling

PAGE_LENGTH = 4096
INODE = 7
SLOWEST_WRITE = 0.01


@dataclass
class Page:
    """A page in the cache."""

    content: int = 0
    up_to_date: bool = False
    dirty: bool = False
    mapped_writable: bool = False
    lock: trio.Lock = field(default_factory=trio.Lock)
    written_back: trio.Event | None = None


class Daemon:
    """Holds a version for each page; answers READ and WRITE, each after a random time."""

    def __init__(self, random: Random, page_count: int, slowest_read: float) -> None:
        self.content = [0] * page_count
        self.settling: Settling | None = None
        self._random = random
        self._slowest_read = slowest_read

    async def read(self, start: int, stop: int) -> list[int]:
        await self._admit(start, stop, writing=False)
        await self._take_up_to(self._slowest_read)
        return self.content[start:stop]

    async def write(self, start: int, content: list[int]) -> None:
        await self._admit(start, start + len(content), writing=True)
        await self._take_up_to(SLOWEST_WRITE)
        self.content[start : start + len(content)] = content

    async def write_part(self, number: int, start: int, stop: int, version: int) -> None:
        """WRITE of bytes [start, stop) of one page."""
        at = number * PAGE_LENGTH
        await self._admit_bytes(at + start, at + stop, writing=True)
        await self._take_up_to(SLOWEST_WRITE)
        self.content[number] = version

    async def _admit(self, start: int, stop: int, *, writing: bool) -> None:
        await self._admit_bytes(start * PAGE_LENGTH, stop * PAGE_LENGTH, writing=writing)

    async def _admit_bytes(self, start: int, stop: int, *, writing: bool) -> None:
        await trio.lowlevel.checkpoint()
        if self.settling is not None:
            await self.settling.admit(FileRange(INODE, start, stop), writing=writing)

    async def _take_up_to(self, seconds: float) -> None:
        await trio.sleep(self._random.choice([0, self._random.uniform(0, seconds)]))


class Kernel:
    """The page cache. ``store_count`` counts stores through mmap; ``newest`` is what each page should hold."""

    def __init__(self, random: Random, daemon: Daemon, slowest_eviction: float) -> None:
        self.daemon = daemon
        self.page_count = len(daemon.content)
        self.pages: dict[int, Page] = {}
        self.newest = list(daemon.content)
        self.store_count = 0
        self._versions = 0
        self._random = random
        self.slowest_eviction = slowest_eviction
        self._inode_lock = trio.Lock()

    def _new_version(self) -> int:
        self._versions += 1
        return self._versions

    async def load(self, number: int) -> int:
        """Load from a page through mmap."""
        return (await self._fault(number)).content

    async def store(self, number: int) -> None:
        """Store to a page through mmap."""
        while True:
            page = self.pages.get(number)
            if page is not None and page.mapped_writable:
                page.content = self.newest[number] = self._new_version()
                self.store_count += 1
                return
            page = await self._fault(number)
            async with page.lock:
                if self.pages.get(number) is not page:
                    continue
                await self._wait_written_back(page)
                page.dirty = page.mapped_writable = True

    async def _fault(self, number: int) -> Page:
        while True:
            page = self.pages.get(number)
            if page is None:
                await self._read_around(number)
                continue
            async with page.lock:
                if self.pages.get(number) is not page:
                    continue
                if not page.up_to_date:
                    (page.content,) = await self.daemon.read(number, number + 1)
                    page.up_to_date = True
                return page

    async def _read_around(self, number: int) -> None:
        start, stop = number, number + 1
        while start > 0 and start - 1 not in self.pages and self._random.random() < 0.7:
            start -= 1
        while stop < self.page_count and stop not in self.pages and self._random.random() < 0.7:
            stop += 1
        fresh = [Page() for _ in range(start, stop)]
        for page in fresh:
            page.lock.acquire_nowait()
        self.pages.update(zip(range(start, stop), fresh, strict=True))
        content = await self.daemon.read(start, stop)
        for page, version in zip(fresh, content, strict=True):
            page.content, page.up_to_date = version, True
            page.lock.release()

    async def write(self, start: int, stop: int) -> None:
        """write(2) of whole pages."""
        async with self._inode_lock:
            await self._write(start, stop)

    async def write_part(self, number: int, start: int, stop: int) -> None:
        """write(2) of bytes [start, stop) of one page: the page has a new version, wherever in it that is."""
        async with self._inode_lock:
            page = await self._locked_page(number)
            await self._wait_written_back(page)
            version = page.content = self._new_version()
            if page.up_to_date:
                page.lock.release()
            await self.daemon.write_part(number, start, stop, version)
            self.newest[number] = version
            if not page.up_to_date:
                page.lock.release()

    async def _locked_page(self, number: int) -> Page:
        """The page in the cache, a new one if need be, with its lock held."""
        while True:
            page = self.pages.setdefault(number, Page())
            await page.lock.acquire()
            if self.pages.get(number) is page:
                return page
            page.lock.release()  # it was evicted meanwhile

    async def _write(self, start: int, stop: int) -> None:
        content = []
        for number in range(start, stop):
            page = await self._locked_page(number)
            await self._wait_written_back(page)
            page.content, page.up_to_date = self._new_version(), True
            content.append(page.content)
            page.lock.release()
        await self.daemon.write(start, content)
        self.newest[start:stop] = content

    async def write_back(self, number: int) -> None:
        """Write a page back, and dirty ones that follow it, as the flusher does."""
        batch: list[Page] = []
        start = number
        while (page := self.pages.get(number)) is not None and page.dirty and len(batch) < 8:
            async with page.lock:
                if self.pages.get(number) is not page or not page.dirty or page.written_back is not None:
                    break
                self._clean(page)
                batch.append(page)
            number += 1
        if batch:
            await self.daemon.write(start, [page.content for page in batch])
            for page in batch:
                assert page.written_back is not None
                page.written_back.set()
                page.written_back = None

    def _clean(self, page: Page) -> None:
        page.dirty = page.mapped_writable = False
        page.written_back = trio.Event()

    async def _wait_written_back(self, page: Page) -> None:
        while page.written_back is not None:
            await page.written_back.wait()

    async def evict(self, piece: FileRange) -> None:
        """FUSE_NOTIFY_INVAL_INODE."""
        numbers = range(piece.start // PAGE_LENGTH, -(-piece.stop // PAGE_LENGTH))
        await trio.sleep(self._random.uniform(0, self.slowest_eviction))
        for number in numbers:
            page = self.pages.get(number)
            if page is None:
                continue
            async with page.lock:
                if self.pages.get(number) is not page:
                    continue
                await self._wait_written_back(page)
                page.mapped_writable = False
                if page.dirty:
                    self._clean(page)
                    assert page.written_back is not None
                    await self.daemon.write(number, [page.content])
                    page.written_back.set()
                    page.written_back = None
                del self.pages[number]
            if self._random.random() < 0.1:
                await trio.sleep(self._random.uniform(0, self.slowest_eviction))


async def as_in_a_thread(blocking: Callable[..., Awaitable[None]], *args: Any) -> None:
    """`trio.to_thread.run_sync` for "blocking" functions that are fake: what has begun can't be cancelled."""
    await trio.lowlevel.checkpoint_if_cancelled()
    with trio.CancelScope(shield=True):
        await blocking(*args)
