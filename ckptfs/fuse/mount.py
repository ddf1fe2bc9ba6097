"""One mount: the guest below, the tree above, and everything that starts and ends with it."""

import errno
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager

import pyfuse3
import trio

from ckptfs.channels.identity import Identity
from ckptfs.errors import CkptfsError, CommandError, StateError
from ckptfs.fuse.control import Control
from ckptfs.fuse.daemon import Starter
from ckptfs.fuse.events import Changes, EventLog
from ckptfs.fuse.handles import (
    ControlHandle,
    EventsHandle,
    Handle,
    Opener,
    PagesHandle,
    RAMHandle,
    SettingHandle,
    StatusHandle,
    TextHandle,
)
from ckptfs.fuse.operations import Operations
from ckptfs.fuse.page_cache import FileRange, KernelPageCache
from ckptfs.fuse.report import describe_block
from ckptfs.fuse.tuning import tune_backing_device
from ckptfs.guest.guest import Guest
from ckptfs.guest.opening import open_checkpoint
from ckptfs.guest.vmstate import backends_on, vmstate
from ckptfs.migration.address import SeekableAddress
from ckptfs.migration.status import MigrationStatus
from ckptfs.namespace import tree as nodes
from ckptfs.namespace.names import decode_name
from ckptfs.namespace.options import MountOptions
from ckptfs.namespace.status import format_status, format_status_json
from ckptfs.namespace.tree import Node, NodeKind, Tree, ram_xattrs
from ckptfs.qemu.backends import RAMFile
from ckptfs.qemu.users import ram_users

log = logging.getLogger(__name__)

MIN_TASKS = 4
MAX_TASKS = 2000
"""Tasks of pyfuse3's session loop: a few always wait for requests (starting one costs as much as a small read);
many may be inside one, as every writer that `stop` holds back is."""


class _Option(str):
    """A mount option: pyfuse3 asks it for its bytes, and would take ASCII alone, but a path may hold anything."""

    def encode(self, encoding: str = "", errors: str = "") -> bytes:
        return os.fsencode(str(self))


@contextmanager
def _refusal_logged(what: str, pid: int) -> Iterator[None]:
    """Whoever tries to change a size has an errno alone to go by, and mostly did not mean to."""
    try:
        yield
    except CkptfsError as error:
        log.warning("%s was refused to process %d: %s", what, pid, error)
        raise


