"""One guest: its RAM, what it was restored from, and the operations that ctl asks for.

RAM is a base checkpoint (perhaps none) overlaid with the pages written since. A fresh guest has no base, an
incoming one has; a save writes base and overlay to a new checkpoint, which then becomes the base. There is
no other code path: saving a half-restored guest is the same as saving a fresh one.
"""

import contextlib
import errno
import logging
from typing import Protocol

import trio

from ckptfs.errors import CommandError, StateError, StorageError
from ckptfs.guest.base import BadPagesError, Base
from ckptfs.guest.block import Content, GuestBlock
from ckptfs.guest.layer import Layer
from ckptfs.guest.outgoing import Epoch, Progress

log = logging.getLogger(__name__)

PAGE_SIZE = 4096
"""Page size of a fresh guest in bytes."""

BAD_PAGES_KEPT = 64
_ZEROS = memoryview(bytes(2 << 20))


class PageCache(Protocol):
    """The kernel's cache of RAM, above the daemon."""

    async def flush(self, idstrs: list[str]) -> None:
        """Have every page that was dirtied through mmap written to the daemon."""

    def settled(self, idstrs: list[str]) -> contextlib.AbstractAsyncContextManager[None]:
        """Within this, the daemon holds the newest content of every page, and nothing can change it."""
        ...


