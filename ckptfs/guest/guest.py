"""One guest: its RAM, what it was restored from, and the operations that ctl asks for.

RAM is a base checkpoint (perhaps none) overlaid with the pages written since. A fresh guest has no base, an
incoming one has; a save writes base and overlay to a new checkpoint, which then becomes the base. There is
no other code path: saving a half-restored guest is the same as saving a fresh one.
"""

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

import numpy as np
import trio

from ckptfs.errors import CommandError, StateError, StorageError
from ckptfs.foreign.libvirt import Domain
from ckptfs.guest.base import BadPagesError, Base
from ckptfs.guest.block import Content, GuestBlock, Segment
from ckptfs.guest.incoming import restore_blocks
from ckptfs.guest.layer import Layer, close_layers
from ckptfs.guest.machine import Machines
from ckptfs.guest.migration import Migrations
from ckptfs.guest.outgoing import Epoch
from ckptfs.guest.page_cache import NoPageCache, PageCache
from ckptfs.guest.readers import Readers
from ckptfs.guest.settings import Settings
from ckptfs.mapped_ram.bitmap import Run
from ckptfs.migration.outgoing import coalesce, page_windows
from ckptfs.migration.status import MigrationStatus
from ckptfs.namespace.status import counted

log = logging.getLogger(__name__)

PAGE_SIZE = 4096
"""Page size of a fresh guest in bytes."""

MAX_BLOCK_LENGTH = 1 << 44
"""Largest RAM block in bytes (16 TiB): its bitmaps take half a gigabyte each."""

_ZEROS = memoryview(bytes(2 << 20))