class Mount:
    """What `Operations` and `Control` ask about this mount, and its life from mount to umount."""

    def __init__(
        self,
        guest: Guest,
        mountpoint: str,
        source: str,
        options: MountOptions,
        spec: SeekableAddress | None,
    ) -> None:
        self.guest = guest
        self.mountpoint = mountpoint
        self.options = options
        self.spec = spec
        self.owner = (
            os.getuid() if options.uid is None else options.uid,
            os.getgid() if options.gid is None else options.gid,
        )
        self.mounted_at_ns = time.time_ns()
        self._mounted_at = 0.0
        self._tree = Tree(guest.blocks, read_only=options.read_only, umask=options.umask)
        self.changes = Changes()
        self.events = EventLog()
        guest.on_status = self._on_status
        self.operations = Operations(self)
        self.source = source
        self.control: Control
        self.page_cache: KernelPageCache

    @property
    def tree(self) -> Tree:
        """What there is now: a live checkpoint brings device state, `save ram-only` loses it."""
        self._tree.has_vmstate = self.guest.has_device_state
        for idstr in list(self.guest.blocks)[self._tree.block_count :]:
            self._tree.add_block(idstr)
        return self._tree

    # ---- what the handlers ask ---------------------------------------------------------------------

    def sizes(self, node: Node) -> tuple[int, int]:
        """Length and stored bytes of a node."""
        if node.kind is NodeKind.RAM:
            block = self.guest.blocks[node.subject]
            return block.used_length, block.stack.with_data().count() * block.page_size
        if node.kind is NodeKind.PAGES:
            return self.guest.blocks[node.subject].page_count, 0
        return 0, 0

    def capacity(self) -> tuple[int, int]:
        """Bytes of RAM, and how many of them are stored."""
        sizes = [self.sizes(node) for node in self.tree.list(nodes.RAM.inode)]
        return sum(size for size, _ in sizes), sum(stored for _, stored in sizes)

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        """The extended attributes of a node."""
        if node.kind not in (NodeKind.RAM, NodeKind.PAGES):
            return {}
        return ram_xattrs(describe_block(self.guest.blocks[node.subject]))

    def create(self, parent_inode: int, name: bytes) -> Node:
        """Make a RAM block of a fresh guest, without a size yet."""
        if parent_inode != nodes.RAM.inode:
            raise CommandError(f"{name!r}: files can be made in ram/ only", errno.EPERM)
        self.guest.add_block(decode_name(name), 0)
        node = self.tree.lookup(parent_inode, name)
        assert node is not None
        return node

    async def truncate(self, node: Node, length: int, pid: int, fh: int | None) -> None:
        """Give a RAM block its size; a shell truncates ctl and settings before it writes them: no matter.

        ``pid`` is who wants it, ``fh`` the file by which he does (ftruncate(2)).
        """
        if node.kind is NodeKind.RAM:
            has_size = self.guest.blocks[node.subject].used_length > 0
            in_use = not has_size and await self.operations.in_use(node.inode, but=fh)
            with _refusal_logged("truncate", pid):
                self.guest.give_size(node.subject, length, in_use=in_use)
        elif node.kind not in (NodeKind.CTL, NodeKind.PARAMETER, NodeKind.CAPABILITY):
            raise CommandError(f"{node.name!r} has no size that could be set", errno.EPERM)

    async def fill(self, source: SeekableAddress, identity: Identity) -> None:
        """Make an empty mount the incoming side of a checkpoint (migrate_incoming)."""
        guest = self.guest
        guest.refuse_filled()
        guest.fill(
            await trio.to_thread.run_sync(
                open_checkpoint, source, identity, guest.descriptors, guest.base_options(), guest.mount_device
            )
        )

    async def open(self, node: Node, opener: Opener) -> Handle:
        """Open a node: the one place that knows which handle is whose."""
        inode = node.inode
        match node.kind:
            case NodeKind.RAM:
                if opener.writes and self.guest.read_only:
                    raise StateError("the mount is read-only (ro)", errno.EROFS)
                if opener.flags & os.O_TRUNC:  # the kernel leaves it to us, and forgets what it has cached
                    in_use = await self.operations.in_use(inode)
                    with _refusal_logged("O_TRUNC", opener.pid):
                        self.guest.refuse_emptying(node.subject, in_use=in_use)
                block = self.guest.blocks[node.subject]
                return RAMHandle(inode, opener, self.guest, block, self.page_cache)
            case NodeKind.PAGES:
                return PagesHandle(inode, opener, self.guest.blocks[node.subject])
            case NodeKind.CTL:
                return ControlHandle(inode, opener, self.control)
            case NodeKind.STATUS:
                return StatusHandle(inode, opener, self.changes, lambda: format_status(self.control.status()))
            case NodeKind.STATUS_JSON:
                return StatusHandle(inode, opener, self.changes, lambda: format_status_json(self.control.status()))
            case NodeKind.EVENTS:
                return EventsHandle(inode, opener, self.events)
            case NodeKind.PARAMETER:
                text = f"{self.guest.parameters.get(node.subject)}\n".encode()
                return SettingHandle(
                    inode, opener, text, lambda data: self.control.set_parameter(node.subject, data)
                )
            case NodeKind.CAPABILITY:
                text = self.control.capability_text(node.subject)
                return SettingHandle(
                    inode, opener, text, lambda data: self.control.set_capability(node.subject, data)
                )
            case NodeKind.VMSTATE:
                return TextHandle(inode, opener, await self._vmstate(opener))
        raise StateError(f"{node.name!r} can't be opened", errno.EACCES)

    async def _vmstate(self, opener: Opener) -> bytes:
        """The stream that starts a machine on this RAM, for whoever has this RAM as his own."""
        guest = self.guest
        await self.page_cache.flush(list(guest.blocks))  # the kernel may hold pages that a machine has written
        left_out = backends_on(guest, self.options.backends)
        user, others = await trio.to_thread.run_sync(
            ram_users, opener.pid, self.operations.ram_openers(), self.files(left_out)
        )
        try:
            stream = await vmstate(guest, left_out, user, others)
        except StateError as error:
            log.warning("vmstate was refused to process %d: %s", opener.pid, error)
            guest.vmstate_refusal = str(error)
            raise
        guest.vmstate_refusal = None
        return stream

    def milliseconds_since(self, moment: float | None) -> int | None:
        """From the mount to ``moment`` on trio's clock."""
        return None if moment is None else round((moment - self._mounted_at) * 1000)

    def _on_status(self, status: MigrationStatus) -> None:
        """A migration went on: events (QEMU's capability of that name) and status tell."""
        self.changes.note()
        if self.guest.capabilities.events:
            self.events.publish("MIGRATION", {"status": str(status)})
            if status is MigrationStatus.ACTIVE:
                self.events.publish("MIGRATION_PASS", {"pass": 1})  # an epoch is saved in one pass

    # ---- the page cache's view ---------------------------------------------------------------------

    def files(self, idstrs: Iterable[str]) -> list[RAMFile]:
        """The blocks' files, as stat(2) tells them apart."""
        files = ((idstr, *self.file_of(idstr)) for idstr in idstrs)
        return [RAMFile(idstr, path, self.guest.mount_device, file.inode) for idstr, file, path in files]

    def file_of(self, idstr: str) -> tuple[FileRange, str]:
        """Inode, length and path of a block's file."""
        node = next(node for node in self.tree.list(nodes.RAM.inode) if node.subject == idstr)
        path = os.path.join(self.mountpoint, "ram", os.fsdecode(node.name))
        return FileRange(node.inode, 0, self.guest.blocks[idstr].used_length), path

    def ram_may_be_mapped(self) -> bool:
        """Whether any process may have a shared writable mapping of RAM."""
        return self.operations.ram_may_be_mapped()

    # ---- life --------------------------------------------------------------------------------------

    async def serve(self, starter: Starter) -> None:
        """Mount, serve until umount or a signal, and leave nothing behind.

        A save that runs when the mount goes away is finished; a signal cancels it. If this raises, the mount
        point stays dead (ENOTCONN): better than an empty directory that looks like a guest without memory.
        """
        self._mounted_at = trio.current_time()
        # from before there is a mount until it is gone: a signal in between must not leave a dead one
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            pyfuse3.init(self.operations, self.mountpoint, self._fuse_options())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_on_signal, signals, nursery)
                nursery.start_soon(self._set_up, nursery, starter)
                await pyfuse3.main(MIN_TASKS, MAX_TASKS)
                log.info("%s: unmounted", self.mountpoint)
                migration = self.guest.migration
                if migration.running and migration.kind == "save":
                    await migration.over.wait()
                nursery.cancel_scope.cancel()
            pyfuse3.close(unmount=True)
        self.guest.close()

    async def _set_up(self, nursery: trio.Nursery, starter: Starter) -> None:
        """What needs an answering mount: its device number, its tuning, its background work."""
        await self.operations.initialized.wait()
        device = (await trio.to_thread.run_sync(os.stat, self.mountpoint)).st_dev
        self.guest.mount_device = device
        self.page_cache = KernelPageCache(self, device)
        self.guest.page_cache = self.page_cache
        self.control = Control(self, nursery)
        if refused := await trio.to_thread.run_sync(tune_backing_device, device):
            log.info("only root can tune the mount: %s left as it was", ", ".join(refused))
        if self.options.prefetch and self.guest.base is not None:
            self.control.start_restore()
        starter.mounted()
        log.info("%s: mounted on %s", self.source, self.mountpoint)

    async def _end_on_signal(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        async for number in signals:
            log.info("%s: ending on %s", self.mountpoint, signal.Signals(number).name)
            pyfuse3.terminate()
            nursery.cancel_scope.cancel()

    def _fuse_options(self) -> set[str]:
        """Options for libfuse; a comma or backslash in ``fsname`` would end it and begin another option."""
        source = self.source.replace("\\", "\\\\").replace(",", "\\,")
        options = {"default_permissions", _Option(f"fsname={source}"), "subtype=ckptfs"}
        if self.options.allow_other:
            options.add("allow_other")
        return options  # not ro, with which nobody could open ctl: the daemon itself refuses to change RAM
