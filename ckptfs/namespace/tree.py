"""What the mount looks like, here and only here: `FILES` says what there is.

Inode numbers are fixed for the life of the mount, but those of ctl (`Tree.entry`) and of views: the fixed nodes
have theirs, parameters and capabilities are numbered in QEMU's order, blocks in the order in which they were added.
Sizes are no business of the tree.
"""

import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto
from errno import EEXIST, ENAMETOOLONG
from itertools import count

from ckptfs.errors import CommandError, StateError
from ckptfs.migration.capabilities import CAPABILITIES
from ckptfs.migration.parameters import PARAMETERS
from ckptfs.namespace.names import NAME_MAX, encode_name
from ckptfs.namespace.status import BlockStatus

ROOT_INODE = 1
"""As FUSE has it."""

XATTR_PREFIX = b"user.ckptfs."

_FIRST_PARAMETER_INODE = 0x100
_FIRST_CAPABILITY_INODE = 0x200
_FIRST_BLOCK_INODE = 0x1000
_FIRST_VIEW_INODE = 1 << 31
_VIEW_INODES = 16
_FIRST_CTL_INODE = 1 << 32


class NodeKind(Enum):
    """What a node is; a shell has one way to open each."""

    DIRECTORY = auto()
    CTL = auto()
    STATUS = auto()
    STATUS_JSON = auto()
    EVENTS = auto()
    VMSTATE = auto()
    SAVE_IMAGE = auto()
    RAM = auto()
    PAGES = auto()
    PARAMETER = auto()
    CAPABILITY = auto()
    VIEW = auto()


_WRITABLE = frozenset({NodeKind.CTL, NodeKind.RAM, NodeKind.PARAMETER, NodeKind.CAPABILITY})


@dataclass(frozen=True)
class Node:
    """A directory or a file. ``subject`` is a block's idstr, or the name of a parameter or capability."""

    inode: int
    parent_inode: int
    name: bytes
    kind: NodeKind
    subject: str = ""

    @property
    def is_directory(self) -> bool:
        """Whether it can be listed."""
        return self.kind is NodeKind.DIRECTORY


ROOT = Node(ROOT_INODE, ROOT_INODE, b"/", NodeKind.DIRECTORY)
CTL = Node(2, ROOT_INODE, b"ctl", NodeKind.CTL)
STATUS = Node(3, ROOT_INODE, b"status", NodeKind.STATUS)
STATUS_JSON = Node(4, ROOT_INODE, b"status.json", NodeKind.STATUS_JSON)
EVENTS = Node(5, ROOT_INODE, b"events", NodeKind.EVENTS)
VMSTATE = Node(6, ROOT_INODE, b"vmstate", NodeKind.VMSTATE)
RAM = Node(7, ROOT_INODE, b"ram", NodeKind.DIRECTORY)
PAGES = Node(8, ROOT_INODE, b"pages", NodeKind.DIRECTORY)
PARAMETERS_DIR = Node(9, ROOT_INODE, b"parameters", NodeKind.DIRECTORY)
CAPABILITIES_DIR = Node(10, ROOT_INODE, b"capabilities", NodeKind.DIRECTORY)
VIEWS = Node(11, ROOT_INODE, b"views", NodeKind.DIRECTORY)
SAVE_IMAGE = Node(12, ROOT_INODE, b"libvirt-save", NodeKind.SAVE_IMAGE)

_FIXED = [
    ROOT,
    CTL,
    STATUS,
    STATUS_JSON,
    EVENTS,
    VMSTATE,
    SAVE_IMAGE,
    RAM,
    PAGES,
    PARAMETERS_DIR,
    CAPABILITIES_DIR,
    VIEWS,
    *(
        Node(_FIRST_PARAMETER_INODE + i, PARAMETERS_DIR.inode, name.encode(), NodeKind.PARAMETER, name)
        for i, name in enumerate(PARAMETERS)
    ),
    *(
        Node(_FIRST_CAPABILITY_INODE + i, CAPABILITIES_DIR.inode, name.encode(), NodeKind.CAPABILITY, name)
        for i, name in enumerate(CAPABILITIES)
    ),
]


