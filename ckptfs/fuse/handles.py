"""What an open file does: one class for each kind of node.

A handle translates between FUSE's requests and the guest; it decides nothing.
"""

import errno
import os
import select
from collections.abc import Awaitable, Callable
from functools import partial

from pyfuse3 import FileInfo, FUSEError, PollHandle

from ckptfs.fuse.control import Control
from ckptfs.fuse.events import READABLE, Changes, EventLog, Waiters
from ckptfs.fuse.page_cache import KernelPageCache
from ckptfs.fuse.ram_files import Opener, RAMFiles
from ckptfs.fuse.settling import FileRange
from ckptfs.guest.block import GuestBlock
from ckptfs.guest.guest import Guest
from ckptfs.guest.views import read_layout, refuse_written
from ckptfs.physical.layouts import Layout

Buffer = bytes | memoryview


class Handle:
    """An open file. The defaults are those of a file that can be neither read nor written."""

    direct_io = True
    """Whether the kernel must ask for every read: True for all files that change by themselves."""

    def __init__(self, inode: int, opener: Opener) -> None:
        self.inode = inode
        self.opener = opener

    def file_info(self, fh: int) -> FileInfo:
        """What the kernel is told about this open file."""
        return FileInfo(fh=fh, direct_io=self.direct_io, keep_cache=not self.direct_io)

    async def read(self, offset: int, length: int) -> Buffer:
        """Return up to ``length`` bytes from ``offset`` on; fewer only at the end."""
        raise FUSEError(errno.EACCES)

    async def write(self, offset: int, data: bytes) -> int:
        """Write and return how many bytes were taken."""
        raise FUSEError(errno.EACCES)

    def poll(self, poll_handle: PollHandle | None) -> int:
        """Return the poll(2) events that are there now; keep ``poll_handle`` to tell of later ones."""
        return select.POLLIN | select.POLLOUT

    def flush(self) -> None:
        """close(2) was called on one of its descriptors; `release` may follow."""

    def release(self) -> None:
        """The last descriptor and the last mapping of it are gone."""


class TextHandle(Handle):
    """A text as it was when the file was opened: vmstate, and the files of settings."""

    def __init__(self, inode: int, opener: Opener, text: bytes) -> None:
        super().__init__(inode, opener)
        self._text = text

    async def read(self, offset: int, length: int) -> Buffer:
        return self._text[offset : offset + length]


class SaveImageHandle(Handle):
    """A save image of libvirt: libvirtd reads the head, and the QEMU that it has started then the stream.

    So the stream is made when it is read first; ``begin`` raises what is against that.
    """

    def __init__(self, inode: int, opener: Opener, head: bytes, begin: Callable[[], Awaitable[bytes]]) -> None:
        super().__init__(inode, opener)
        self._head = head
        self._begin = begin
        self._stream: bytes | None = None

    async def read(self, offset: int, length: int) -> Buffer:
        if offset < len(self._head):
            return self._head[offset : offset + length]
        if self._stream is None:
            self._stream = await self._begin()
        start = offset - len(self._head)
        return self._stream[start : start + length]


class StatusHandle(Handle):
    """status and status.json: as it is when it is read from its beginning; poll(2) tells of a later change."""

    def __init__(self, inode: int, opener: Opener, changes: Changes, describe: Callable[[], str]) -> None:
        super().__init__(inode, opener)
        self._changes = changes
        self._describe = describe
        self._text = b""
        self._seen = -1

    async def read(self, offset: int, length: int) -> Buffer:
        if offset == 0:
            self._seen = self._changes.count
            self._text = self._describe().encode()
        return self._text[offset : offset + length]

    def poll(self, poll_handle: PollHandle | None) -> int:
        self._changes.waiters.add(self, poll_handle)
        return READABLE | select.POLLPRI if self._seen != self._changes.count else 0

    def release(self) -> None:
        self._changes.waiters.remove(self)


class EventsHandle(Handle):
    """events: what has happened since it was opened, a line each; poll(2) tells when there is more."""

    def __init__(self, inode: int, opener: Opener, events: EventLog) -> None:
        super().__init__(inode, opener)
        self._events = events
        self._text = b""
        events.open(self)

    async def read(self, offset: int, length: int) -> Buffer:
        self._text += self._events.take(self)
        part, self._text = self._text[:length], self._text[length:]
        return part

    def poll(self, poll_handle: PollHandle | None) -> int:
        self._events.waiters.add(self, poll_handle)
        return READABLE if self._text or self._events.pending(self) else 0

    def release(self) -> None:
        self._events.close(self)


