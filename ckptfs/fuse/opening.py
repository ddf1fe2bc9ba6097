"""Opening a node, and giving it a size: the one place that knows which handle is whose."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import trio

from ckptfs.errors import CkptfsError, CommandError, StateError
from ckptfs.fuse.control import Control
from ckptfs.fuse.events import Changes, EventLog
from ckptfs.fuse.handles import (
    ControlHandle,
    EventsHandle,
    Handle,
    PagesHandle,
    RAMHandle,
    SaveImageHandle,
    SettingHandle,
    StatusHandle,
    TextHandle,
    ViewHandle,
)
from ckptfs.fuse.page_cache import KernelPageCache
from ckptfs.fuse.ram_files import Opener, RAMFiles
from ckptfs.fuse.sharing import Sharing
from ckptfs.fuse.view_files import ViewFiles
from ckptfs.guest.guest import Guest
from ckptfs.guest.views import refuse_written
from ckptfs.guest.vmstate import memory_on, vmstate
from ckptfs.namespace.options import MountOptions
from ckptfs.namespace.status import format_status, format_status_json
from ckptfs.namespace.tree import Node, NodeKind
from ckptfs.qemu.backends import RAMFile
from ckptfs.qemu.users import NOBODY, RAMUser, machines, ram_users

log = logging.getLogger(__name__)

_FindUser = Callable[[set[int], list[RAMFile]], tuple[RAMUser, list[RAMUser]]]
"""Given who has RAM open, and its files: who is to have the stream, and the others (blocks)."""


@contextmanager
def _refusal_logged(what: str, pid: int) -> Iterator[None]:
    """Whoever slips has an errno alone to go by."""
    try:
        yield
    except CkptfsError as error:
        log.warning("%s was refused to process %d: %s", what, pid, error)
        raise


class Opening:
    """Makes the handles of a mount's nodes."""

    def __init__(
        self,
        guest: Guest,
        options: MountOptions,
        ram_files: RAMFiles,
        page_cache: KernelPageCache,
        control: Control,
        changes: Changes,
        events: EventLog,
        sharing: Sharing,
        views: ViewFiles | None,
    ) -> None:
        self._guest = guest
        self._options = options
        self._ram_files = ram_files
        self._page_cache = page_cache
        self._control = control
        self._changes = changes
        self._events = events
        self._sharing = sharing
        self._views = views

    async def open(self, node: Node, opener: Opener) -> Handle:
        """Open a node. Raises StateError where it can't be opened, or not like that."""
        inode, subject, control = node.inode, node.subject, self._control
        match node.kind:
            case NodeKind.RAM:
                if opener.writes and self._guest.read_only:
                    raise StateError("the mount is read-only (ro)", errno.EROFS)
                with _refusal_logged("RAM", opener.pid):
                    if opener.writes and self._guest.machines.own_ram:
                        raise StateError(
                            f"{subject}: is a copy of the machine's RAM: the machine would not see what is written"
                            " here (`qmp none` lets go of it)",
                            errno.EROFS,
                        )
                    await self._sharing.refuse_second(subject, opener)
                if opener.flags & os.O_TRUNC:  # the kernel leaves it to us, and forgets what it has cached
                    in_use = await self._ram_files.in_use(inode)
                    with _refusal_logged("O_TRUNC", opener.pid):
                        self._guest.refuse_emptying(subject, in_use=in_use)
                block = self._guest.blocks[subject]
                handle = RAMHandle(inode, opener, self._guest, block, self._page_cache, self._ram_files)
                self._sharing.look_soon()
                return handle
            case NodeKind.PAGES:
                return PagesHandle(inode, opener, self._guest.blocks[subject])
            case NodeKind.CTL:
                return ControlHandle(inode, opener, control)
            case NodeKind.STATUS:
                return StatusHandle(inode, opener, self._changes, lambda: format_status(control.status()))
            case NodeKind.STATUS_JSON:
                return StatusHandle(inode, opener, self._changes, lambda: format_status_json(control.status()))
            case NodeKind.EVENTS:
                return EventsHandle(inode, opener, self._events)
            case NodeKind.PARAMETER:
                text = control.parameter_text(subject)
                return SettingHandle(inode, opener, text, lambda data: control.set_parameter(subject, data, opener))
            case NodeKind.CAPABILITY:
                text = control.capability_text(subject)
                return SettingHandle(
                    inode, opener, text, lambda data: control.set_capability(subject, data, opener)
                )
            case NodeKind.VIEW if self._views is not None:
                layout = self._views.layout(subject)
                with _refusal_logged(f"views/{subject}", opener.pid):
                    if layout.has_memory:
                        await self._guest.flush(
                            list(self._guest.blocks)
                        )  # a machine may have written what is there
                    refuse_written(self._guest, layout)
                return ViewHandle(inode, opener, self._guest, layout)
            case NodeKind.VMSTATE:
                return TextHandle(inode, opener, await self._vmstate(opener.pid, self._user_of(opener.pid)))
            case NodeKind.SAVE_IMAGE if self._guest.domain is not None and self._guest.base is not None:
                domain = self._guest.domain.on_mount(self._ram_files.mountpoint)
                running = self._guest.base.checkpoint.run_state == "running"
                head = domain.head(was_running=running, mapped_ram=False)
                begin = partial(self._vmstate, opener.pid, self._user_with_memory)
                return SaveImageHandle(inode, opener, head, begin)
        raise StateError(f"{node.name!r} can't be opened", errno.EACCES)

    async def truncate(self, node: Node, length: int, pid: int, by: Handle | None) -> None:
        """Give a RAM block its size; a shell truncates ctl and settings before it writes them: no matter.

        ``pid`` is who wants it, ``by`` the open file by which he does (ftruncate(2)).
        """
        if node.kind is NodeKind.RAM:
            has_size = self._guest.blocks[node.subject].used_length > 0
            in_use = not has_size and await self._ram_files.in_use(node.inode, but=by)
            with _refusal_logged("truncate", pid):
                self._guest.give_size(node.subject, length, in_use=in_use)
        elif node.kind not in (NodeKind.CTL, NodeKind.PARAMETER, NodeKind.CAPABILITY):
            raise CommandError(f"{node.name!r} has no size to set", errno.EPERM)

    async def refuse_in_use(self, node: Node) -> None:
        """Raise StateError (EBUSY) if anybody has the file of a RAM block open."""
        if await self._ram_files.in_use(node.inode):
            raise StateError(f"{node.subject}: somebody has it open")

    def _user_of(self, pid: int) -> _FindUser:
        return partial(ram_users, pid)

    def _user_with_memory(self, openers: set[int], files: list[RAMFile]) -> tuple[RAMUser, list[RAMUser]]:
        """The machine that has all of main memory, and the other machines; nobody if there is none (blocks)."""
        memory = set(memory_on(self._guest, self._options.backends).main)
        found = machines(openers, files)
        user = next((user for user in found if memory <= user.holds), NOBODY)
        return user, [other for other in found if other is not user]

    async def _vmstate(self, pid: int, find_user: _FindUser) -> bytes:
        """The stream that starts a machine on this RAM, for whoever has this RAM; process ``pid`` asks for it."""
        guest, ram_files = self._guest, self._ram_files
        memory = memory_on(guest, self._options.backends)
        try:
            await guest.flush(list(guest.blocks))  # the kernel may hold pages that a machine has written
            openers, files = ram_files.openers, ram_files.files(guest.blocks)
            user, others = await trio.to_thread.run_sync(find_user, openers, files)
            stream = await vmstate(guest, memory, user, others)
        except StateError as error:
            log.warning("vmstate was refused to process %d: %s", pid, error)
            guest.machines.note_vmstate(str(error))
            raise
        guest.machines.note_vmstate(None)
        return stream