FILES = (
    ("ctl", "rw", "Commands: write one, read its answer."),
    ("status", "r", "The state of the mount, in lines `KEY VALUE`. poll(2) reports changes (POLLPRI)."),
    ("status.json", "r", "The same as JSON, and each block by itself."),
    (
        "events",
        "r",
        "What happens from the moment when the file is opened, one line per event. Follow it with"
        " `tail -n +1 -f` or poll(2).",
    ),
    ("vmstate", "r", "The stream for QEMU's `-incoming file:`, if the checkpoint is of a machine."),
    (
        "libvirt-save",
        "r",
        "The same as a save image for `virsh restore`, if the checkpoint knows its domain. libvirt's hook gives the"
        " domain the RAM of this mount.",
    ),
    (
        "ram/NAME",
        "rw",
        "A RAM block. The file has the size of the block, and st_blocks says how much is stored. Use it with"
        " read, write, mmap (private and shared), fsync and O_DIRECT. Writes never change the checkpoint that the"
        " RAM came from; `save` writes a new one. In a new guest, `truncate -s 1G DIR/ram/pc.ram` makes a block;"
        " `rm` takes it back as long as it has no size.",
    ),
    ("pages/NAME", "r", "The state of its pages, one byte per page."),
    ("parameters/NAME", "rw", "The value of a migration parameter. Bandwidths are in bytes per second."),
    ("capabilities/NAME", "rw", "A migration capability: `on` or `off`."),
    (
        "views/NAME",
        "r",
        "The checkpoint's memory in the forms that debuggers open. What can't be made is missing (`views-missing`"
        " in `status`).",
    ),
)
"""What a user sees, in the order of the manual: path, access, and what it is. Directories are for all of their"
" files."""


