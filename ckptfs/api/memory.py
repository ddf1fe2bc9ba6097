"""The memory that is in a checkpoint, or mounted on a directory: blocks, and where they are in physical memory."""

import errno
import mmap
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from ckptfs.api.blocks import Block, Pages, PhysicalMemory
from ckptfs.api.checkpoint import open_checkpoint
from ckptfs.api.status import is_dead_mount, read_status
from ckptfs.channels.backing_file import pread_exactly
from ckptfs.errors import CommandError, StateError
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.migration.address import FileMigrationArgs, parse_target, seekable_file
from ckptfs.namespace.names import decode_name
from ckptfs.physical.memory_map import MemoryMap, UnknownMapError, parse_map

_STATES_LENGTH = 1 << 20


class Memory(Protocol):
    """RAM that can be read, until it is closed."""

    path: str

    @property
    def blocks(self) -> Mapping[str, Block]:
        """By idstr."""
        ...

    @property
    def physical(self) -> PhysicalMemory:
        """By guest-physical address. Raises UnknownMapError where that is not known, CkptfsError, OSError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class MountedMemory:
    """The memory that is mounted on a directory, until `close` or the end of a ``with``.

    A guest may run on it, and write while it is read: `Block.read` and arrays show what is there at that moment;
    which pages have data was found out when it was opened. While it is open, and as long as there are arrays of it,
    it is a user of the mount.
    """

    def __init__(self, directory: str, named: Sequence[str] = ()) -> None:
        """``named`` is the user's memory map (`parse_map`). Raises StateError where nothing is mounted, OSError."""
        self.path = directory
        """Where it is mounted."""
        self._named = named
        self._status = read_status(directory)
        self._files: list[int] = []
        try:
            blocks = [self._block(block["file"], block["page-size"]) for block in self._status["blocks"]]
        except BaseException:
            self.close()
            raise
        self.blocks = {block.idstr: block for block in blocks}
        """The RAM blocks, by idstr."""

    def _block(self, name: str, page_size: int) -> Block:
        file = os.open(os.path.join(self.path, name), os.O_RDONLY | os.O_CLOEXEC)
        self._files.append(file)
        with_data = PagesBitmap(os.fstat(file).st_size // page_size)
        states = self._states(name)
        with_data.set_mask(0, states != 0)

        def read_pages(start: int, stop: int) -> Pages:
            pages = np.empty((stop - start) * page_size, np.uint8)
            pread_exactly(file, pages.data, start * page_size)
            return pages

        idstr = decode_name(os.fsencode(os.path.basename(name)))
        return Block(idstr, page_size, with_data, read_pages, lambda: _mapped(file))

    def states(self) -> dict[str, npt.NDArray[np.uint8]]:
        """What pages/ says now of each page: 0 zeros, 1 in the checkpoint, 2 read, 3 written."""
        names = [block["file"] for block in self._status["blocks"]]
        return {idstr: self._states(name) for idstr, name in zip(self.blocks, names, strict=True)}

    def _states(self, name: str) -> npt.NDArray[np.uint8]:
        with open(os.path.join(self.path, "pages", os.path.basename(name)), "rb", buffering=0) as file:
            parts = list(iter(lambda: file.read(_STATES_LENGTH), b""))
        return np.frombuffer(b"".join(parts), np.uint8)

    @cached_property
    def physical(self) -> PhysicalMemory:
        """By guest-physical address, as the user or views/map tells.

        Raises UnknownMapError where neither does, CommandError for what the user's map has wrong.
        """
        return PhysicalMemory(self._map(), self.blocks)

    def vmcoreinfo(self) -> str:
        """What a Linux kernel tells debuggers, lines ``NAME=VALUE``. Raises StateError where it has not."""
        try:
            return self._view("vmcoreinfo")
        except FileNotFoundError:
            raise StateError(
                f"{self.path} has no views/vmcoreinfo, and its status says why", errno.ENODATA
            ) from None

    def _map(self) -> MemoryMap:
        if self._named:
            return parse_map(self._named, {idstr: len(block) for idstr, block in self.blocks.items()})
        try:
            return MemoryMap.of_text(self._view("map"))
        except FileNotFoundError:
            raise UnknownMapError(f"{self.path} has no views/map, and its status says why") from None

    def _view(self, name: str) -> str:
        with open(os.path.join(self.path, "views", name), encoding="utf-8", errors="surrogateescape") as file:
            return file.read()

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _mapped(file: int) -> Pages | None:
    """A file as it is now and will be; None if it has nothing."""
    length = os.fstat(file).st_size
    return np.frombuffer(mmap.mmap(file, length, prot=mmap.PROT_READ), np.uint8) if length else None


def open_memory(place: str, named: Sequence[str] = ()) -> Memory:
    """Open the memory at ``place``: a mount's directory, PATH, or ``file:PATH,offset=SIZE``.

    ``named`` is the user's memory map (`parse_map`), which goes before what the place tells by itself.

    Raises what `ckptfs.open` does, and StateError for a directory on which nothing is mounted.
    """
    if os.path.isdir(place) or is_dead_mount(place):
        return MountedMemory(place, named)
    if not place.startswith("file:"):
        return open_checkpoint(place, map=named)
    address = seekable_file(parse_target(place))
    if not isinstance(address, FileMigrationArgs):
        raise CommandError(f"{place}: name a file")
    return open_checkpoint(address.filename, offset=address.offset, map=named)
