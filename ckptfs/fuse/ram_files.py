"""The files in ram/: where the kernel has them, and who has them open."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from ckptfs.channels.identity import Identity
from ckptfs.fuse.nodes import Nodes
from ckptfs.fuse.settling import FileRange
from ckptfs.namespace.tree import RAM
from ckptfs.qemu.backends import RAMFile
from ckptfs.qemu.users import name_of

RELEASE_DEADLINE = 5.0
"""Seconds in which a file that was closed is released, if it is not open or mapped elsewhere."""


@dataclass(frozen=True)
class Opener:
    """Who opened a file, and how (open(2) flags; fuse_in_header: the thread's pid, uid, gid)."""

    flags: int
    pid: int
    uid: int
    gid: int

    @property
    def writes(self) -> bool:
        """Whether the file was opened for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def may_map_shared(self) -> bool:
        """Whether pages can be dirtied through a shared mapping of the file (mmap(2): O_RDWR only)."""
        return self.flags & os.O_ACCMODE == os.O_RDWR

    def identity(self) -> Identity:
        """The process as one whom the daemon can act for."""
        return Identity.of_process(self.pid, self.uid, self.gid)


@dataclass(eq=False)
class _OpenFile:
    """An open file in ram/; ``closed_once`` says whether close(2) was called on any of its descriptors."""

    inode: int
    opener: Opener
    closed_once: bool = False


class RAMFiles:
    """The files in ram/ of the mount at ``mountpoint``."""

    def __init__(self, nodes: Nodes, mountpoint: str) -> None:
        self._nodes = nodes
        self._mountpoint = mountpoint
        self._open: dict[object, _OpenFile] = {}
        self._released = trio.Event()
        self.device = -1
        """st_dev of the mount, once it is there."""

    @property
    def mountpoint(self) -> str:
        """The directory of the mount."""
        return self._mountpoint

    @property
    def idstrs(self) -> list[str]:
        """All blocks."""
        return [node.subject for node in self._nodes.tree.list(RAM.inode)]

    def files(self, idstrs: Iterable[str]) -> list[RAMFile]:
        """The blocks' files, as stat(2) tells them apart."""
        files = ((idstr, *self.file_of(idstr)) for idstr in idstrs)
        return [RAMFile(idstr, path, self.device, file.inode) for idstr, file, path in files]

    def file_of(self, idstr: str) -> tuple[FileRange, str]:
        """Inode, length and path of a block's file."""
        node = next(node for node in self._nodes.tree.list(RAM.inode) if node.subject == idstr)
        path = os.path.join(self._mountpoint, "ram", os.fsdecode(node.name))
        return FileRange(node.inode, 0, self._nodes.sizes(node)[0]), path

    # ---- who has them open: until the last descriptor and the last mapping are gone ------------------

    def opened(self, handle: object, inode: int, opener: Opener) -> None:
        """An open file of ``opener``, known by its ``handle``."""
        self._open[handle] = _OpenFile(inode, opener)

    def closed(self, handle: object) -> None:
        """One of its descriptors was closed: it may be released soon."""
        self._open[handle].closed_once = True

    def released(self, handle: object) -> None:
        """It is gone."""
        del self._open[handle]
        self._released.set()
        self._released = trio.Event()

    async def in_use(self, inode: int, *, but: object = None) -> bool:
        """Whether anybody has a file open or mapped, by another handle than ``but``."""
        own = self._open.get(but)
        return await self._any_open(lambda file: file.inode == inode and file is not own)

    async def are_written(self) -> bool:
        """Whether anybody holds one open for writing."""
        return await self._any_open(lambda file: file.opener.writes)

    async def _any_open(self, concerns: Callable[[_OpenFile], bool]) -> bool:
        """Whether any open file ``concerns`` the caller.

        One that was closed may not be released yet (the kernel still reads ahead on it): it is waited for, for a
        moment, as it may as well be open by another descriptor, or mapped.
        """
        with trio.move_on_after(RELEASE_DEADLINE):
            while (found := list(filter(concerns, self._open.values()))) and all(x.closed_once for x in found):
                await self._released.wait()
        return any(map(concerns, self._open.values()))

    @property
    def may_be_mapped(self) -> bool:
        """Whether any is open in a way that allows a shared writable mapping."""
        return any(file.opener.may_map_shared for file in self._open.values())

    @property
    def openers(self) -> set[int]:
        """The processes that have opened files which are still open, or mapped."""
        return {file.opener.pid for file in self._open.values()}

    @property
    def users(self) -> tuple[str, ...]:
        """They, for people: ``qemu-system-x86 (1234, rw)`` each."""
        writers = {file.opener.pid for file in self._open.values() if file.opener.writes}
        return tuple(f"{name_of(pid)} ({pid}, {'rw' if pid in writers else 'r'})" for pid in sorted(self.openers))
