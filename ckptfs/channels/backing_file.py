"""A backing file and the two kinds of descriptor on it.

The stream and the bitmaps go through a *buffered* descriptor: they are never aligned. Pages go through
descriptors with O_DIRECT where the file system has it. O_DIRECT is a property of the open file, hence two
(QEMU 9.1, migration/file.c, file_send_channel_create).
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ckptfs.errors import StorageError

DIRECT_IO_ALIGNMENT = 4096
IOV_MAX = 1024


@dataclass(frozen=True)
class DirectIO:
    """What was asked of direct I/O: ``wanted``, and whether somebody asked for it by name (``required``)."""

    wanted: bool
    required: bool = False


def reopen(fd: int, flags: int) -> int:
    """Open the file behind ``fd`` once more, by descriptor and never by path, with other ``flags``."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def open_pages_descriptor(fd: int, access: int, direct_io: DirectIO) -> tuple[int, bool]:
    """Open the file behind ``fd`` for pages; return the descriptor and whether it bypasses the page cache.

    ``access`` is O_RDONLY, O_WRONLY or O_RDWR. Raises StorageError (EINVAL) where direct I/O was asked for
    by name and the file system has none; otherwise such a file is opened buffered.
    """
    if not direct_io.wanted:
        return reopen(fd, access), False
    try:
        return reopen(fd, access | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    if direct_io.required:
        raise StorageError(
            "direct-io is on, but the file system does not support O_DIRECT: set direct-io off", errno.EINVAL
        )
    return reopen(fd, access), False


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
