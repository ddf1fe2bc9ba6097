"""A command on a mount's ctl, run so that it can be interrupted and killed at any time."""

import contextlib
import os
import select
import signal
from collections.abc import Iterator

from ckptfs.api.ctl import answer_from, cancel, command_on
from ckptfs.api.status import StatusFile
from ckptfs.cli.progress import CANCELLING, Display
from ckptfs.errors import StateError

_REFRESH = 0.25
"""Seconds between two looks at status while something runs: its figures change without an event."""


def perform(directory: str, command: str, display: Display) -> str:
    """Run a command on the mount at ``directory`` and return its answer; ``display`` is shown how it goes.

    SIGINT and SIGTERM cancel the command, a second one ends the waiting for it. Raises StateError with ctl's words,
    or where nothing is mounted; OSError.
    """
    with StatusFile(directory) as status, _signals() as signals, command_on(directory, command) as answer, display:
        poll = select.poll()
        poll.register(answer, select.POLLIN)
        poll.register(signals, select.POLLIN)
        poll.register(status.fd, select.POLLPRI)
        interrupted = False
        while True:
            display.show(status.read())
            ready = {fd for fd, _ in poll.poll(_REFRESH * 1000)}
            if answer in ready:
                break
            if signals in ready:
                if interrupted:
                    raise StateError(f"{directory}: no longer waiting: `ckptfs status` shows how it goes on")
                interrupted = True
                os.read(signals, 16)
                display.say(CANCELLING)
                cancel(directory)
        return answer_from(directory, answer)


def wait_until_idle(directory: str, display: Display) -> None:
    """Wait until no save or restore runs. Raises StateError if the newest one has failed."""
    with StatusFile(directory) as status, display:
        poll = select.poll()
        poll.register(status.fd, select.POLLPRI)
        while (now := status.read())["state"] != "idle":
            display.show(now)
            poll.poll(_REFRESH * 1000)
    migration = now["migration"]
    if migration.get("status") in ("failed", "cancelled"):
        raise StateError(f"{directory}: {migration.get('error-desc') or 'what ran was cancelled'}")


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """SIGINT and SIGTERM make the descriptor readable, and do nothing else."""
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    former = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    former_fd = signal.set_wakeup_fd(theirs)
    try:
        yield ours
    finally:
        signal.set_wakeup_fd(former_fd)
        for number, handler in former.items():
            signal.signal(number, handler)
        os.close(ours)
        os.close(theirs)
