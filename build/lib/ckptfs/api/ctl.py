"""A command on a mount's ctl.

ctl is opened with O_NONBLOCK: the write returns at once, and poll(2) tells when the answer can be read. So whoever
waits does so in poll(2), and never in a request that the kernel would not let him leave.
"""

import contextlib
import errno
import os
import select
from collections.abc import Iterator

from ckptfs.errors import StateError

_ANSWER_LENGTH = 1 << 16


@contextlib.contextmanager
def command_on(directory: str, command: str) -> Iterator[int]:
    """Give a command, and yield the descriptor that its answer comes from (POLLIN)."""
    path = os.path.join(directory, "ctl")
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(fd, command.encode(errors="surrogateescape"))
        yield fd
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise StateError(f"{directory}: its daemon has died", error.errno) from None
        raise
    finally:
        os.close(fd)


def answer_from(directory: str, fd: int) -> str:
    """The answer that has come. Raises StateError with the words of a failure."""
    answer = os.read(fd, _ANSWER_LENGTH).decode(errors="surrogateescape")
    word, _, rest = answer.rstrip("\n").partition(" ")
    if word == "error:":
        raise StateError(f"{directory}: {rest}")
    return rest if word == "ok" else answer.rstrip("\n")


def cancel(directory: str) -> None:
    """Cancel what runs; whether that was in time, its own answer tells."""
    with command_on(directory, "cancel"):
        pass


def run_command(directory: str, command: str) -> str:
    """Run a command to its end, and return its answer. What interrupts the waiting cancels it.

    Raises StateError with ctl's words, OSError.
    """
    with command_on(directory, command) as fd:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        try:
            poll.poll()
        except BaseException:
            cancel(directory)
            raise
        return answer_from(directory, fd)
