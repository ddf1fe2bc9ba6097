"""How a command or a request ends: the line that is read from ctl, and the errno of its system call."""

import errno
import os
from dataclasses import dataclass

from ckptfs.errors import CkptfsError
from ckptfs.namespace.status import printable


@dataclass(frozen=True)
class Outcome:
    """How a command ended: what is read back from ctl, and the errno of its write (0: fine)."""

    line: bytes
    errno: int = 0


def errno_of(error: CkptfsError | OSError) -> int:
    """The errno that a system call on the mount returns for an error of ours or of the system's."""
    return error.errno or errno.EIO


def describe(error: CkptfsError | OSError) -> str:
    """One line for the user."""
    text = str(error)
    if isinstance(error, OSError):
        text = error.strerror or text
        text = text if error.filename is None else f"{os.fsdecode(error.filename)}: {text}"
    return printable(text)  # it may quote whatever somebody wrote, or named a file
