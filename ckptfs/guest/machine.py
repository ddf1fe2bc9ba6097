"""The machines on this RAM: the one behind the mount, and whether any has run on it."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptfs.channels.identity import Identity
from ckptfs.errors import QemuError
from ckptfs.migration.address import MonitorAddress

if TYPE_CHECKING:
    from ckptfs.qemu.monitor import Monitor


@dataclass
class Machine:
    """The QEMU that runs on this RAM: where its monitor is, as whom to connect to it, and how it was last seen.

    ``state`` is "waiting" until it was once reached, then "connected" or "lost".
    """

    address: MonitorAddress
    identity: Identity
    state: str = "waiting"
    run_state: str | None = None
    _process: tuple[int, str] | None = None

    @property
    def ended(self) -> bool:
        """Whether the process that was seen at the socket has ended; looks at /proc, and waits for nothing."""
        return self._process is not None and _start_of(self._process[0]) != self._process[1]

    def look(self) -> None:
        """Note it if the machine has ended: nobody else tells between two saves."""
        if self.ended:
            self._lose()

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator["Monitor"]:
        """Connect to the monitor for as long as this lasts; QemuError if that fails."""
        from ckptfs.qemu.monitors import connected_to  # asyncio is slow to import, and most mounts have no machine

        if self.state == "connected":
            self._lose()
        async with connected_to(self.address, self.identity) as monitor:
            self.state = "connected"
            started = _start_of(monitor.pid)
            self._process = None if started is None else (monitor.pid, started)
            try:
                await self._look(monitor)
                yield monitor
            except QemuError as error:
                self._note_loss(error)
                raise
            try:
                await self._look(monitor)
            except QemuError as error:  # what was to be done has been done
                self._note_loss(error)

    async def _look(self, monitor: "Monitor") -> None:
        self.run_state = (await monitor.execute("query-status"))["status"]

    def _note_loss(self, error: QemuError) -> None:
        if error.errno in (errno.EPIPE, errno.ETIMEDOUT):
            self._lose()

    def _lose(self) -> None:
        """It can't be asked: how its guest stands is not known either."""
        self.state, self.run_state = "lost", None


def _start_of(pid: int) -> str | None:
    """When process ``pid`` was started (proc_pid_stat(5), field 22); None if it is not there, or dead already."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


class Machines:
    """Who runs on this RAM: at most one whose monitor is known, and others that were given vmstate."""

    def __init__(self, bound: Machine | None = None) -> None:
        self._bound = bound
        self._have_run = False
        self._refusal: str | None = None
        self._own_ram = False

    @property
    def bound(self) -> Machine | None:
        """The machine that saves stop, and take device state from."""
        return self._bound

    @property
    def have_run(self) -> bool:
        """Whether one was started from the base's device state, or ran when that was taken.

        What is written from then on is newer than that device state.
        """
        return self._have_run

    @property
    def own_ram(self) -> bool:
        """Whether the bound machine has been seen to have its RAM elsewhere: what is here is a copy."""
        return self._bound is not None and self._own_ram

    def note_own_ram(self, own: bool) -> None:
        """The bound machine has its RAM elsewhere, or here."""
        self._own_ram = own

    @property
    def refusal(self) -> str | None:
        """Why vmstate was last refused; None once it was given, and after a reset or a save."""
        return self._refusal

    def bind(self, machine: Machine | None) -> None:
        """From now on saves are of ``machine`` too, or of none."""
        self._bound = machine

    def note_run(self) -> None:
        """A machine runs on this RAM."""
        self._have_run = True

    def note_reset(self) -> None:
        """RAM is what it is in the checkpoint, as if none had run."""
        self._have_run, self._refusal = False, None

    def note_vmstate(self, refusal: str | None) -> None:
        """Device state was asked for, and refused for that reason, or given."""
        self._refusal = refusal
