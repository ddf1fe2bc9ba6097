"""How RAM is brought to rest for the one moment of an epoch, while programs write it.

Pages dirtied through a shared mmap live in the kernel until it writes them back, one after another: between
the first and the last of them the writers go on, so a plain flush is no moment. FUSE can't stop such a
writer, but it can take his pages away: evicting a page writes it back and unmaps it, and the next access must
ask the daemon, which lets him wait until the epoch has begun.

A WRITE is carried out when it comes, whatever else: others may have seen what it wrote. What can wait is its
answer, and with it the program behind it. So, for every request that comes in while RAM is brought to rest:

=======================  ======================================  ============================================
its pages are            a READ is                               a WRITE is
=======================  ======================================  ============================================
still to be evicted      answered                                answered
under eviction just now  held                                    answered (most are the eviction's own); what
                                                                 it fills is evicted once more
evicted                  held                                    held; what it fills is evicted once more
=======================  ======================================  ============================================

Pages that a WRITE fills are up to date in the cache, and unlocked, before it is answered: anybody may map them and
change them meanwhile. All other pages of what is held are locked by it, and nobody sees them.

Evicting waits for locks. **Whatever is held may have one that the eviction waits for**: when it has not returned
for `PATIENCE`, held requests for the same pages are answered, and what READs brought in is evicted once more; then,
if nothing that is being carried out explains it, those nearby, and farther away, until it returns.

When nothing is left to evict, and no WRITE waits for the storage, the daemon has all that anybody can have seen,
and whoever touches a page waits.
"""

import itertools
import mmap
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from ckptfs.errors import StateError

PATIENCE = 0.005
"""Seconds for which an eviction may take its time before requests that are held are answered for its sake."""

SETTLE_DEADLINE = 20.0
"""Seconds in which RAM has to come to rest, or at least one more piece of it to be evicted."""

TIMES_OF_PATIENCE = 10
"""How often an eviction that writes pages back may take its time."""

WRITES_LET_THROUGH = 64
"""WRITEs that are answered at once though their pages are evicted not for the first time."""

PIECE_LENGTH = 1 << 20
AGAIN_LENGTH = 1 << 16
"""Bytes that are evicted at once, for the first time and again: the fewer, the less can come in its way."""


class FileRange(NamedTuple):
    """Bytes [start, stop) of the file with inode number ``inode``."""

    inode: int
    start: int
    stop: int

    def whole_pages(self) -> "FileRange":
        """The pages that this range touches: the kernel locks a page as a whole, for a byte of it as well."""
        return FileRange(self.inode, _page_down(self.start), _page_up(self.stop))

    def filled_pages(self) -> "FileRange":
        """The pages that lie in this range as a whole; none: an empty range."""
        start = _page_up(self.start)
        return FileRange(self.inode, start, max(start, _page_down(self.stop)))

    def first_page(self) -> "FileRange":
        """The page in which this range begins."""
        return FileRange(self.inode, _page_down(self.start), _page_down(self.start) + mmap.PAGESIZE)

    def without(self, other: "FileRange") -> list["FileRange"]:
        """What is left of this range when ``other`` is cut out of it."""
        if not self.overlaps(other):
            return [self]
        parts = (self.start, other.start), (other.stop, self.stop)
        return [FileRange(self.inode, start, stop) for start, stop in parts if start < stop]

    def widened(self, length: int) -> "FileRange":
        """This range and ``length`` bytes on either side."""
        return FileRange(self.inode, self.start - length, self.stop + length)

    def overlaps(self, other: "FileRange") -> bool:
        """Whether the two share a byte."""
        return self.inode == other.inode and self.start < other.stop and other.start < self.stop

    def contains(self, other: "FileRange") -> bool:
        """Whether all of ``other`` lies in this range."""
        return self.inode == other.inode and self.start <= other.start and other.stop <= self.stop

    def adjoins(self, other: "FileRange") -> bool:
        """Whether the two are one range together."""
        return self.inode == other.inode and self.start <= other.stop and other.start <= self.stop

    def hull(self, other: "FileRange") -> "FileRange":
        """The shortest range with both in it."""
        return FileRange(self.inode, min(self.start, other.start), max(self.stop, other.stop))