class Guest:
    """A guest's RAM and everything that can be done with it."""

    def __init__(self, blocks: list[GuestBlock], base: Base | None, page_size: int) -> None:
        self.blocks = {block.idstr: block for block in blocks}
        self.base = base
        self.page_size = page_size
        self.page_cache: PageCache | None = None
        self.bad_pages: dict[tuple[str, int], str] = {}
        self.progress = Progress()
        self._writers_may_go = trio.Event()
        self._writers_may_go.set()

    @classmethod
    def fresh(cls, blocks: list[tuple[str, int]]) -> "Guest":
        """A guest of zero pages: (idstr, used_length in bytes) for each RAM block."""
        guest = cls([], None, PAGE_SIZE)
        for idstr, used_length in blocks:
            guest.add_block(idstr, used_length)
        return guest

    @classmethod
    def incoming(cls, base: Base) -> "Guest":
        """A guest whose RAM is ``base``, restored as it is read."""
        page_size = base.image.page_size
        blocks = [
            GuestBlock(idstr, used_length // page_size, page_size, base.blocks[idstr])
            for idstr, used_length in base.image.blocks
        ]
        return cls(blocks, base, page_size)

    def add_block(self, idstr: str, used_length: int) -> GuestBlock:
        """Give a fresh guest one more RAM block, of zero pages."""
        if self.base is not None:
            raise StateError(f"{idstr}: the RAM blocks of a restored guest are fixed", errno.EPERM)
        if used_length <= 0 or used_length % self.page_size:
            raise CommandError(
                f"{idstr}: size {used_length} is not a positive multiple of the page size, {self.page_size}"
            )
        block = GuestBlock(idstr, used_length // self.page_size, self.page_size)
        self.blocks[idstr] = block
        return block

    # ---- reading and writing RAM -------------------------------------------------------------------

    async def read(self, block: GuestBlock, block_offset: int, length: int) -> memoryview:
        """Return RAM from ``block_offset`` on, ``length`` bytes or up to the end of the block.

        Raises BadPagesError (EIO) if a page that is in the checkpoint can't be read.
        """
        length = min(length, block.used_length - block_offset)
        if length <= 0:
            return _ZEROS[:0]
        start = block_offset // self.page_size
        stop = -(-(block_offset + length) // self.page_size)
        segment = block.stack.locate(start, stop)
        skip = block_offset - start * self.page_size
        if segment.stop < stop or segment.source is Content.BASE:
            return (await self._gather(block, start, stop))[skip : skip + length]
        if segment.source is Content.ZERO:
            return _ZEROS[:length]
        return segment.source.view(start, stop)[skip : skip + length]

    async def _gather(self, block: GuestBlock, start: int, stop: int) -> memoryview:
        """Return pages [start, stop) from wherever they are, as they are when this returns."""
        segment = block.stack.locate(start, stop)
        if segment.stop == stop and isinstance(segment.source, Layer):
            return segment.source.view(start, stop)
        data = await self._fetch(block, start, stop)
        held = [
            (segment.start - start, segment.source.view(segment.start, segment.stop))
            for segment in block.stack.segments(start, stop)
            if isinstance(segment.source, Layer)
        ]
        if not held:
            return data
        pages = memoryview(bytearray(data))  # `data` may be somebody else's as well
        for page, view in held:
            pages[page * self.page_size : page * self.page_size + len(view)] = view
        return pages

    async def _fetch(self, block: GuestBlock, start: int, stop: int) -> memoryview:
        """Return pages [start, stop) as the base has them, zeros where it has none."""
        while (base := self.base) is not None and block.stack.base is not None:
            try:
                data = await base.fetch(block.idstr, start, stop, self.page_size, urgent=True)
            except BadPagesError as error:
                self._note_bad_pages(error)
                raise
            except StorageError:
                if self.base is base:
                    raise
                continue  # a save put a new base in its place meanwhile
            for run in block.stack.base.file_bmap.runs(start, stop):
                block.received.set(*run)
            return data
        return memoryview(bytes((stop - start) * self.page_size))

    async def write(self, block: GuestBlock, block_offset: int, data: bytes) -> int:
        """Write ``data`` into RAM; return how much of it fitted before the end of the block.

        The checkpoint that a page came from is never touched. Raises StorageError (ENOSPC) at the end of the
        block and OSError when memory runs out.
        """
        length = min(len(data), block.used_length - block_offset)
        if length <= 0:
            raise StorageError(f"{block.idstr}: ends at byte {block.used_length:#x}", errno.ENOSPC)
        data = data if length == len(data) else data[:length]
        end = block_offset + length
        edges = {
            page
            for page in (block_offset // self.page_size, (end - 1) // self.page_size)
            if page * self.page_size < block_offset or end < (page + 1) * self.page_size
        }
        # no await between the last look at the top layer and the write: a save puts a new layer on top
        while True:
            if not self._writers_may_go.is_set():
                await self._writers_may_go.wait()
                continue
            page = self._not_on_top(block, edges)
            if page is None:
                break
            await self._fill(block, page)
        block.store(block_offset, data)
        return length

    @staticmethod
    def _not_on_top(block: GuestBlock, pages: set[int]) -> int | None:
        return next((page for page in pages if not block.stack.written[0].present.test(page)), None)

    async def _fill(self, block: GuestBlock, page: int) -> None:
        """Bring a page that is going to be written in part into the top layer."""
        content = await self._gather(block, page, page + 1)
        if not block.stack.written[0].present.test(page):
            block.store(page * self.page_size, content)

    def _note_bad_pages(self, error: BadPagesError) -> None:
        for page in error.pages[: BAD_PAGES_KEPT - len(self.bad_pages)]:
            self.bad_pages[error.idstr, page] = str(error)

    # ---- epochs ------------------------------------------------------------------------------------

    def freeze(self) -> Epoch:
        """Begin an epoch: RAM as it is at this moment; what is written from now on goes above it."""
        return Epoch({idstr: block.freeze() for idstr, block in self.blocks.items()}, self.base)

    async def thaw(self, epoch: Epoch) -> None:
        """End an epoch that was not saved: what was written above it moves down into it."""
        for idstr, frozen in epoch.stacks.items():
            block = self.blocks[idstr]
            lower = frozen.written[0]
            while len(block.stack.written) > len(frozen.written):
                upper = block.stack.written[-len(frozen.written) - 1]
                while lower.absorb_some(upper):
                    await trio.lowlevel.checkpoint()
                # nothing was awaited since the last page moved, so `upper` is empty
                block.drop_layer(upper)
                upper.close()

    def rebase(self, epoch: Epoch, base: Base) -> None:
        """Put the checkpoint that ``epoch`` was saved to below what was written since."""
        former = self.base
        for idstr, frozen in epoch.stacks.items():
            self.blocks[idstr].rebase(frozen, base.blocks[idstr])
        self.base = base
        if former is not None:
            former.close()
