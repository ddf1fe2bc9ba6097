"""One guest: its RAM, what it was restored from, and the operations that ctl asks for.

RAM is a base checkpoint (perhaps none) overlaid with the pages written since. A fresh guest has no base, an
incoming one has; a save writes base and overlay to a new checkpoint, which then becomes the base. There is
no other code path: saving a half-restored guest is the same as saving a fresh one.
"""

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Protocol
from uuid import UUID

import trio

from ckptfs.channels.backing_file import DirectIO
from ckptfs.channels.descriptors import Descriptors
from ckptfs.errors import CommandError, StateError, StorageError
from ckptfs.guest.base import BadPagesError, Base, BaseOptions
from ckptfs.guest.block import Content, GuestBlock
from ckptfs.guest.incoming import restore_blocks
from ckptfs.guest.layer import Layer, close_layers
from ckptfs.guest.machine import Machine
from ckptfs.guest.migration import Migration
from ckptfs.guest.outgoing import Epoch
from ckptfs.migration.capabilities import MigrationCapabilities
from ckptfs.migration.parameters import MigrationParameters
from ckptfs.migration.status import MigrationStatus
from ckptfs.qemu.backends import RAMFile

log = logging.getLogger(__name__)

PAGE_SIZE = 4096
"""Page size of a fresh guest in bytes."""

MAX_BLOCK_LENGTH = 1 << 44
"""Largest RAM block in bytes (16 TiB): its bitmaps take half a gigabyte each."""

BAD_PAGES_KEPT = 64
_ZEROS = memoryview(bytes(2 << 20))


class PageCache(Protocol):
    """The kernel's cache of RAM, above the daemon."""

    async def flush(self, idstrs: list[str]) -> None:
        """Have every page that was dirtied through mmap written to the daemon."""

    def settled(self, idstrs: list[str]) -> contextlib.AbstractAsyncContextManager[None]:
        """Within this, the daemon holds the newest content of every page, and nothing can change it."""
        ...

    async def forget(self, idstrs: Iterable[str]) -> None:
        """Have the kernel drop what it holds: the content has changed below it."""

    def files(self, idstrs: Iterable[str]) -> list[RAMFile]:
        """The files that the blocks are seen as."""
        ...