class Guest:
    """A guest's RAM and everything that can be done with it."""

    def __init__(
        self, settings: Settings | None = None, machines: Machines | None = None, *, read_only: bool = False
    ) -> None:
        """A guest without any RAM yet."""
        self.settings: Final = settings or Settings()
        self.machines: Final = machines or Machines()
        self.migrations: Final = Migrations()
        self.readers: Final = Readers()
        self.read_only: Final = read_only
        self._blocks: dict[str, GuestBlock] = {}
        self._page_size = PAGE_SIZE
        self._base: Base | None = None
        self._restored = False
        self._direct_io: bool | None = None
        self._page_cache: PageCache = NoPageCache()
        self._writers_may_go = trio.Event()
        self._writers_may_go.set()

    @classmethod
    def fresh(cls, blocks: Iterable[tuple[str, int]]) -> "Guest":
        """A guest of zero pages: (idstr, used_length in bytes) for each RAM block."""
        guest = cls()
        for idstr, used_length in blocks:
            guest.add_block(idstr, used_length)
        return guest

    @classmethod
    def incoming(cls, base: Base) -> "Guest":
        """A guest whose RAM is ``base``, restored as it is read."""
        guest = cls()
        guest.fill(base)
        return guest

    @property
    def blocks(self) -> Mapping[str, GuestBlock]:
        """Its RAM blocks by idstr, in the order in which they came."""
        return self._blocks

    @property
    def base(self) -> Base | None:
        """The checkpoint below what was written; of a guest that was `restored` it is closed."""
        return self._base

    @property
    def domain(self) -> Domain | None:
        """The machine as libvirt knows it, where the checkpoint does."""
        return None if self._base is None else self._base.domain

    @property
    def page_size(self) -> int:
        """In bytes: the base's, or that of a fresh guest."""
        return self._page_size

    @property
    def restored(self) -> bool:
        """Whether all RAM is in memory, so that no backing file is needed."""
        return self._restored

    @property
    def page_cache(self) -> PageCache:
        """The kernel's cache of RAM, if it is mounted."""
        return self._page_cache

    def mounted(self, page_cache: PageCache) -> None:
        """RAM is seen through ``page_cache`` from now on."""
        self._page_cache = page_cache

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
        self._page_size = page_size
        self._base = base
        self.note_direct_io(base.path, base.direct_io)
        self._blocks.update(blocks)

    def refuse_filled(self) -> None:
        """Only an empty guest can be filled from a checkpoint."""
        if self.blocks or self.base is not None:
            raise StateError("this mount already has RAM: mount `none` to fill it from a checkpoint", errno.EEXIST)

    def add_block(self, idstr: str, used_length: int) -> None:
        """Give a guest one more RAM block, of zero pages; of no pages until `give_size` if need be.

        One with a checkpoint can have more only for memory to be plugged into its machine.
        """
        self._refuse_fixed(idstr)
        self._blocks[idstr] = GuestBlock(idstr, self._page_count(idstr, used_length), self.page_size)

    def remove_block(self, idstr: str) -> None:
        """Forget a block that never got a size. Raises StateError (EPERM) for one that has pages."""
        if self.blocks[idstr].used_length:
            raise StateError(f"{idstr}: is RAM of the guest, which can't be removed", errno.EPERM)
        self._refuse_fixed(idstr)
        self._blocks.pop(idstr).close()

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
            raise StateError(f"{idstr}: somebody else has it open: only whoever created it can set its size")
        self._refuse_fixed(idstr)
        block.give_size(self._page_count(idstr, used_length))

    def refuse_emptying(self, idstr: str, *, in_use: bool) -> None:
        """Opening a block's file with O_TRUNC drops its content: StateError where there is any to lose.

        ``in_use``: somebody else has the file open (EBUSY); else, if pages hold data, EPERM.
        """
        if in_use:
            raise StateError(f"{idstr}: somebody has it open or mapped, and O_TRUNC would destroy their RAM")
        if self.blocks[idstr].stored_pages():
            raise StateError(
                f"{idstr}: contains data, which O_TRUNC would destroy: `dd conv=notrunc` overwrites it, `reset`"
                " drops what was written",
                errno.EPERM,
            )

    def _page_count(self, idstr: str, used_length: int) -> int:
        if used_length % self.page_size:
            raise CommandError(f"{idstr}: size {used_length} is not a multiple of the page size, {self.page_size}")
        if used_length > MAX_BLOCK_LENGTH:
            raise CommandError(f"{idstr}: size {used_length} is more than {MAX_BLOCK_LENGTH}", errno.EFBIG)
        return used_length // self.page_size

    def _refuse_fixed(self, idstr: str) -> None:
        if self.base is not None and self.machines.bound is None:
            raise StateError(
                f"{idstr}: a guest that has a checkpoint gets no new RAM blocks; to plug memory into a machine,"
                " bind its QMP socket first (qmp SOCKET)",
                errno.EPERM,
            )
        migration = self.migrations.newest
        if migration.running:
            raise StateError(f"{idstr}: a {migration.kind} is running: RAM blocks are fixed until it ends")

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
        skip = block_offset - start * self.page_size
        return (await self._gather(block, start, stop))[skip : skip + length]

    async def _gather(self, block: GuestBlock, start: int, stop: int) -> memoryview:
        """Return pages [start, stop) from wherever they are, as they are when this returns."""
        data: memoryview | None = None
        while data is None:
            segment = block.stack.locate(start, stop)
            if segment.stop == stop and isinstance(segment.source, Layer):
                return segment.source.view(start, stop)
            if segment.stop == stop and segment.source is Content.ZERO:
                return _ZEROS[: (stop - start) * self.page_size]
            if any(segment.source is Content.BASE for segment in block.stack.segments(start, stop)):
                data = await self._fetch(block, start, stop)
            else:
                data = _ZEROS[: (stop - start) * self.page_size]
        held = block.stack.held(start, stop)
        if not held:
            return data
        pages = memoryview(bytearray(data))  # `data` may be somebody else's as well
        for layer, first, last in held:
            at = (first - start) * self.page_size
            pages[at : at + (last - first) * self.page_size] = layer.view(first, last)
        return pages

    async def _fetch(self, block: GuestBlock, start: int, stop: int) -> memoryview | None:
        """Return pages [start, stop) as the base has them, zeros where it has none.

        None if the pages have to be looked for anew: a save put another base in its place meanwhile, with all
        that was written above the former one, or a restore brought everything in and closed it.
        """
        base = self.base
        assert base is not None
        try:
            with self.readers.wait():
                data = await base.fetch(block.idstr, start, stop, self.page_size, urgent=True)
        except StorageError as error:
            if self.base is not base or self.restored:
                return None
            data = self._sound_data(block, error)
        if self.base is not base or block.stack.base is None:
            return None
        block.received.add(block.stack.base.file_bmap, start, stop)
        self.readers.note_served()
        return data

    def _sound_data(self, block: GuestBlock, error: StorageError) -> memoryview:
        """Return what a read gave in spite of ``error`` if all bad pages were written since, or raise it."""
        if not isinstance(error, BadPagesError):
            raise error
        if error.data is None or any(block.stack.locate(x, x + 1).source is Content.BASE for x in error.pages):
            self.readers.note_bad_pages(error)
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
        if self.writers_run and not block.turns.any_before(block_offset, end):
            if self._edge_not_on_top(block, block_offset, end) is None:
                block.store(block_offset, data)
                return length
            self._store_filled(block, block_offset, data)
        async with block.turns.taken(block_offset, end):
            await self._store_when_possible(block, block_offset, data)
        return length

    def _store_filled(self, block: GuestBlock, block_offset: int, data: bytes) -> None:
        """Store the pages that ``data`` fills: those who have them mapped may have seen it before it came here."""
        start = -(-block_offset // self.page_size) * self.page_size
        stop = (block_offset + len(data)) // self.page_size * self.page_size
        if start < stop:
            block.store(start, memoryview(data)[start - block_offset : stop - block_offset])

    async def _store_when_possible(self, block: GuestBlock, block_offset: int, data: bytes) -> None:
        """Store ``data`` once writers run, and what else is in its first and last page is in the top layer."""
        # no await between the last look at the top layer and the write: a save puts a new layer on top
        while True:
            while not self.writers_run:
                await self._writers_may_go.wait()
            page = self._edge_not_on_top(block, block_offset, block_offset + len(data))
            if page is None:
                break
            await self._fill(block, page)
        block.store(block_offset, data)

    def _edge_not_on_top(self, block: GuestBlock, start: int, stop: int) -> int | None:
        """The first or last page of bytes [start, stop), if it is covered in part and not in the top layer."""
        for page in (start // self.page_size, (stop - 1) // self.page_size):
            covered = start <= page * self.page_size and (page + 1) * self.page_size <= stop
            if not covered and not block.stack.written[0].present.test(page):
                return page
        return None

    async def _fill(self, block: GuestBlock, page: int) -> None:
        """Bring a page that is going to be written in part into the top layer."""
        content = await self._gather(block, page, page + 1)
        if not block.stack.written[0].present.test(page):
            block.store(page * self.page_size, content)

    async def flush(self, idstrs: list[str]) -> None:
        """Have the pages that the kernel holds, and programs have changed, written to RAM.

        Raises StateError (EBUSY) if the kernel does not get on with that, as it can't while `stop` holds writers.
        """
        if not self.writers_run:
            raise StateError(
                "writers of ram/ are held back (stop), and the kernel may still have what they wrote: `cont` first"
            )
        await self._page_cache.flush(idstrs)

    # ---- epochs ------------------------------------------------------------------------------------

    def freeze(self, idstrs: Iterable[str]) -> Epoch:
        """Begin an epoch: RAM as it is at this moment; what is written from now on goes above it."""
        return Epoch({idstr: self.blocks[idstr].freeze() for idstr in idstrs}, self.base)

    async def rebase(self, epoch: Epoch, fresh: dict[str, GuestBlock], base: Base) -> None:
        """Put the checkpoint that ``epoch`` was saved to below what was written since.

        ``fresh`` are empty blocks for those that the machine handed over. The checkpoint has its final name
        already, so a lack of memory is no error here: RAM is then read from it.
        """
        former = None if self.restored else self.base  # that of a restored guest is closed
        if self.restored:
            try:
                await _keep_in_memory(epoch)
            except OSError as error:
                log.warning("%s: RAM is no longer all in memory: %s", base.path, error.strerror)
                self._restored = False
        dropped: list[Layer] = []
        for idstr, frozen in epoch.stacks.items():
            if idstr not in epoch.carried:
                dropped += self.blocks[idstr].rebase(frozen, base.blocks[idstr], keep_restored=self.restored)
            else:
                # its file, if it has one, shows from now on what the machine had
                block = self._blocks.setdefault(idstr, fresh[idstr])
                dropped += block.replace(frozen, fresh[idstr], base.blocks[idstr], keep_restored=self.restored)
        gone = [block for block in self.blocks.values() if block.stack.base and block.idstr not in epoch.stacks]
        for block in gone:
            block.forget_base()
        self._base, self._page_size = base, base.checkpoint.page_size
        await close_layers(dropped)
        if self.restored:
            await base.aclose()
        elif former is not None:
            await former.aclose()
        if epoch.carried or gone:
            try:
                await self._page_cache.forget([*epoch.carried, *(block.idstr for block in gone)])
            except StateError as error:
                log.warning("ram/ may show what was there before the save: %s", error)

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

    # ---- what ctl asks for -------------------------------------------------------------------------

    @asynccontextmanager
    async def settled(self) -> AsyncIterator[None]:
        """Bring RAM to rest; where writers are stopped it is at rest already, and a flush would wait for them."""
        if not self.writers_run:
            yield
            return
        async with self.page_cache.settled(list(self.blocks)):
            yield

    @property
    def has_device_state(self) -> bool:
        """Whether the base holds more than RAM."""
        return self.base is not None and self.base.checkpoint.has_device_state

    def note_direct_io(self, path: str, direct_io: bool | None) -> None:
        """Keep how pages went when last it mattered, and log once that direct I/O can't be had."""
        if direct_io is False and self._direct_io is not False:
            log.info("%s: no O_DIRECT there: pages go through the page cache of its file system", path)
        self._direct_io = self._direct_io if direct_io is None else direct_io

    async def restore(self) -> str:
        """Bring in everything that only the checkpoint has; after that its file is not needed any more."""
        if self.base is None or self.restored:
            return "nothing to restore: all RAM is in memory"
        async with self.migrations.run("restore", self.base.path) as migration:
            migration.advance(MigrationStatus.ACTIVE)
            await restore_blocks(
                self.base, list(self.blocks.values()), self.settings.parameters.multifd_channels, migration.progress
            )
            self._restored = True
            self.readers.note_full()
            await self.base.aclose()
        return f"restored {self.base.path}: {migration.summary()}"

    async def drop_unchanged(self) -> None:
        """Forget written pages that hold what the checkpoint holds.

        A page that was faulted for writing counts as written, whatever was done to it: QEMU's prealloc=on touches
        all of RAM before it starts.
        """
        for block in self.blocks.values():
            for window in page_windows(block.written, self.page_size):
                for run in list(block.written.runs(*window)):
                    await self._drop_unchanged(block, run)

    async def _drop_unchanged(self, block: GuestBlock, run: Run) -> None:
        base, beneath = self.base, replace(block.stack, written=())
        content = b""
        for segment in beneath.segments(*run):
            part = await self._content(block, segment)
            if part is None:
                return
            content += part
        # no await from here on: what is compared is what is dropped
        if self.base is not base or self.migrations.newest.running:
            return
        (layer,) = block.stack.written
        if not layer.present.all(*run):
            return
        pages = np.frombuffer(layer.view(*run), np.uint8).reshape(-1, self.page_size)
        former = np.frombuffer(content, np.uint8).reshape(-1, self.page_size)
        for start, stop in coalesce((pages == former).all(axis=1)):
            layer.discard(run.start + start, run.start + stop)

    async def _content(self, block: GuestBlock, segment: Segment) -> memoryview | None:
        """What a segment holds; None if the base was replaced meanwhile."""
        if isinstance(segment.source, Layer):
            return segment.source.view(segment.start, segment.stop)
        if segment.source is Content.ZERO:
            return _ZEROS[: (segment.stop - segment.start) * self.page_size]
        return await self._fetch(block, segment.start, segment.stop)

    async def reset(self) -> str:
        """Drop every written page: RAM is the checkpoint again.

        The caller sees to it that nobody writes meanwhile.
        """
        self.migrations.refuse_running()
        page_count = self.written_page_count
        layers: list[Layer] = []
        with contextlib.ExitStack() as undo:  # all blocks, or none
            for block in self.blocks.values():
                layers.append(Layer(block.idstr, block.page_count, block.page_size))
                undo.callback(layers[-1].close)
            undo.pop_all()
        dropped: list[Layer] = []
        for block, layer in zip(self.blocks.values(), layers, strict=True):
            dropped += block.reset(layer)
        self.machines.note_reset()
        try:
            await self.page_cache.forget(self.blocks)
        finally:
            await close_layers(dropped)
        return f"{counted(page_count, 'written page')} dropped"

    @property
    def written_page_count(self) -> int:
        """How many pages were written since the base."""
        return sum(block.written.count() for block in self.blocks.values())

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
        if not self.settings.parameters.direct_io:
            return "off"
        if self._direct_io is False:
            return "off: the file system does not support O_DIRECT"
        return "on"


async def _keep_in_memory(epoch: Epoch) -> None:
    """A guest that was restored as a whole stays independent of any file: its pages stay in memory."""
    for idstr, stack in epoch.stacks.items():
        if idstr in epoch.carried:
            continue
        assert stack.restored is not None
        for layer in reversed(stack.written):
            while stack.restored.absorb_some(layer):
                await trio.lowlevel.checkpoint()