class RAMHandle(Handle):
    """ram/NAME: the guest's memory, cached by the kernel."""

    direct_io = False

    def __init__(
        self,
        inode: int,
        opener: Opener,
        guest: Guest,
        block: GuestBlock,
        page_cache: KernelPageCache,
        ram_files: RAMFiles,
    ) -> None:
        super().__init__(inode, opener)
        self._guest = guest
        self._block = block
        self._page_cache = page_cache
        self._ram_files = ram_files
        ram_files.opened(self, inode, opener)

    async def read(self, offset: int, length: int) -> Buffer:
        request = FileRange(self.inode, offset, offset + length)
        async with self._page_cache.read(request, for_cache=not self.opener.flags & os.O_DIRECT):
            return await self._guest.read(self._block, offset, length)

    async def write(self, offset: int, data: bytes) -> int:
        async with self._page_cache.written(FileRange(self.inode, offset, offset + len(data))):
            return await self._guest.write(self._block, offset, data)

    def flush(self) -> None:
        self._ram_files.closed(self)

    def release(self) -> None:
        self._ram_files.released(self)


class ViewHandle(Handle):
    """views/NAME: a checkpoint's memory in another form, cached by the kernel."""

    direct_io = False

    def __init__(self, inode: int, opener: Opener, guest: Guest, layout: Layout) -> None:
        super().__init__(inode, opener)
        self._guest = guest
        self._layout = layout

    async def read(self, offset: int, length: int) -> Buffer:
        refuse_written(self._guest, self._layout)
        return await read_layout(self._guest, self._layout, offset, length)


class PagesHandle(Handle):
    """pages/NAME: one byte a page, computed as it is read."""

    def __init__(self, inode: int, opener: Opener, block: GuestBlock) -> None:
        super().__init__(inode, opener)
        self._block = block

    async def read(self, offset: int, length: int) -> Buffer:
        stop = min(offset + length, self._block.page_count)
        if offset >= stop:
            return b""
        return self._block.page_states(offset, stop).tobytes()


class ControlHandle(Handle):
    """ctl: one command a write; the answer is read from the same open file, wherever its position is.

    One that was opened with O_NONBLOCK takes the command and returns at once; poll(2) tells of the answer.
    """

    def __init__(self, inode: int, opener: Opener, control: Control) -> None:
        super().__init__(inode, opener)
        self._control = control
        self._identity = opener.identity()
        self._answer = control.last.line
        self._running = False
        self._waiters = Waiters()

    async def write(self, offset: int, data: bytes) -> int:
        if self._running:
            raise FUSEError(errno.EAGAIN)
        self._answer = b""
        if self.opener.flags & os.O_NONBLOCK:
            self._running = True
            self._control.start_soon(partial(self._go_on, data))
            return len(data)
        outcome = await self._control.execute(data, self.opener, self._identity)
        self._answer = outcome.line
        if outcome.errno:
            raise FUSEError(outcome.errno)
        return len(data)

    async def _go_on(self, data: bytes) -> None:
        outcome = await self._control.execute(data, self.opener, self._identity)
        self._answer = outcome.line
        self._running = False
        self._waiters.wake()

    def poll(self, poll_handle: PollHandle | None) -> int:
        self._waiters.add(self, poll_handle)
        return 0 if self._running else READABLE | select.POLLOUT

    def release(self) -> None:
        self._waiters.remove(self)

    async def read(self, offset: int, length: int) -> Buffer:
        if self._running and self.opener.flags & os.O_NONBLOCK:
            raise FUSEError(errno.EAGAIN)
        part, self._answer = self._answer[:length], self._answer[length:]
        return part


class SettingHandle(TextHandle):
    """parameters/NAME and capabilities/NAME: the value, one line; a write sets it."""

    def __init__(self, inode: int, opener: Opener, text: bytes, change: Callable[[bytes], None]) -> None:
        super().__init__(inode, opener, text)
        self._change = change

    async def write(self, offset: int, data: bytes) -> int:
        self._change(data)
        return len(data)
