"""The mount's life: from fork to umount.

The caller of mount.ckptfs waits on a pipe until the daemon has either mounted and answers, or failed; so exit 0
means that the mount is live, and an error text from inside the daemon reaches the caller's stderr.
"""

import contextlib
import ctypes
import logging
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

log = logging.getLogger(__name__)

EXIT_MOUNTED = 0
EXIT_BY_FORCE = 2
EXIT_INTERRUPTED = 8
"""As of mount(8)."""
_GIVING_UP = frozenset({signal.SIGINT, signal.SIGTERM})
_PR_SET_IO_FLUSHER = 57


class Starter:
    """The daemon's end of the pipe to whoever waits for the mount; in the foreground there is nobody."""

    def __init__(self, pipe: int | None) -> None:
        self._pipe = pipe

    def mounted(self) -> None:
        """Tell the caller that the mount answers, and let go of his terminal."""
        if self._pipe is None:
            return
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        os.write(self._pipe, bytes([EXIT_MOUNTED]))
        os.close(self._pipe)
        self._pipe = None

    def remark(self, message: str) -> None:
        """Tell the caller something in one line, though the mount is there."""
        print(f"mount.ckptfs: {message}", file=sys.stderr, flush=True)

    def failed(self, exit_code: int, message: str) -> NoReturn:
        """Tell the caller why there is no mount, in one line, and end."""
        print(f"mount.ckptfs: {message}", file=sys.stderr, flush=True)
        if self._pipe is not None:
            os.write(self._pipe, bytes([exit_code]))
        os._exit(exit_code)


def end_by_force_after(seconds: float, mountpoint: str, abort: Callable[[], None]) -> None:
    """Have this process end in ``seconds`` if it has not by itself: no thread has to agree."""

    def end() -> None:
        log.error("%s: has not ended within %g s after the signal: ending by force", mountpoint, seconds)
        try:
            abort()
        except OSError as error:
            log.error("%s: its connection can't be aborted: %s", mountpoint, error)
        finally:
            os._exit(EXIT_BY_FORCE)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def run_in_background(serve: Callable[[Starter], int]) -> int:
    """Run ``serve`` in a daemon and return the exit code of mount.ckptfs once the mount is there, or is not."""
    _fill_standard_descriptors()
    answer, pipe = os.pipe()
    former = signal.pthread_sigmask(signal.SIG_BLOCK, _GIVING_UP)
    child = os.fork()
    if child:
        os.close(pipe)
        if _gives_up_before(answer):  # who gives up waiting wants no mount later
            os.kill(child, signal.SIGTERM)
            return EXIT_INTERRUPTED
        code = os.read(answer, 1)
        if code:
            return code[0]
        os.waitpid(child, 0)
        print("mount.ckptfs: the daemon died before it had mounted anything", file=sys.stderr)
        return 2
    signal.pthread_sigmask(signal.SIG_SETMASK, former)
    os.close(answer)
    os.setsid()
    os.chdir("/")  # a working directory would pin its file system, or be our own mount
    os._exit(serve(Starter(pipe)))


def _gives_up_before(answer: int) -> bool:
    """Wait for an answer or a signal, which are blocked; whether it is a signal that comes.

    A pipe tells of it: a signal right before a read would be seen only after that.
    """
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    for number in _GIVING_UP:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _GIVING_UP)
    ready, _, _ = select.select([answer, heard], [], [])
    return answer not in ready


def _fill_standard_descriptors() -> None:
    """What the caller has closed of 0, 1 and 2 must not become a descriptor of ours: `mounted` replaces them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def harden() -> bool:
    """No core file may hold RAM, our files are for their owner alone, and reclaim must not wait for ourselves.

    A VM that dirties its RAM through the mount and a daemon short of memory would wait for one another: an "I/O
    flusher" does not wait for pages that are being written back (prctl(2), PR_SET_IO_FLUSHER). Returns whether it
    is one: that takes CAP_SYS_RESOURCE.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    refused: int = ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    return refused == 0
