"""Reading much of a file: what the page cache has of it comes from there, all else past it.

Whoever compares or verifies a checkpoint reads all of it, once. Through the page cache, that takes a copy of each
page, and memory for it, and what others have there is dropped.
"""

import errno
import os
import threading

import numpy as np
import numpy.typing as npt

from ckptfs.channels.backing_file import DIRECT_IO_ALIGNMENT, DirectIO, OpenedFile, pread_exactly
from ckptfs.channels.buffers import BUFFER_LENGTH, AlignedBuffers

_MUCH = 256 << 10
"""Bytes. Who reads less than that reads it again, or near it."""

_BUFFERS = AlignedBuffers()


def new_array(length: int) -> npt.NDArray[np.uint8]:
    """An array for bytes of a file; up to `BUFFER_LENGTH`, it is page-aligned, as O_DIRECT wants it."""
    return np.frombuffer(_BUFFERS.take(length), np.uint8) if length <= BUFFER_LENGTH else np.empty(length, np.uint8)


class BulkReader:
    """Reads the regular file or block device that ``fd`` has open, which is the caller's; several threads may."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._opened: tuple[int, int] | None = None

    def pread_exactly(self, array: npt.NDArray[np.uint8], file_offset: int) -> None:
        """Fill ``array``; raises StorageError where the file ends before that, OSError."""
        places = file_offset, array.size, array.ctypes.data
        if array.size < _MUCH or any(place % DIRECT_IO_ALIGNMENT for place in places):
            pread_exactly(self._fd, array.data, file_offset)
            return
        probe, direct = self._descriptors()
        pread_exactly(self._fd if _is_cached(probe, file_offset) else direct, array.data, file_offset)

    def _descriptors(self) -> tuple[int, int]:
        """One to ask the page cache with, and one that goes past it, where the file system lets one."""
        with self._lock:
            if self._opened is None:
                file = OpenedFile(self._fd, os.O_RDONLY)
                probe, _ = file.open_pages(DirectIO(False))
                os.posix_fadvise(probe, 0, 0, os.POSIX_FADV_RANDOM)  # a question reads nothing ahead
                self._opened = probe, file.open_pages(DirectIO(True))[0]
            return self._opened

    def close(self) -> None:
        """Close what was opened here."""
        with self._lock:
            for descriptor in self._opened or ():
                os.close(descriptor)
            self._opened = None


def _is_cached(probe: int, file_offset: int) -> bool:
    """Whether the page there is in the page cache (RWF_NOWAIT of preadv(2)); False where that is not told."""
    try:
        return os.preadv(probe, [bytearray(1)], file_offset, os.RWF_NOWAIT) == 1
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False