def _page_down(position: int) -> int:
    return position // mmap.PAGESIZE * mmap.PAGESIZE


def _page_up(position: int) -> int:
    return -(-position // mmap.PAGESIZE) * mmap.PAGESIZE


class UnderWay:
    """The requests that are being carried out just now."""

    def __init__(self) -> None:
        self._reads: dict[object, FileRange] = {}
        self._writes: dict[object, FileRange] = {}
        self._no_write = trio.Event()

    def begins(self, key: object, request: FileRange, *, writing: bool) -> None:
        """One more is, known by its ``key``."""
        (self._writes if writing else self._reads)[key] = request

    def ends(self, key: object, *, writing: bool) -> None:
        """It was carried out."""
        del (self._writes if writing else self._reads)[key]
        if writing and not self._writes:
            self._no_write.set()
            self._no_write = trio.Event()

    def any_in(self, pages: FileRange) -> bool:
        """Whether one is that concerns ``pages``."""
        return any(
            pages.overlaps(request) for requests in (self._reads, self._writes) for request in requests.values()
        )

    @property
    def any_write(self) -> bool:
        """Whether one is a WRITE."""
        return bool(self._writes)

    async def writes_end(self) -> None:
        """Return when there was a moment without any WRITE."""
        if self._writes:
            await self._no_write.wait()


@dataclass(eq=False)
class _Held:
    """A request that has not been answered."""

    pages: FileRange
    writing: bool
    may_be_answered: trio.Event = field(default_factory=trio.Event)


class Settling:
    """One attempt to bring all of ``files`` to rest; ``evict`` returns when the kernel has dropped a range."""

    def __init__(
        self, files: list[FileRange], evict: Callable[[FileRange], Awaitable[None]], under_way: UnderWay
    ) -> None:
        self._evict = evict
        self._under_way = under_way
        self._left = list(files)
        self._again: list[FileRange] = []
        self._active: FileRange | None = None
        self._active_for_the_first_time = False
        self._writes_let_through = 0
        self._writes_let_through_again = 0
        self._active_since = 0.0
        self._held: list[_Held] = []
        self._over = False

    def read_comes(self, request: FileRange, *, for_cache: bool) -> trio.Event | None:
        """Return what has to be waited for before a READ is carried out; None: nothing.

        ``for_cache``: it is the page cache that asks, so its pages were not there, and are locked now.
        """
        pages = request.whole_pages()
        if self._over:
            return None
        if _any_overlaps(self._left, pages):
            self._evict_again(pages)
            return None
        if for_cache:
            self._again = [part for piece in self._again for part in piece.without(pages)]
        return self._hold(pages, writing=False)

    def write_comes(self, request: FileRange) -> trio.Event | None:
        """Return what has to be waited for before a WRITE that was carried out is answered; None: nothing."""
        pages = request.whole_pages()
        if self._over:
            return None
        if request.start == pages.start or self._may_be_cached(request.first_page()):
            self._evict_again(request.filled_pages())
        # else it begins amid a page that was not there, and keeps all that it touches locked
        if _any_overlaps(self._left, pages) or (self._is_active(pages) and self._let_through()):
            return None
        return self._hold(pages, writing=True)

    def _let_through(self) -> bool:
        """Whether a WRITE under eviction is answered: most are the eviction's own, and it waits for them.

        But one who writes the same page again and again would have it evicted for ever.
        """
        self._writes_let_through += 1
        if not self._active_for_the_first_time:
            self._writes_let_through_again += 1
        return self._active_for_the_first_time or self._writes_let_through_again <= WRITES_LET_THROUGH

    def _may_be_cached(self, pages: FileRange) -> bool:
        return _any_overlaps(self._left, pages) or _any_overlaps(self._again, pages) or self._is_active(pages)

    def _is_active(self, pages: FileRange) -> bool:
        return self._active is not None and self._active.overlaps(pages)

    def _hold(self, pages: FileRange, *, writing: bool) -> trio.Event:
        held = _Held(pages, writing)
        self._held.append(held)
        return held.may_be_answered

    def _evict_again(self, pages: FileRange) -> None:
        if pages.start == pages.stop or any(piece.contains(pages) for piece in (*self._left, *self._again)):
            return
        apart = [piece for piece in self._again if not piece.adjoins(pages)]
        for piece in self._again:
            if piece.adjoins(pages):
                pages = pages.hull(piece)
        self._again = [*apart, pages]

    async def settle(self) -> None:
        """Evict until nothing is left to evict: from when this returns until the next await, RAM is at rest.

        Raises StateError (EBUSY) if writers or the storage don't let that happen, or the kernel does not return;
        and whatever ``evict`` raises.
        """
        with trio.CancelScope(deadline=trio.current_time() + SETTLE_DEADLINE) as scope:
            while True:
                if self._again:
                    self._active_for_the_first_time = False
                    await self._evict_piece(_take(self._again, AGAIN_LENGTH))
                elif self._left:
                    self._active_for_the_first_time = True
                    await self._evict_piece(_take(self._left, PIECE_LENGTH))
                    scope.deadline = trio.current_time() + SETTLE_DEADLINE
                elif self._under_way.any_write:  # somebody may have seen what it writes
                    await self._under_way.writes_end()
                else:
                    return
        raise self._not_at_rest()

    def _not_at_rest(self) -> StateError:
        if self._active is None:
            return StateError(f"a write to ram/ has waited {SETTLE_DEADLINE:g} s for the storage: try again")
        if trio.current_time() - self._active_since > SETTLE_DEADLINE / 2:
            return kernel_silent(SETTLE_DEADLINE)
        return StateError(
            f"programs that write RAM through mmap have kept writing for {SETTLE_DEADLINE:g} s; "
            "stop them and try again"
        )

    async def _evict_piece(self, piece: FileRange) -> None:
        self._active, self._active_since = piece, trio.current_time()
        error: OSError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._make_way, piece)
            try:
                await self._evict(piece)
            except OSError as failure:  # raised below: a nursery would make a group of it
                error = failure
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error
        self._active = None

    async def _make_way(self, piece: FileRange) -> None:
        """Have those answered who may hold up the eviction of ``piece``: near ones first, in the end all."""
        reach = 0
        for attempt in itertools.count(1):
            near = piece.widened(reach)
            in_the_way = [held for held in self._held if held.pages.overlaps(near)]
            before = self._writes_let_through
            await trio.sleep(PATIENCE)
            if self._writes_let_through != before and attempt % TIMES_OF_PATIENCE:
                continue  # it gets on
            for held in in_the_way:
                held.may_be_answered.set()
                if not held.writing:
                    self._evict_again(held.pages)
            self._held = [held for held in self._held if not held.may_be_answered.is_set()]
            if not self._under_way.any_in(piece):  # else it is that which the eviction waits for
                reach = min(2 * reach + mmap.PAGESIZE, 1 << 62)

    def release(self) -> None:
        """Let every held request be answered, and all that come later."""
        self._over = True
        for held in self._held:
            held.may_be_answered.set()
        self._held.clear()


def _any_overlaps(pieces: list[FileRange], pages: FileRange) -> bool:
    return any(piece.overlaps(pages) for piece in pieces)


def kernel_silent(seconds: float) -> StateError:
    """The kernel has not come back from what it was asked to do with the pages of RAM."""
    return StateError(
        f"the kernel has been busy with the pages of ram/ for {seconds:g} s and has written nothing back: try"
        " again; if that does not help, `umount -f` frees everybody who waits for the mount"
    )


def _take(ranges: list[FileRange], length: int) -> FileRange:
    """Take the next ``length`` bytes out of the last of ``ranges``."""
    inode, start, stop = ranges.pop()
    if start + length < stop:
        ranges.append(FileRange(inode, start + length, stop))
    return FileRange(inode, start, min(start + length, stop))
