"""What was fetched of an object, kept in a local sparse file: for one mount alone, or in a cache (`cache.py`)."""

import errno
import logging
import os
import stat
import tempfile
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ckptfs.errors import StorageError

log = logging.getLogger(__name__)

CHUNK = 1 << 20
"""Bytes of the file that are fetched together; blocks of RAM begin at multiples of it (mapped-ram)."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Piece(NamedTuple):
    """Bytes of the file, at their place."""

    file_offset: int
    data: memoryview


class Kept(Protocol):
    """Chunks of one object, by number. Its methods block; they may be called by several threads at once."""

    @property
    def fd(self) -> int:
        """The file, which has the object's content where it is kept, and holes elsewhere."""
        ...

    def has(self, chunk: int) -> bool:
        """Whether a chunk is in the file, as it was fetched."""
        ...

    def keep(self, chunk: int, pieces: Sequence[Piece]) -> bool:
        """Put a chunk into the file; False if there is no room for it. Raises OSError."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class Unnamed:
    """A file without a name, which ends with the mount."""

    def __init__(self, length: int) -> None:
        """Raises OSError, StorageError."""
        self.fd = unnamed_file()
        try:
            os.ftruncate(self.fd, length)
        except BaseException:
            os.close(self.fd)
            raise
        self._present = np.zeros(-(-length // CHUNK), np.bool_)
        self._full = False

    def has(self, chunk: int) -> bool:
        """Whether it was kept."""
        return bool(self._present[chunk])

    def keep(self, chunk: int, pieces: Sequence[Piece]) -> bool:
        """Write it."""
        if not write_pieces(self.fd, pieces):
            if not self._full:
                log.warning("%s is full: what is fetched is not kept, and fetched again", working_directory())
            self._full = True
            return False
        self._present[chunk] = True
        return True

    def close(self) -> None:
        """Give its room back."""
        os.close(self.fd)


def write_pieces(fd: int, pieces: Sequence[Piece]) -> bool:
    """Write ``pieces`` to their places; False if there is no room. Raises OSError."""
    try:
        for file_offset, data in pieces:
            while data:
                count = os.pwrite(fd, data, file_offset)
                file_offset, data = file_offset + count, data[count:]
    except OSError as error:
        if error.errno in _NO_ROOM:
            return False
        raise
    return True


def working_directory() -> str:
    """A directory of ours alone for what mounts of objects need: in TMPDIR, or /var/tmp, which is no memory.

    Raises StorageError if somebody else has made it.
    """
    path = os.path.join(os.environ.get("TMPDIR") or "/var/tmp", f"ckptfs-{os.geteuid()}")
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        refuse_foreign_directory(path)
    return path


def refuse_foreign_directory(path: str) -> None:
    """Raise StorageError (EACCES) for a directory that others may write, or that belongs to somebody else."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise StorageError(f"{path}: is not a directory", errno.ENOTDIR)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise StorageError(
            f"{path}: others may read or write it, and memory is full of secrets: chmod 0700 (owner: you)",
            errno.EACCES,
        )


def unnamed_file() -> int:
    """A descriptor of a new file without a name, for reading and writing. Raises OSError, StorageError."""
    with tempfile.TemporaryFile(dir=working_directory()) as file:  # O_TMPFILE where the file system has it
        return os.dup(file.fileno())
