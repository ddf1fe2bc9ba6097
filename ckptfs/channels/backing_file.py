"""A backing file and the two kinds of descriptor on it.

The stream and the bitmaps go through a *buffered* descriptor: they are never aligned. Pages go through
descriptors with O_DIRECT where the file system has it. O_DIRECT is a property of the open file, hence two
(QEMU 9.1, migration/file.c, file_send_channel_create).
"""

import errno
import fcntl
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ckptfs.channels.identity import Identity
from ckptfs.channels.version import FileVersion, Version
from ckptfs.channels.working_set import ByteRange, read_working_set, write_working_set
from ckptfs.errors import StateError, StorageError
from ckptfs.mapped_ram.stream import Source

DIRECT_IO_ALIGNMENT = 4096
IOV_MAX = 1024


@dataclass(frozen=True)
class DirectIO:
    """What was asked of direct I/O: ``wanted``, and whether somebody asked for it by name (``required``)."""

    wanted: bool
    required: bool = False


class BackingFile(Protocol):
    """An open file that holds, or will hold, a checkpoint."""

    @property
    def fd(self) -> int:
        """The buffered descriptor, for the stream and bitmaps."""
        ...

    def open_pages(self, direct_io: DirectIO) -> tuple[int, bool]:
        """Open one more descriptor, for pages; return it and whether it bypasses the page cache.

        Raises StorageError where direct I/O was asked for by name and can't be had; else it falls back.
        """
        ...

    @property
    def version(self) -> Version:
        """Which file it is, and as of when."""
        ...

    def source(self) -> Source:
        """The file as parsers see it."""
        ...

    def pread_exactly(self, fd: int, buffer: memoryview, file_offset: int) -> None:
        """Fill ``buffer`` through ``fd``, one of `open_pages`; StorageError, OSError if that can't be done."""

    def pread(self, fd: int, length: int, file_offset: int) -> bytes:
        """Read up to ``length`` bytes through ``fd``, one of `open_pages`; fewer only at the end of the file."""
        ...

    def name(self, fd: int) -> str:
        """What people call the file of which ``fd`` is one of `open_pages`; that asks nothing of the storage."""
        ...

    def holds(self, file_offset: int, length: int) -> bool:
        """Whether these bytes are in the file itself, and need not be fetched first."""
        ...

    def read_working_set(self, path: str) -> list[ByteRange]:
        """What was recorded of this version of the file, beside its ``path``; nothing if that is nothing."""
        ...

    def write_working_set(self, path: str, ranges: Iterable[ByteRange], identity: Identity) -> int:
        """Keep ``ranges`` beside ``path``, as ``identity`` may; return how many bytes they are.

        Raises StateError for a file that has no place beside it, OSError, StorageError.
        """
        ...

    def close(self) -> None:
        """Close the buffered descriptor; those for pages are their owners'."""
        ...


class _Local:
    """A file that has all of its content itself."""

    fd: int

    @property
    def version(self) -> Version:
        """As stat(2) tells."""
        return FileVersion.of(self.fd)

    def source(self) -> Source:
        """The file, read through the buffered descriptor."""
        return FileSource(self.fd)

    def pread_exactly(self, fd: int, buffer: memoryview, file_offset: int) -> None:
        """Fill ``buffer`` through ``fd``."""
        pread_exactly(fd, buffer, file_offset)

    def pread(self, fd: int, length: int, file_offset: int) -> bytes:
        """Read up to ``length`` bytes through ``fd``."""
        return pread(fd, length, file_offset)

    def name(self, fd: int) -> str:
        """As the kernel has it now (proc(5))."""
        return os.readlink(f"/proc/self/fd/{fd}")

    def holds(self, file_offset: int, length: int) -> bool:
        """It does."""
        return True

    def read_working_set(self, path: str) -> list[ByteRange]:
        """Of the file beside it."""
        return read_working_set(path, self.fd)

    def write_working_set(self, path: str, ranges: Iterable[ByteRange], identity: Identity) -> int:
        """Into the file beside it."""
        if not os.path.isabs(path):
            why = "was saved by this mount: mount it again first" if "://" in path else "has no name"
            raise StateError(f"{path}: {why}, and the list is kept beside what is mounted")
        with identity.assumed():
            return write_working_set(path, self.fd, ranges)