class Guest:
    """A guest's RAM and everything that can be done with it."""

    def __init__(self, blocks: list[GuestBlock], base: Base | None, page_size: int) -> None:
        self.blocks = {block.idstr: block for block in blocks}
        self.base = base
        self.page_size = page_size
        self.direct_io = None if base is None else base.direct_io
        """Whether pages went past the page cache of the backing file when that was last tried."""
        self.read_only = False
        self.restored = False
        """Whether all RAM is in memory, so that no backing file is needed."""
        self.parameters = MigrationParameters()
        self.capabilities = MigrationCapabilities()
        self.descriptors = Descriptors()
        self.uuid: UUID | None = None
        """What capability validate-uuid compares a checkpoint's with, and writes where the source has none."""
        self.shared: dict[str, str] = {}
        """Files of RAM that checkpoints may leave out, by idstr."""
        self.migration = Migration("migration", "")
        self.on_status: Callable[[MigrationStatus], None] = lambda status: None
        self.machine: Machine | None = None
        self.machine_ran = False
        """Whether a machine has been started from the base's device state, or was when it was taken."""
        self.vmstate_refusal: str | None = None
        """Why vmstate was last refused."""
        self.page_cache: PageCache | None = None
        self.mount_device = -1
        self.bad_pages: dict[tuple[str, int], str] = {}
        self.waiting_readers = 0
        """Reads that wait for the backing storage just now."""
        self.first_byte_at: float | None = None
        self.full_at: float | None = None
        """When the first page was served from the base, and when the last was restored (trio's clock)."""
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
        guest = cls([], None, base.checkpoint.page_size)
        guest.fill(base)
        return guest

    def fill(self, base: Base) -> None:
        """Make ``base`` what RAM is restored from, and take it over; where that fails, it is closed."""
        page_size = base.checkpoint.page_size
        blocks = {}
        with contextlib.ExitStack() as undo:
            undo.callback(base.close)
            self.refuse_filled()
            for block in base.checkpoint.blocks:
                base_block = base.blocks.get(block.idstr)
                blocks[block.idstr] = GuestBlock(block.idstr, block.page_count, page_size, base_block)
                undo.callback(blocks[block.idstr].close)
            undo.pop_all()
        self.page_size = page_size
        self.base = base
        self.note_direct_io(base.path, base.direct_io)
        self.blocks.update(blocks)

    def refuse_filled(self) -> None:
        """Only an empty guest can be filled from a checkpoint."""
        if self.blocks or self.base is not None:
            raise StateError("this mount has RAM already: mount `none` to fill it from a checkpoint", errno.EEXIST)

    def add_block(self, idstr: str, used_length: int) -> None:
        """Give a fresh guest one more RAM block, of zero pages; of no pages until `give_size` if need be."""
        self._refuse_fixed(idstr)
        self.blocks[idstr] = GuestBlock(idstr, self._page_count(idstr, used_length), self.page_size)

    def give_size(self, idstr: str, used_length: int, *, in_use: bool) -> None:
        """Give a block of a fresh guest its size in bytes, once and for good.

        ``in_use``: somebody else has its file open. Raises StateError (EPERM, EBUSY), CommandError.
        """
        block = self.blocks[idstr]
        if used_length == block.used_length:
            return
        if block.used_length:
            raise StateError(f"{idstr}: has {block.used_length} bytes, and keeps that size", errno.EPERM)
        if in_use:
            raise StateError(f"{idstr}: somebody else has it open: it gets its size from the one who made it")
        self._refuse_fixed(idstr)
        block.give_size(self._page_count(idstr, used_length))

    def refuse_emptying(self, idstr: str, *, in_use: bool) -> None:
        """Opening a block's file with O_TRUNC drops its content: StateError where there is any to lose.

        ``in_use``: somebody else has the file open (EBUSY); else, if pages hold data, EPERM.
        """
        if in_use:
            raise StateError(f"{idstr}: somebody has it open or mapped, and would lose his RAM by O_TRUNC")
        if self.blocks[idstr].stack.with_data().count():
            raise StateError(
                f"{idstr}: holds data, which O_TRUNC would drop: `dd conv=notrunc` writes over it, "
                "`reset` drops what was written",
                errno.EPERM,
            )

    def _page_count(self, idstr: str, used_length: int) -> int:
        if used_length % self.page_size:
            raise CommandError(f"{idstr}: size {used_length} is not a multiple of the page size, {self.page_size}")
        if used_length > MAX_BLOCK_LENGTH:
            raise CommandError(f"{idstr}: size {used_length} is more than {MAX_BLOCK_LENGTH}", errno.EFBIG)
        return used_length // self.page_size

    def _refuse_fixed(self, idstr: str) -> None:
        if self.base is not None:
            raise StateError(f"{idstr}: the RAM blocks of a guest that has a checkpoint are fixed", errno.EPERM)
        if self.migration.running:
            raise StateError(f"{idstr}: a {self.migration.kind} is running: RAM blocks are fixed until it ends")

    def close(self) -> None:
        """Give everything back."""
        for block in self.blocks.values():
            block.close()
        if self.base is not None and not self.restored:
            self.base.close()

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
        data: memoryview | None = None
        while data is None:
            segments = list(block.stack.segments(start, stop))
            if len(segments) == 1 and isinstance(segments[0].source, Layer):
                return segments[0].source.view(start, stop)
            if any(segment.source is Content.BASE for segment in segments):
                data = await self._fetch(block, start, stop)
            else:
                data = memoryview(bytes((stop - start) * self.page_size))
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

    async def _fetch(self, block: GuestBlock, start: int, stop: int) -> memoryview | None:
        """Return pages [start, stop) as the base has them, zeros where it has none.

        None if the pages have to be looked for anew: a save put another base in its place meanwhile, with all
        that was written above the former one, or a restore brought everything in and closed it.
        """
        base = self.base
        assert base is not None
        self.waiting_readers += 1
        try:
            data = await base.fetch(block.idstr, start, stop, self.page_size, urgent=True)
        except StorageError as error:
            if self.base is not base or self.restored:
                return None
            data = self._sound_data(block, error)
        finally:
            self.waiting_readers -= 1
        if self.base is not base or block.stack.base is None:
            return None
        for run in block.stack.base.file_bmap.runs(start, stop):
            block.received.set(*run)
        if self.first_byte_at is None:
            self.first_byte_at = trio.current_time()
        return data

    def _sound_data(self, block: GuestBlock, error: StorageError) -> memoryview:
        """Return what a read gave in spite of ``error`` if all bad pages were written since, or raise it."""
        if not isinstance(error, BadPagesError):
            raise error
        if error.data is None or any(block.stack.locate(x, x + 1).source is Content.BASE for x in error.pages):
            self._note_bad_pages(error)
            raise error
        return error.data

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
            while not self.writers_run:
                await self._writers_may_go.wait()
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

    def freeze(self, idstrs: Iterable[str]) -> Epoch:
        """Begin an epoch: RAM as it is at this moment; what is written from now on goes above it."""
        return Epoch({idstr: self.blocks[idstr].freeze() for idstr in idstrs}, self.base)

    async def thaw(self) -> None:
        """End every epoch that was not saved: what was written above it moves down into it."""
        for block in self.blocks.values():
            while len(block.stack.written) > 1:
                *_, upper, lower = block.stack.written
                while lower.absorb_some(upper):
                    await trio.lowlevel.checkpoint()
                # nothing was awaited since the last page moved, so `upper` is empty
                block.drop_layer(upper)
                upper.close()

    # ---- migrations: one at a time -----------------------------------------------------------------

    @asynccontextmanager
    async def migrating(self, migration: Migration) -> AsyncIterator[None]:
        """Run a migration: its states, its cancellation, and one error out of many tasks."""
        if self.migration.running:
            raise StateError(f"a {self.migration.kind} is running: wait for it, or cancel it")
        self.migration = migration
        migration.advance(MigrationStatus.SETUP)
        try:
            with migration.cancel_scope:
                yield
        except BaseException as error:
            leading = leading_error(error)
            if isinstance(leading, OSError):  # whatever name it has is one of ours on the way there
                leading = StorageError(f"{migration.uri}: {leading.strerror}", leading.errno)
            migration.fail(str(leading))
            if leading is error:
                raise
            raise leading from error
        if migration.cancel_scope.cancelled_caught:
            migration.advance(MigrationStatus.CANCELLED)
            raise StateError(f"the {migration.kind} was cancelled", errno.ECANCELED)
        migration.advance(MigrationStatus.COMPLETED)

    async def cancel(self) -> str:
        """Cancel the running migration and wait for its end; StateError (EINVAL) if there is none."""
        migration = self.migration
        if not migration.running:
            raise StateError("nothing is running that could be cancelled", errno.EINVAL)
        if migration.status is not MigrationStatus.CANCELLING:
            migration.advance(MigrationStatus.CANCELLING)
            migration.cancel_scope.cancel()
        await migration.over.wait()
        return f"{migration.kind} {migration.status}"

    @asynccontextmanager
    async def settled(self) -> AsyncIterator[None]:
        """Bring RAM to rest; where writers are stopped it is at rest already, and a flush would wait for them."""
        if self.page_cache is None or not self.writers_run:
            yield
            return
        async with self.page_cache.settled(list(self.blocks)):
            yield

    @property
    def has_device_state(self) -> bool:
        """Whether the base holds more than RAM."""
        return self.base is not None and self.base.checkpoint.has_device_state

    def base_options(self) -> BaseOptions:
        """How a checkpoint is read here."""
        uuid = self.uuid if self.capabilities.validate_uuid else None
        return BaseOptions(self.requested_direct_io(), self.parameters.multifd_channels, self.shared, uuid=uuid)

    def requested_direct_io(self) -> DirectIO:
        """As QEMU: without multifd it has no effect, so that it can't be required either."""
        return DirectIO(self.parameters.direct_io, self.parameters.direct_io_required and self.capabilities.multifd)

    def note_direct_io(self, path: str, direct_io: bool | None) -> None:
        """Keep how pages went when last it mattered, and log once that direct I/O can't be had."""
        if direct_io is False and self.direct_io is not False:
            log.info("%s: no O_DIRECT there: pages go through the page cache of its file system", path)
        self.direct_io = self.direct_io if direct_io is None else direct_io

    async def restore(self) -> str:
        """Bring in everything that only the checkpoint has; after that its file is not needed any more."""
        if self.base is None or self.restored:
            return "nothing to restore: all RAM is in memory"
        migration = Migration("restore", self.base.path, self.on_status)
        async with self.migrating(migration):
            migration.advance(MigrationStatus.ACTIVE)
            await restore_blocks(
                self.base, list(self.blocks.values()), self.parameters.multifd_channels, migration.progress
            )
            self.restored = True
            self.full_at = trio.current_time()
            await self.base.aclose()
        return f"restored {self.base.path}: {migration.summary()}"

    async def reset(self) -> str:
        """Drop every written page: RAM is the checkpoint again.

        The caller sees to it that nobody writes meanwhile.
        """
        if self.migration.running:
            raise StateError(f"a {self.migration.kind} is running: wait for it, or cancel it")
        page_count = sum(block.written.count() for block in self.blocks.values())
        layers: list[Layer] = []
        with contextlib.ExitStack() as undo:  # all blocks, or none
            for block in self.blocks.values():
                layers.append(Layer(block.idstr, block.page_count, block.page_size))
                undo.callback(layers[-1].close)
            undo.pop_all()
        dropped: list[Layer] = []
        for block, layer in zip(self.blocks.values(), layers, strict=True):
            dropped += block.reset(layer)
        self.machine_ran = False
        try:
            if self.page_cache is not None:
                await self.page_cache.forget(self.blocks)
        finally:
            await close_layers(dropped)
        return f"{page_count} written pages dropped"

    @property
    def has_written(self) -> bool:
        """Whether any page was written since the base."""
        return any(block.written.any(0, block.page_count) for block in self.blocks.values())

    @property
    def writers_run(self) -> bool:
        """Whether writers of RAM are let through."""
        return self._writers_may_go.is_set()

    async def hold_writers(self) -> None:
        """Let writes wait, from one moment on: RAM stays what it is then, for readers of the daemon and for saves.

        Through a shared mapping a program can go on changing its pages in the kernel's page cache; they reach RAM
        when writers go on.
        """
        async with self.settled():
            if self.writers_run:
                self._writers_may_go = trio.Event()

    def let_writers_go(self) -> None:
        """Let them go on."""
        self._writers_may_go.set()

    @property
    def direct_io_state(self) -> str:
        """``on`` or ``off``, and why it is off though it was not switched off."""
        if not self.parameters.direct_io:
            return "off"
        if self.direct_io is False:
            return "off: the file system does not support O_DIRECT"
        return "on"


def leading_error(error: BaseException) -> BaseException:
    """The error that matters in a group of them: the first that is no consequence of the others' end."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [leading_error(inner) for inner in error.exceptions]
    return next((leaf for leaf in leaves if not isinstance(leaf, trio.Cancelled)), leaves[0])
