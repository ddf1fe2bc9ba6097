"""Every error that ckptfs raises on purpose, sorted by whose fault it is.

::

    CkptfsError
     +-- CheckpointError     the file: it is no checkpoint, is cut short, or lies
     +-- CommandError        the caller: an unknown word, a bad value, a forbidden target
     +-- StateError          the state: busy, cancelled, not now
     +-- StorageError        the backing storage: no space, I/O error, no such directory
     +-- QemuError           QEMU: it refused, went away, or answered with an error

Each carries the ``errno`` that a system call on the mount returns for it, and one line of text that names
the thing, the value and what to do. Nothing else may leave the pure packages; in the shells ``OSError`` is
allowed as well and keeps its own errno.
"""

import errno as _errno
from collections.abc import Iterable


class CkptfsError(Exception):
    """Base of all ckptfs errors: one line of text, and the errno it becomes at a system call."""

    default_errno = _errno.EIO

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = self.default_errno if errno is None else errno


class CheckpointError(CkptfsError):
    """A file is not the checkpoint it claims to be; ``file_offset`` is the byte where that shows, if any."""

    default_errno = _errno.EINVAL

    def __init__(self, message: str, file_offset: int | None = None) -> None:
        where = "" if file_offset is None else f"at byte {file_offset:#x}: "
        super().__init__(where + message)
        self.file_offset = file_offset

    def of_file(self, name: str) -> "CheckpointError":
        """The same, beginning with the name of the file."""
        named = CheckpointError(f"{name}: {self}")
        named.file_offset = self.file_offset
        return named


class CommandError(CkptfsError):
    """The caller asked for something that cannot be understood or is not allowed (default: EINVAL)."""

    default_errno = _errno.EINVAL


class StateError(CkptfsError):
    """The request is fine, but not in the present state (default: EBUSY)."""

    default_errno = _errno.EBUSY


class StorageError(CkptfsError):
    """The backing storage failed; the errno is the one that it gave (default: EIO)."""


class QemuError(CkptfsError):
    """The QEMU behind the mount refused, failed or went away (default: EIO)."""


def likely(word: str, known: Iterable[str]) -> str | None:
    """Which of the ``known`` words an unknown one may be a slip for; None if it is like none of them."""
    from difflib import get_close_matches  # slow to import, and few slip

    return next(iter(get_close_matches(word, list(known), 1)), None)