@dataclass(frozen=True)
class OpenedFile(_Local):
    """A file that the daemon opened: further descriptors are opened by descriptor, never by path."""

    fd: int
    access: int
    """O_RDONLY, O_WRONLY or O_RDWR: how pages are to be opened."""

    def open_pages(self, direct_io: DirectIO) -> tuple[int, bool]:
        """Open the file once more."""
        if direct_io.wanted:
            try:
                return self._reopen(os.O_DIRECT), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            if direct_io.required:
                raise StorageError(
                    "direct-io is on, but the file system does not support O_DIRECT: set direct-io off",
                    errno.EINVAL,
                )
        return self._reopen(0), False

    def _reopen(self, flags: int) -> int:
        return os.open(f"/proc/self/fd/{self.fd}", self.access | flags | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the buffered descriptor."""
        os.close(self.fd)


@dataclass(frozen=True)
class HandedFile(_Local):
    """A file that somebody else opened: descriptors of an fdset, duplicated by QEMU's rule.

    The first whose access mode and O_DIRECT are exactly those that are wanted serves (util/osdep.c and
    monitor/fds.c, 10.0); O_RDWR never matches.
    """

    descriptors: tuple[int, ...]
    access: int
    fd: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fd", self._matching(self.access))

    def open_pages(self, direct_io: DirectIO) -> tuple[int, bool]:
        """Duplicate one for pages."""
        if direct_io.wanted:
            try:
                return self._matching(self.access | os.O_DIRECT), True
            except StorageError:
                if direct_io.required:
                    raise
        return self._matching(self.access), False

    def _matching(self, flags: int) -> int:
        for descriptor in self.descriptors:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_DIRECT) == flags:
                return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 0)
        raise StorageError(f"Failed to find file descriptor with matching flags={flags:#x}", errno.EACCES)

    def close(self) -> None:
        """Close our duplicate; the descriptors that were handed in stay."""
        os.close(self.fd)


@dataclass(frozen=True)
class NamedFile(_Local):
    """One descriptor that was handed in under a name: it serves for all, so it can't have O_DIRECT."""

    fd: int

    def open_pages(self, direct_io: DirectIO) -> tuple[int, bool]:
        """Duplicate it."""
        if direct_io.wanted and direct_io.required:
            raise StorageError("direct-io is on, but the descriptor was opened without O_DIRECT", errno.EINVAL)
        return fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, 0), False

    def close(self) -> None:
        """Close our duplicate."""
        os.close(self.fd)


def pread_exactly(fd: int, buffer: memoryview, file_offset: int) -> None:
    """Fill ``buffer`` from ``file_offset`` on; StorageError (EIO) where the file ends before that."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], file_offset + done)
        if count == 0:
            raise StorageError(f"the file ends at byte {file_offset + done:#x}, inside a page that it lists")
        done += count if done + count == len(buffer) else _to_go_on_from(count)


def pread(fd: int, length: int, file_offset: int) -> bytes:
    """Read up to ``length`` bytes; fewer only at the end of the file."""
    parts = []
    while length > 0:
        part = os.pread(fd, min(length, 1 << 30), file_offset)
        if not part:
            break
        parts.append(part)
        file_offset += len(part)
        length -= len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]


def pwritev_all(fd: int, views: Sequence[memoryview], file_offset: int) -> None:
    """Write all of ``views`` one after another from ``file_offset`` on, finishing short writes.

    QEMU 10 does not look at the count (migration/multifd-nocomp.c) and loses pages to a full disk.
    """
    queue = list(views)
    while queue:
        count = os.pwritev(fd, queue[:IOV_MAX], file_offset)
        written = sum(map(len, queue[:IOV_MAX]))
        if count < written:
            if count == 0:
                raise StorageError(f"nothing could be written at byte {file_offset:#x}", errno.ENOSPC)
            count = _to_go_on_from(count)
        file_offset += count
        queue = _without_first(queue, count)


def pwrite_all(fd: int, data: bytes, file_offset: int) -> None:
    """Write all of ``data`` through a buffered descriptor, finishing short writes."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, file_offset)
        file_offset += count
        view = view[count:]


def _to_go_on_from(count: int) -> int:
    """How much of a short transfer counts: one with O_DIRECT can only go on at an aligned place.

    What is shorter than that counts as it is (a full disk, the end of the file), or there would be no end.
    """
    return count - count % DIRECT_IO_ALIGNMENT or count


def _without_first(views: list[memoryview], count: int) -> list[memoryview]:
    """Drop the first ``count`` bytes of ``views``."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


class FileSource:
    """A backing file as the parsers of mapped_ram see it: a length, and bytes at a position."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.length = os.lseek(fd, 0, os.SEEK_END)

    def pread(self, file_offset: int, length: int) -> bytes:
        """Read up to ``length`` bytes; fewer only at the end of the file."""
        return pread(self._fd, length, file_offset)
