"""What there is on a mount: its nodes, how large they are, and how RAM blocks are made.

The form of the tree is `namespace.tree`; here it is that of one guest, as it is now.
"""

import errno
import time

from ckptfs.errors import CommandError
from ckptfs.fuse.events import EventLog
from ckptfs.fuse.report import describe_block
from ckptfs.fuse.view_files import ViewFiles
from ckptfs.guest.guest import Guest
from ckptfs.namespace.names import decode_name
from ckptfs.namespace.tree import RAM, VIEWS, Node, NodeKind, Tree, ram_xattrs


class Nodes:
    """The nodes of a mount. ``owner`` is (uid, gid) of all of them, ``mounted_at_ns`` their time."""

    def __init__(
        self, guest: Guest, owner: tuple[int, int], umask: int, views: ViewFiles | None, events: EventLog
    ) -> None:
        """``views`` is None where there are to be none."""
        self._guest = guest
        self._views = views
        self._events = events
        self._views_seen = 0
        self._tree = Tree(guest.blocks, has_views=views is not None, read_only=guest.read_only, umask=umask)
        self.owner = owner
        self.mounted_at_ns = time.time_ns()

    @property
    def tree(self) -> Tree:
        """What there is now: a live checkpoint brings device state, `save ram-only` loses it."""
        self._tree.has_vmstate = self._guest.has_device_state
        self._tree.has_save_image = self._guest.has_device_state and self._guest.domain is not None
        for idstr in list(self._guest.blocks)[self._tree.block_count :]:
            self._tree.add_block(idstr)
        if self._views is not None and self._views_seen != self._views.generation:
            self._views_seen = self._views.generation
            self._tree.set_views(self._views.names, self._views_seen)
        return self._tree

    async def look_into(self, inode: int) -> None:
        """Find out what is in a directory, where that takes more than to know it."""
        if inode == VIEWS.inode and self._views is not None:
            await self._views.refresh()

    def sizes(self, node: Node) -> tuple[int, int]:
        """Length and stored bytes of a node."""
        if node.kind is NodeKind.RAM:
            block = self._guest.blocks[node.subject]
            return block.used_length, block.stored_pages() * block.page_size
        if node.kind is NodeKind.PAGES:
            return self._guest.blocks[node.subject].page_count, 0
        if node.kind is NodeKind.VIEW and self._views is not None:
            layout = self._views.layout(node.subject)
            return layout.length, sum(extent.length for extent in layout.extents)
        if node.kind is NodeKind.EVENTS:
            return self._events.length, 0
        return 0, 0

    def capacity(self) -> tuple[int, int]:
        """Bytes of RAM, and how many of them are stored."""
        sizes = [self.sizes(node) for node in self.tree.list(RAM.inode)]
        return sum(size for size, _ in sizes), sum(stored for _, stored in sizes)

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        """The extended attributes of a node."""
        if node.kind not in (NodeKind.RAM, NodeKind.PAGES):
            return {}
        return ram_xattrs(describe_block(self._guest.blocks[node.subject]))

    def create(self, parent_inode: int, name: bytes) -> Node:
        """Make a RAM block of a fresh guest, without a size yet."""
        if parent_inode != RAM.inode:
            raise CommandError(f"{name!r}: files can be made in ram/ only", errno.EPERM)
        self._guest.add_block(decode_name(name), 0)
        node = self.tree.lookup(parent_inode, name)
        assert node is not None
        return node

    def remove(self, node: Node) -> None:
        """Take away a RAM block that never got a size. Raises StateError (EPERM) for any other."""
        self._guest.remove_block(node.subject)
        self._tree.remove_block(node)
