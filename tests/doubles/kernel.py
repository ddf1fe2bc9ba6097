"""The kernel's page cache of one FUSE file, and programs that use it, as one `random.Random` decides.

The file is a row of cells, four a page, and the content of a cell is a version: every store makes a new one. What
matters of Linux 6.18 (mm/filemap.c, mm/truncate.c, fs/fuse/file.c) is there:

* a page is locked while a READ for it is under way; a fault brings in some pages around it, too;
* a page that is mapped writable is stored to without asking anybody; the first store after it became clean
  takes the page's lock and makes it dirty;
* writeback makes dirty pages clean and write-protects them, and sends them in one WRITE;
* there is one write(2) at a time: it holds the lock of the inode;
* write(2) of a whole page puts it into the cache, unlocked and up to date, *before* its WRITE is answered; of a
  part of a page that is not up to date, it keeps all of the page locked until then, and a WRITE ends with it;
* copy_file_range(2) and splice(2) are a load and a write(2);
* O_DIRECT drops the pages from the cache, and asks the daemon without any lock of pages;
* evicting takes the lock of each page in turn, waits for its writeback, unmaps it, writes it if it is dirty,
  and drops it.

The moment between copying into several pages and sending their WRITE, in which others see what the daemon can't
know of, is not there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import trio

from ckptfs.fuse.page_cache import KernelPageCache
from ckptfs.fuse.settling import FileRange
from ckptfs.guest.turns import Turns

PAGE_LENGTH = 4096
CELLS = 4
"""A page has as many; programs read and write whole cells."""

CELL_LENGTH = PAGE_LENGTH // CELLS
INODE = 7
SLOWEST_WRITE = 0.01


@dataclass
class Page:
    """A page in the cache."""

    cells: list[int] = field(default_factory=lambda: [0] * CELLS)
    up_to_date: bool = False
    dirty: bool = False
    mapped_writable: bool = False
    lock: trio.Lock = field(default_factory=trio.Lock)
    written_back: trio.Event | None = None


class Daemon:
    """Holds a version for each cell; carries out READ and WRITE, each after a random time."""

    def __init__(self, random: Random, page_count: int, slowest_read: float) -> None:
        self.cells = [0] * (page_count * CELLS)
        self.page_cache: KernelPageCache
        self._turns = Turns()
        self._random = random
        self._slowest_read = slowest_read

    async def read(self, start: int, stop: int, *, for_cache: bool = True) -> list[int]:
        """READ of cells [start, stop)."""
        await trio.lowlevel.checkpoint()
        async with self.page_cache.read(_range(start, stop), for_cache=for_cache):
            await self._take_up_to(self._slowest_read)
            return self.cells[start:stop]

    async def write(self, start: int, cells: list[int]) -> None:
        """WRITE; as in `Guest.write`, pages that it fills are stored at once, and what overlaps keeps its order."""
        async with self.page_cache.written(_range(start, start + len(cells))):
            if not self._turns.any_before(start, start + len(cells)):
                for at, cell in enumerate(cells, start):
                    page = at // CELLS * CELLS
                    if start <= page and page + CELLS <= start + len(cells):
                        self.cells[at] = cell
            async with self._turns.taken(start, start + len(cells)):
                await self._take_up_to(SLOWEST_WRITE)
                self.cells[start : start + len(cells)] = cells

    async def _take_up_to(self, seconds: float) -> None:
        await trio.sleep(self._random.choice([0, self._random.uniform(0, seconds)]))


class Kernel:
    """The page cache. ``seen`` is what each cell holds for whoever looks, ``sent`` what a write(2) will show."""

    def __init__(self, random: Random, daemon: Daemon, slowest_eviction: float) -> None:
        self.daemon = daemon
        self.page_count = len(daemon.cells) // CELLS
        self.pages: dict[int, Page] = {}
        self.seen = list(daemon.cells)
        self.sent: dict[int, int] = {}
        self.stores: dict[int, int] = {}
        """How many there were through mmap, by page."""
        self.slowest_eviction = slowest_eviction
        self._versions = 0
        self._random = random
        self._inode_lock = trio.Lock()

    @property
    def store_count(self) -> int:
        """How many stores there were through mmap."""
        return sum(self.stores.values())

    def _new_version(self) -> int:
        self._versions += 1
        return self._versions

    # ---- programs ----------------------------------------------------------------------------------

    async def load(self, cell: int) -> int:
        """Load from a cell through mmap."""
        return (await self._fault(cell // CELLS)).cells[cell % CELLS]

    async def store(self, cell: int) -> None:
        """Store to a cell through mmap."""
        number = cell // CELLS
        while True:
            page = self.pages.get(number)
            if page is not None and page.mapped_writable:
                page.cells[cell % CELLS] = self.seen[cell] = self._new_version()
                self.stores[number] = self.stores.get(number, 0) + 1
                return
            page = await self._fault(number)
            async with page.lock:
                if self.pages.get(number) is not page:
                    continue
                await _wait_written_back(page)
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
                    page.cells = await self.daemon.read(number * CELLS, (number + 1) * CELLS)
                    page.up_to_date = True
                return page

    async def _read_around(self, number: int) -> None:
        start, stop = number, number + 1
        while start > 0 and start - 1 not in self.pages and self._random.random() < 0.7:
            start -= 1
        while stop < self.page_count and stop not in self.pages and self._random.random() < 0.7:
            stop += 1
        fresh = {n: Page() for n in range(start, stop)}
        for page in fresh.values():
            page.lock.acquire_nowait()
        self.pages.update(fresh)
        cells = await self.daemon.read(start * CELLS, stop * CELLS)
        for n, page in fresh.items():
            page.cells, page.up_to_date = cells[(n - start) * CELLS : (n - start + 1) * CELLS], True
            page.lock.release()

    async def write(self, start: int, stop: int) -> None:
        """write(2) of cells [start, stop)."""
        async with self._inode_lock:
            at = start
            while at < stop:
                at = await self._write_some(at, stop)

    async def _write_some(self, start: int, stop: int) -> int:
        """Send one WRITE from ``start`` on; return where it ends: behind the first page that stays locked."""
        cells: list[int] = []
        kept = None
        for number, page in await self._locked_pages(start // CELLS, -(-stop // CELLS)):
            if kept is None:
                first, last = max(start, number * CELLS), min(stop, (number + 1) * CELLS)
                versions = [self._new_version() for _ in range(first, last)]
                page.cells[first % CELLS : first % CELLS + len(versions)] = versions
                cells += versions
                page.up_to_date |= len(versions) == CELLS
                if page.up_to_date:
                    self.seen[first:last] = versions
                else:
                    kept = page
                    continue
            page.lock.release()
        await self._send(start, cells)
        if kept is not None:
            kept.lock.release()
        return start + len(cells)

    async def _send(self, start: int, cells: list[int]) -> None:
        sent = dict(enumerate(cells, start))
        self.sent.update(sent)
        await self.daemon.write(start, cells)
        for cell, version in sent.items():
            del self.sent[cell]
            self.seen[cell] = max(self.seen[cell], version)

    async def _locked_pages(self, start: int, stop: int) -> list[tuple[int, Page]]:
        """The pages in the cache, new ones if need be, all locked at once, and none of them being written back."""
        while True:
            known = [page for number in range(start, stop) if (page := self.pages.get(number)) is not None]
            busy = next((page for page in known if page.lock.locked() or page.written_back is not None), None)
            if busy is None:
                pages = [(number, self.pages.setdefault(number, Page())) for number in range(start, stop)]
                for _, page in pages:
                    page.lock.acquire_nowait()
                return pages
            async with busy.lock:
                await _wait_written_back(busy)

    async def copy(self, source: int, start: int, length: int) -> None:
        """copy_file_range(2) of ``length`` cells, or splice(2) to a pipe and back."""
        for cell in range(source, source + length, CELLS):
            await self.load(cell)
        await self.write(start, start + length)

    async def read_direct(self, start: int, stop: int) -> list[int]:
        """read(2) with O_DIRECT of cells [start, stop)."""
        for number in range(start // CELLS, -(-stop // CELLS)):
            await self.write_back(number)
        return await self.daemon.read(start, stop, for_cache=False)

    async def write_direct(self, start: int, stop: int) -> None:
        """write(2) with O_DIRECT of cells [start, stop)."""
        async with self._inode_lock:
            await self.evict(*_range(start, stop))
            cells = [self._new_version() for _ in range(start, stop)]
            await self._send(start, cells)
            await self.evict(*_range(start, stop))

    # ---- writing back and evicting -----------------------------------------------------------------

    async def fsync(self) -> None:
        """Write everything back."""
        for number in list(self.pages):
            await self.write_back(number)

    async def write_back(self, number: int) -> None:
        """Write a page back, and dirty ones that follow it, as the flusher does."""
        batch: list[Page] = []
        start = number
        while (page := self.pages.get(number)) is not None and page.dirty and len(batch) < 8:
            async with page.lock:
                if self.pages.get(number) is not page or not page.dirty or page.written_back is not None:
                    break
                _clean(page)
                batch.append(page)
            number += 1
        if batch:
            await self.daemon.write(start * CELLS, [cell for page in batch for cell in page.cells])
            for page in batch:
                _end_writeback(page)

    async def evict(self, inode: int, start: int, stop: int) -> None:
        """FUSE_NOTIFY_INVAL_INODE."""
        await trio.sleep(self._random.uniform(0, self.slowest_eviction))
        for number in range(start // PAGE_LENGTH, -(-stop // PAGE_LENGTH)):
            page = self.pages.get(number)
            if page is None:
                continue
            async with page.lock:
                if self.pages.get(number) is not page:
                    continue
                await _wait_written_back(page)
                page.mapped_writable = False
                if page.dirty:
                    _clean(page)
                    await self.daemon.write(number * CELLS, list(page.cells))
                    _end_writeback(page)
                del self.pages[number]
            if self._random.random() < 0.1:
                await trio.sleep(self._random.uniform(0, self.slowest_eviction))


def _range(start: int, stop: int) -> FileRange:
    return FileRange(INODE, start * CELL_LENGTH, stop * CELL_LENGTH)


def _clean(page: Page) -> None:
    page.dirty = page.mapped_writable = False
    page.written_back = trio.Event()


def _end_writeback(page: Page) -> None:
    assert page.written_back is not None
    page.written_back.set()
    page.written_back = None


async def _wait_written_back(page: Page) -> None:
    while page.written_back is not None:
        await page.written_back.wait()


class ModelledPageCache(KernelPageCache):
    """The page cache as `Daemon` has it, with `Kernel` behind its threads: what has begun goes on to its end."""

    def __init__(self, kernel: Kernel, threads: trio.Nursery) -> None:
        super().__init__(self)  # type: ignore[arg-type]
        self._kernel = kernel
        self._in_kernel = threads

    def file_of(self, idstr: str) -> tuple[FileRange, str]:
        return _range(0, self._kernel.page_count * CELLS), "/ram/pc.ram"

    may_be_mapped = True

    async def _in_thread(self, call: object, *args: object) -> None:  # type: ignore[override]
        ended = trio.Event()

        async def run() -> None:
            await (self._kernel.fsync() if call == self._fsync else self._kernel.evict(*args))  # type: ignore[arg-type]
            ended.set()

        await trio.lowlevel.checkpoint_if_cancelled()
        self._in_kernel.start_soon(run)
        await ended.wait()


def cells_of(pages: list[int]) -> Iterator[int]:
    """The cells of some pages."""
    for page in pages:
        yield from range(page * CELLS, (page + 1) * CELLS)
