"""pyfuse3's handlers: they translate, and never decide.

Any exception but FUSEError in a handler ends the daemon, and a VM that runs on the mount gets SIGBUS. So every
handler goes through `_translated`: our errors and the system's become their errno, anything else EIO, with the
traceback in the log.
"""

import errno
import functools
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, InodeT, RequestContext, SetattrFields, StatvfsData

from ckptfs.errors import CkptfsError
from ckptfs.fuse import connection
from ckptfs.fuse.handles import Handle
from ckptfs.fuse.nodes import Nodes
from ckptfs.fuse.opening import Opening
from ckptfs.fuse.outcome import errno_of
from ckptfs.fuse.ram_files import Opener
from ckptfs.namespace.tree import Node, NodeKind

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

ATTRIBUTE_TIMEOUT = 1.0
"""Seconds for which the kernel may believe a size or st_blocks that it was told."""


_NAMES_THAT_CHANGE = frozenset({NodeKind.CTL, NodeKind.VIEW})
"""Nodes whose name may lead to another inode a moment later."""


def _translated(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    @functools.wraps(handler)
    async def translated(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except FUSEError:
            raise
        except trio.Cancelled:
            if connection.is_gone():  # there is nobody to be told
                raise
            raise FUSEError(errno.ENOTCONN) from None  # the mount ends: who waits lets go of the locks that he has
        except (CkptfsError, OSError) as error:
            raise FUSEError(errno_of(error)) from error
        except Exception:
            log.exception("%s failed", handler.__name__)
            raise FUSEError(errno.EIO) from None

    return translated


class Operations(pyfuse3.Operations):
    """One mount's handlers; what there is, is in `nodes`, and what an open file does in `handles`."""

    supports_dot_lookup = True
    enable_writeback_cache = False  # write(2) reaches the daemon before it returns: a save sees it

    def __init__(self, nodes: Nodes, opening: Opening) -> None:
        super().__init__()
        self._nodes = nodes
        self._opening = opening
        self._handles: dict[int, Handle] = {}
        self._next_fh = 1
        self.initialized = trio.Event()

    def init(self) -> None:
        """The kernel has answered: requests come from now on."""
        self.initialized.set()

    # ---- nodes -------------------------------------------------------------------------------------

    def _node(self, inode: int) -> Node:
        node = self._nodes.tree.node(inode)
        if node is None:
            raise FUSEError(errno.ENOENT)
        return node

    def _attributes(self, node: Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(node.inode)
        entry.st_mode = cast(Any, self._nodes.tree.mode(node))
        entry.st_nlink = self._nodes.tree.link_count(node)
        entry.st_uid, entry.st_gid = self._nodes.owner
        entry.st_size, stored = self._nodes.sizes(node)
        entry.st_blksize = 1 << 20
        entry.st_blocks = stored // 512
        # a time that changed would make the kernel drop the pages it has cached
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._nodes.mounted_at_ns
        entry.attr_timeout = ATTRIBUTE_TIMEOUT
        entry.entry_timeout = 0.0 if node.kind in _NAMES_THAT_CHANGE else ATTRIBUTE_TIMEOUT
        return entry

    @_translated
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """stat(2)."""
        return self._attributes(self._node(inode))

    @_translated
    async def lookup(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name."""
        await self._nodes.look_into(parent_inode)
        node = self._nodes.tree.lookup(parent_inode, name)
        if node is None:
            raise FUSEError(errno.ENOENT)
        return self._attributes(self._nodes.tree.entry(node))

    @_translated
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """truncate(2): makes the RAM block of a fresh guest. Owner and mode are the mount's, and stay."""
        node = self._node(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise FUSEError(errno.EPERM)
        if fields.update_size:
            await self._opening.truncate(node, attr.st_size, ctx.pid, None if fh is None else self._handles[fh])
        return self._attributes(node)

    @_translated
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> int:
        """Directories are listed by inode number."""
        if not self._node(inode).is_directory:
            raise FUSEError(errno.ENOTDIR)
        await self._nodes.look_into(inode)
        return inode

    @_translated
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List what comes after inode number ``start_id``."""
        for node in self._nodes.tree.list(fh):
            if node.inode > start_id and not pyfuse3.readdir_reply(
                token, node.name, self._attributes(self._nodes.tree.entry(node)), node.inode
            ):
                break

    @_translated
    async def releasedir(self, fh: int) -> None:
        """Nothing is kept for an open directory."""

    @_translated
    async def access(self, inode: InodeT, mode: int, ctx: RequestContext) -> bool:
        """The kernel checks permissions by itself (default_permissions)."""
        return True

    @_translated
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """df(1): the size of RAM and what of it is stored."""
        total, stored = self._nodes.capacity()
        data = StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = total // 4096
        data.f_bfree = data.f_bavail = (total - stored) // 4096
        data.f_namemax = 255
        return data

    @_translated
    async def getxattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        """user.ckptfs.* of a RAM block's files."""
        value = self._nodes.xattrs(self._node(inode)).get(name)
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value

    @_translated
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[bytes]:
        """The names of those."""
        return list(self._nodes.xattrs(self._node(inode)))

    async def _not_permitted(self, *_: Any, **__: Any) -> NoReturn:
        """Names and links are the mount's own; without a handler the kernel would say ENOSYS."""
        raise FUSEError(errno.EPERM)

    mknod = mkdir = symlink = link = rename = rmdir = _not_permitted

    @_translated
    async def unlink(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        """Take back a RAM block of a fresh guest that was made by mistake: it has no size."""
        node = self._nodes.tree.lookup(parent_inode, name)
        if node is None:
            raise FUSEError(errno.ENOENT)
        if node.kind is not NodeKind.RAM:
            raise FUSEError(errno.EPERM)
        await self._opening.refuse_in_use(node)
        self._nodes.remove(node)

    # ---- open files --------------------------------------------------------------------------------

    @_translated
    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file; what it does from then on is its `Handle`'s."""
        return self._opened(await self._opening.open(self._node(inode), self._opener(flags, ctx)))

    @_translated
    async def create(
        self, parent_inode: InodeT, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a RAM block of a fresh guest: empty until it gets its size by truncate(2)."""
        node = self._nodes.create(parent_inode, name)
        return self._opened(await self._opening.open(node, self._opener(flags, ctx))), self._attributes(node)

    @staticmethod
    def _opener(flags: int, ctx: RequestContext) -> Opener:
        return Opener(flags, ctx.pid, ctx.uid, ctx.gid)

    def _opened(self, handle: Handle) -> FileInfo:
        fh = self._next_fh
        self._next_fh += 1
        self._handles[fh] = handle
        return handle.file_info(fh)

    @_translated
    async def read(self, fh: int, offset: int, size: int) -> bytes:
        """read(2), and page faults of mappings."""
        # any buffer will do (pyfuse3 takes it by the buffer protocol); its stub says bytes
        return cast(bytes, await self._handles[fh].read(offset, size))

    @_translated
    async def write(self, fh: int, offset: int, buf: bytes) -> int:
        """write(2), and pages that the kernel writes back."""
        return await self._handles[fh].write(offset, buf)

    @_translated
    async def poll(
        self, inode: InodeT, fh: int, poll_handle: pyfuse3.PollHandle | None, ctx: RequestContext
    ) -> int:
        """poll(2) on status and events."""
        return self._handles[fh].poll(poll_handle)

    @_translated
    async def flush(self, fh: int) -> None:
        """close(2): nothing is held back here, but RELEASE may follow."""
        self._handles[fh].flush()

    @_translated
    async def fsync(self, fh: int, datasync: bool) -> None:
        """fsync(2): the kernel has written back what it held, and that is all there is to do."""

    @_translated
    async def release(self, fh: int) -> None:
        """The last descriptor and the last mapping are gone."""
        self._handles.pop(fh).release()
