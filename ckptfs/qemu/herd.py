"""Many QEMUs that start and end together.

Each dies with this process, however that ends (prctl(2), PR_SET_PDEATHSIG). The signal comes when the *thread* that
started it ends, so they are started in the main thread.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from ckptfs.channels.identity import Identity
from ckptfs.errors import QemuError
from ckptfs.qemu.clones import Clone

_PR_SET_PDEATHSIG = 1
_LOADING = frozenset({"inmigrate", "prelaunch"})
_LOOK_AGAIN = 0.02
_LAST_CHANCE = 10.0
"""Seconds that a QEMU has to end by itself."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Member:
    """A clone and its process."""

    clone: Clone
    process: subprocess.Popen[bytes]

    async def ended(self) -> int:
        """Wait until it has ended; return its exit code as subprocess has it."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        return self.process.wait()

    def last_words(self) -> str:
        """The last line that its QEMU printed."""
        with contextlib.suppress(OSError), open(self.clone.log_path, errors="replace") as log_file:
            lines = log_file.read().strip().splitlines()
            return lines[-1] if lines else "it printed nothing"
        return "it printed nothing"


def start(clone: Clone, command: Sequence[str], descriptors: Sequence[int]) -> Member:
    """Start the QEMU of a clone, which inherits ``descriptors`` (in the main thread). Raises OSError."""
    parent = os.getpid()

    def die_with_parent() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died already
            os._exit(1)

    with open(clone.log_path, "wb") as log_file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C is for us, and we end them
            preexec_fn=die_with_parent,
        )
    return Member(clone, process)


async def wait_until_running(member: Member) -> None:
    """Return when a clone has loaded its device state. Raises QemuError, with its last words, if it ends first."""
    from ckptfs.qemu.monitor import connected  # asyncio is slow to import

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refuse_end, member)
        # no event tells of either: the socket is made before we can be its client, and RESUME may be past by then
        while not await trio.Path(member.clone.qmp_path).exists():  # noqa: ASYNC110
            await trio.sleep(_LOOK_AGAIN)
        try:
            async with connected(member.clone.qmp_path, Identity.of_daemon()) as monitor:
                while (await monitor.execute("query-status"))["status"] in _LOADING:  # noqa: ASYNC110
                    await trio.sleep(_LOOK_AGAIN)
        except QemuError:  # an end that breaks the connection is told better by QEMU's last words
            with trio.move_on_after(_LAST_CHANCE):
                await trio.sleep_forever()
            raise
        nursery.cancel_scope.cancel()


async def _refuse_end(member: Member) -> None:
    code = await member.ended()
    raise QemuError(f"clone {member.clone.number} ended with {_how(code)}: {member.last_words()}")


async def wait_until_ended(members: Sequence[Member], tell: Callable[[str], None]) -> None:
    """Return when the last has ended, and tell of each that does."""

    async def wait(member: Member) -> None:
        code = await member.ended()
        tell(f"clone {member.clone.number} has ended with {_how(code)}")

    async with trio.open_nursery() as nursery:
        for member in members:
            nursery.start_soon(wait, member)


async def end(members: Sequence[Member]) -> None:
    """End all that still run, and wait until they are gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [member for member in members if member.process.poll() is None]
        for member in running:
            member.process.send_signal(number)
        with trio.move_on_after(_LAST_CHANCE), contextlib.suppress(OSError):
            for member in running:
                await member.ended()


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