class Tree:
    """The nodes of one mount.

    ``has_vmstate``, ``has_save_image`` and views may change while mounted: a live checkpoint brings device state. A
    block's node stays once the block has a size. Permissions are those that ``umask`` leaves; a read-only mount has
    no writable RAM.
    """

    def __init__(
        self,
        idstrs: Iterable[str],
        *,
        has_vmstate: bool = False,
        has_save_image: bool = False,
        has_views: bool = False,
        read_only: bool = False,
        umask: int = 0o077,
    ) -> None:
        self.has_vmstate = has_vmstate
        self.has_save_image = has_save_image
        self.has_views = has_views
        self._read_only = read_only
        self._umask = umask
        self._nodes: dict[int, Node] = {}
        self._children: dict[int, dict[bytes, Node]] = {}
        self._block_inodes = count(_FIRST_BLOCK_INODE, 2)
        self._ctl_inodes = count(_FIRST_CTL_INODE)
        for node in _FIXED:
            self._add(node)
        for idstr in idstrs:
            self.add_block(idstr)

    @property
    def block_count(self) -> int:
        """How many blocks have their files here."""
        return len(self._children[RAM.inode])

    def add_block(self, idstr: str) -> Node:
        """Add a block's ram/ and pages/ files, and return the node of the former.

        Raises CommandError for an idstr that cannot be a file name, StateError (EEXIST) for one that is there.
        """
        name = encode_name(idstr)
        if name in self._children[RAM.inode]:
            raise StateError(f"RAM block {idstr!r} already exists", EEXIST)
        inode = next(self._block_inodes)
        node = Node(inode, RAM.inode, name, NodeKind.RAM, idstr)
        self._add(node)
        self._add(Node(inode + 1, PAGES.inode, name, NodeKind.PAGES, idstr))
        return node

    def remove_block(self, node: Node) -> None:
        """Take away both files of the block that ``node`` in ram/ is."""
        for directory in (RAM, PAGES):
            del self._nodes[self._children[directory.inode].pop(node.name).inode]

    def set_views(self, names: Iterable[str], generation: int) -> None:
        """From now on these are the views; of another ``generation`` they are other files."""
        for former in self._children[VIEWS.inode].values():
            del self._nodes[former.inode]
        self._children[VIEWS.inode].clear()
        for number, name in enumerate(names, _FIRST_VIEW_INODE + generation * _VIEW_INODES):
            self._add(Node(number, VIEWS.inode, name.encode(), NodeKind.VIEW, name))

    def node(self, inode: int) -> Node | None:
        """The node with that number, if it is there."""
        if inode >= _FIRST_CTL_INODE:
            return replace(CTL, inode=inode)
        return self._visible(self._nodes.get(inode))

    def entry(self, node: Node) -> Node:
        """The node that the name of ``node`` leads to just now: ctl is another inode for everyone who opens it.

        The kernel lets one write(2) at a time into an inode, and `cancel` has to get past a `save` that still runs.
        """
        return replace(node, inode=next(self._ctl_inodes)) if node is CTL else node

    def lookup(self, parent_inode: int, name: bytes) -> Node | None:
        """The node of that name in a directory, if there is one; ``.`` and ``..`` too.

        Raises CommandError (ENAMETOOLONG) for what can't be a name in any.
        """
        if len(name) > NAME_MAX:
            raise CommandError(f"a name has at most {NAME_MAX} bytes, not {len(name)}", ENAMETOOLONG)
        parent = self._nodes.get(parent_inode)
        if parent is None or not parent.is_directory:
            return None
        if name == b".":
            return parent
        if name == b"..":
            return self._nodes[parent.parent_inode]
        return self._visible(self._children[parent_inode].get(name))

    def list(self, inode: int) -> list[Node]:
        """All nodes in a directory, by inode number."""
        children = sorted(self._children[inode].values(), key=lambda node: node.inode)
        return [node for node in children if self._visible(node)]

    def mode(self, node: Node) -> int:
        """File type and permissions, as in st_mode."""
        if node.is_directory:
            return stat.S_IFDIR | 0o777 & ~self._umask
        writable = node.kind in _WRITABLE and not (self._read_only and node.kind is NodeKind.RAM)
        return stat.S_IFREG | (0o666 if writable else 0o444) & ~self._umask

    def link_count(self, node: Node) -> int:
        """As in st_nlink: a directory counts itself, its name and its subdirectories."""
        if not node.is_directory:
            return 1
        return 2 + sum(child.is_directory for child in self.list(node.inode))

    def _add(self, node: Node) -> None:
        self._nodes[node.inode] = node
        if node.is_directory:
            self._children[node.inode] = {}
        if node is not ROOT:
            self._children[node.parent_inode][node.name] = node

    def _visible(self, node: Node | None) -> Node | None:
        hidden = {VMSTATE: not self.has_vmstate, SAVE_IMAGE: not self.has_save_image, VIEWS: not self.has_views}
        return None if node is None or hidden.get(node) else node


@dataclass(frozen=True)
class ExtendedAttribute:
    """``user.ckptfs.NAME`` of ram/NAME and pages/NAME."""

    name: str
    unit: str
    meaning: str
    value: Callable[[BlockStatus], str | int]


XATTRS = (
    ExtendedAttribute("idstr", "", "QEMU's name of the block, as it is.", lambda block: block.idstr),
    ExtendedAttribute("page_size", "bytes", "The size of its pages.", lambda block: block.page_size),
    ExtendedAttribute("page_count", "pages", "All of its pages.", lambda block: block.page_count),
    ExtendedAttribute("used_length", "bytes", "Its size.", lambda block: block.used_length),
    ExtendedAttribute("zero_pages", "pages", "Pages of zeros.", lambda block: block.zero_pages),
    ExtendedAttribute(
        "checkpoint_pages",
        "pages",
        "In the checkpoint, and not read yet.",
        lambda block: block.checkpoint_pages,
    ),
    ExtendedAttribute("read_pages", "pages", "Read from the checkpoint.", lambda block: block.read_pages),
    ExtendedAttribute("written_pages", "pages", "Written since.", lambda block: block.written_pages),
)


def ram_xattrs(block: BlockStatus) -> dict[bytes, bytes]:
    """The extended attributes of ram/NAME and pages/NAME: the plain idstr, sizes and counts."""
    return {
        XATTR_PREFIX + attribute.name.encode(): str(attribute.value(block)).encode("utf-8", "surrogateescape")
        for attribute in XATTRS
    }
