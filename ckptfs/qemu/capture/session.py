"""What every capture shares: QEMU's settings, its stream through a pipe, the pause, and the others.

Others command the same machine: libvirt, a person at a monitor, gdb. None of them asks us, and all may come at any
moment. So nothing here is remembered that QEMU can tell: its events say what happened, in their order, and what was
changed is put back only where it is still as we set it.

QEMU's stream comes through a pipe. QEMU closes its end when the migration is over, whichever way
(migration/migration.c, migration_cleanup): so its end of file is awaited. But QEMU may leave it open when somebody
begins another migration as ours ends (seen in 10.0). So an event that tells of the end is enough as well, once the
pipe is empty: QEMU has written all by then.
"""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from ckptfs.errors import CkptfsError, QemuError, StateError

if TYPE_CHECKING:
    from ckptfs.qemu.monitor import Event, Monitor

log = logging.getLogger(__name__)

PIPE_LENGTH = 1 << 20
"""Bytes: the device state of most machines, so that QEMU need not wait for us."""

PARAMETERS = {"max-bandwidth": 0, "tls-creds": "", "mode": "normal"}
"""Set while a machine is captured: no limit, no TLS (not through a pipe), no cpr."""

_DISK_NOT_FOUND = (
    " (QEMU can't open a disk again, as it does when it saves: start it with absolute paths, -daemonize leaves the "
    "directory that relative ones were meant from)"
)
_NO_USERFAULTFD = (
    " (or it may not use userfaultfd(2): it needs to open /dev/userfaultfd, or CAP_SYS_PTRACE, or sysctl "
    "vm.unprivileged_userfaultfd=1)"
)
_FD_NAME = "ckptfs"


class CapabilitiesRefusedError(QemuError):
    """QEMU refuses the capabilities that a way of capturing needs; nothing was changed."""


_SETTLING = 0.001
"""Seconds between two questions for what no event tells."""

_MIGRATIONS_OF_OTHERS = 10
"""How many, one after the other, are cancelled before capabilities are left as they are."""

_ENDED = ("completed", "failed", "cancelled")
_SAVABLE = ("running", "paused", "prelaunch")
_HINTS = {
    "finish-migrate": "a migration is about to end: let it end, or `migrate_cancel` it",
    "postmigrate": "it was migrated and stands still since: `cont`",
}


async def run_state(monitor: "Monitor") -> str:
    """QEMU's RunState (qapi/run-state.json)."""
    state: str = (await monitor.execute("query-status"))["status"]
    return state


async def settled_run_state(monitor: "Monitor") -> str:
    """The run state, once QEMU has left finish-migrate; QemuError (ETIMEDOUT) if it does not.

    A migration is told to have completed a little earlier (migration/migration.c: migration_completion_end comes
    before migration_iteration_finish, which has to wait for QEMU's big lock). No event tells of the change.
    """
    with trio.move_on_after(monitor.deadline):
        while (state := await run_state(monitor)) == "finish-migrate":  # noqa: ASYNC110 - there is no event
            await trio.sleep(_SETTLING)
        return state
    raise QemuError("QEMU does not come out of run state finish-migrate", errno.ETIMEDOUT)


async def savable_run_state(monitor: "Monitor") -> str:
    """The run state, which has to be one that QEMU migrates from; StateError (EBUSY) otherwise."""
    state = await run_state(monitor)
    if state not in _SAVABLE:
        hint = _HINTS.get(state, "bring it to running or paused")
        raise StateError(f"the guest is in state {state!r}: {hint}, then save")
    return state


# ---- settings ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def migration_settings(
    monitor: "Monitor", capabilities: Collection[str], parameters: dict[str, Any]
) -> AsyncIterator[None]:
    """Have these capabilities on and all others off, and these parameters; put back what is still so afterwards.

    Raises CapabilitiesRefusedError where QEMU can't do that.
    """
    states = await _capabilities(monitor)
    states = {name: state for name, state in states.items() if state != (name in capabilities)}
    values = await monitor.execute("query-migrate-parameters")
    values = {name: values[name] for name, ours in parameters.items() if values.get(name, ours) != ours}
    with trio.CancelScope(shield=True):  # either it is set, or it is not
        try:
            await _set_capabilities(monitor, {name: not state for name, state in states.items()})
        except QemuError as error:
            if error.errno in (errno.EPIPE, errno.ETIMEDOUT):
                raise
            hint = _NO_USERFAULTFD if "supported by host kernel" in str(error) else ""
            raise CapabilitiesRefusedError(f"{error}{hint}", error.errno) from error
    try:
        await _set_parameters(monitor, {name: parameters[name] for name in values})
        yield
    finally:
        with trio.CancelScope(shield=True):
            await _put_back(_put_back_parameters(monitor, values, parameters))
            await _put_back(_put_back_capabilities(monitor, states))


async def _put_back_capabilities(monitor: "Monitor", found: dict[str, bool]) -> None:
    now = await _capabilities(monitor) if found else {}
    changed = {name: state for name, state in found.items() if now[name] != state}
    for _ in range(_MIGRATIONS_OF_OTHERS):
        with contextlib.suppress(QemuError):
            await _set_capabilities(monitor, changed)
            return
        await _end_migration_of_others(monitor)
    await _set_capabilities(monitor, changed)


async def _put_back_parameters(monitor: "Monitor", found: dict[str, Any], ours: dict[str, Any]) -> None:
    now = await monitor.execute("query-migrate-parameters") if found else {}
    await _set_parameters(monitor, {name: value for name, value in found.items() if now.get(name) == ours[name]})


async def _put_back(setting: Awaitable[None]) -> None:
    try:
        await setting
    except QemuError as error:
        log.warning("QEMU's migration settings could not be restored: %s", error)


async def _capabilities(monitor: "Monitor") -> dict[str, bool]:
    listed = await monitor.execute("query-migrate-capabilities")
    return {entry["capability"]: entry["state"] for entry in listed}


async def _set_capabilities(monitor: "Monitor", states: dict[str, bool]) -> None:
    """Set all of them in one command: QEMU checks then which of them go together, and not in between."""
    if states:
        entries = [{"capability": name, "state": state} for name, state in states.items()]
        await monitor.execute("migrate-set-capabilities", capabilities=entries)


async def _set_parameters(monitor: "Monitor", values: dict[str, Any]) -> None:
    if values:
        await monitor.execute("migrate-set-parameters", **values)


# ---- the stream -------------------------------------------------------------------------------------------


class Incoming:
    """The reading end of a pipe into which QEMU migrates; ``ended`` once all of it has been read.

    ``begun`` is the number of the event with which the migration began.
    """

    def __init__(self, monitor: "Monitor", pipe: trio.lowlevel.FdStream) -> None:
        self._monitor = monitor
        self._pipe = pipe
        self.begun = len(monitor.events)
        self.ended = False

    async def receive(self) -> bytes | bytearray:
        """Return what has come; nothing at the end, and if an event comes before anything else.

        Raises QemuError (ETIMEDOUT) if neither comes in the time that QEMU has for an answer.
        """
        monitor = self._monitor
        if came_to(monitor, self.begun, *_ENDED) is not None:
            return self._rest()
        heard = len(monitor.events)
        with trio.move_on_after(monitor.deadline) as patience, monitor.alerting(patience):
            part = await self._pipe.receive_some(PIPE_LENGTH)
            self.ended = not part
            return part
        if monitor.lost:
            raise QemuError("migrate: the connection to QEMU broke", errno.EPIPE)
        if len(monitor.events) == heard:
            raise QemuError(f"migrate: QEMU sent nothing for {monitor.deadline:g} s", errno.ETIMEDOUT)
        return b""

    def _rest(self) -> bytes:
        try:
            part = os.read(self._pipe.fileno(), PIPE_LENGTH)
        except BlockingIOError:
            part = b""
        self.ended = not part
        return part

    async def drain(self) -> None:
        """Throw away what still comes."""
        while not self.ended:
            await self.receive()


@asynccontextmanager
async def pipe_from_qemu(monitor: "Monitor") -> AsyncIterator[Incoming]:
    """A pipe whose writing end QEMU has, as descriptor `_FD_NAME`; no file is needed."""
    receiver, sender = os.pipe()
    async with trio.lowlevel.FdStream(receiver) as pipe:
        try:
            try:
                with contextlib.suppress(PermissionError):  # others of this user have large pipes already
                    fcntl.fcntl(sender, fcntl.F_SETPIPE_SZ, PIPE_LENGTH)
                await monitor.send_descriptor(_FD_NAME, sender)
            finally:
                os.close(sender)
            yield Incoming(monitor, pipe)
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(QemuError):
                await monitor.execute("closefd", fdname=_FD_NAME)  # refused if a migration has taken it
            raise


@asynccontextmanager
async def migration(monitor: "Monitor", incoming: Incoming) -> AsyncIterator[None]:
    """Have QEMU migrate into the pipe; if this is left before QEMU has ended, its migration is cancelled.

    Inside, `refuse_changed_capabilities`: others may have set theirs before it began.
    """
    heard = len(monitor.events)
    with trio.CancelScope(shield=True):  # either it has begun, or it has not
        await monitor.execute("migrate", uri=f"fd:{_FD_NAME}")
    begun = came_to(monitor, heard, "setup")
    incoming.begun = heard if begun is None else begun
    try:
        yield
    finally:
        if not incoming.ended:
            with trio.CancelScope(shield=True), contextlib.suppress(QemuError):
                await monitor.execute("migrate_cancel")
                await incoming.drain()


async def refuse_changed_capabilities(monitor: "Monitor", capabilities: Collection[str]) -> None:
    """See that these are on, and no others: nobody can change them while QEMU migrates. StateError if not."""
    for name, state in (await _capabilities(monitor)).items():
        if state != (name in capabilities):
            raise StateError(f"somebody else has changed QEMU's migration capability {name} meanwhile")


async def _end_migration_of_others(monitor: "Monitor") -> None:
    """Cancel the migration that somebody began after we had set QEMU up for ours.

    Capabilities can't be changed while it runs, so it runs with ours: it leaves RAM out, or waits for a word that
    nobody will say. Better that its owner sees it cancelled.
    """
    with contextlib.suppress(QemuError):
        status = await migration_status(monitor)
        if status in ("none", *_ENDED):
            return
        heard = len(monitor.events)
        await monitor.execute("migrate_cancel")
        log.warning("QEMU was set up for a checkpoint when somebody began a migration: that one was cancelled")
        await wait_for(monitor, lambda: came_to(monitor, heard, *_ENDED) is not None)


async def wait_for(monitor: "Monitor", happened: Callable[[], bool]) -> None:
    """Wait for an event that makes ``happened()`` true; QemuError if QEMU does not tell in time."""
    with trio.move_on_after(monitor.deadline):
        while not happened() and not monitor.lost:
            with trio.CancelScope() as scope, monitor.alerting(scope):
                await trio.sleep_forever()
    if not happened():
        raise QemuError("QEMU did not tell how its migration went on", errno.ETIMEDOUT)


def came_to(monitor: "Monitor", since: int, *statuses: str) -> int | None:
    """Which event, from number ``since`` on, said that the migration has come to one of these; None if none did.

    QEMU tells only with capability ``events`` on.
    """
    for number, event in enumerate(monitor.events[since:], since):
        if event.name == "MIGRATION" and event.data.get("status") in statuses:
            return number
    return None


async def switch_over(monitor: "Monitor") -> None:
    """Have QEMU go on from where it waits before the device state."""
    try:
        await monitor.execute("migrate-continue", state="pre-switchover")
    except QemuError as error:
        if error.errno not in (errno.EPIPE, errno.ETIMEDOUT):
            _refuse_cancelled(await migration_status(monitor))
        raise


def _refuse_cancelled(status: str) -> None:
    if status in ("cancelling", "cancelled"):
        raise StateError("somebody else cancelled QEMU's migration of its device state")


async def migration_status(monitor: "Monitor") -> str:
    """The status of QEMU's newest migration, ``none`` if there was none."""
    status: str = (await monitor.execute("query-migrate")).get("status", "none")
    return status


async def check_completed(monitor: "Monitor", begun: int) -> None:
    """See how the migration that began with event ``begun`` has ended: a stream may have been cut short."""
    found = await monitor.execute("query-migrate")
    status = found.get("status", "none")
    if (over := came_to(monitor, begun, *_ENDED)) is not None:
        status = monitor.events[over].data["status"]  # what QEMU answers may be of a newer one, somebody else's
    _refuse_cancelled(status)
    if status != "completed":
        reason = found.get("error-desc", "no reason given")
        if reason.endswith(os.strerror(errno.EFAULT)):
            reason += _DISK_NOT_FOUND
        raise QemuError(f"QEMU's migration of its device state ended as {status!r}: {reason}")


# ---- the pause --------------------------------------------------------------------------------------------


class Pause:
    """A guest that stands still, and what its owners want of it afterwards.

    ``wanted`` is its run state before we stopped it, or what somebody made of that since: the owner of the stream
    sets it, who can tell. ``downtime`` is in seconds, 0 for a guest that did not run.
    """

    def __init__(self, monitor: "Monitor", wanted: str) -> None:
        self._monitor = monitor
        self._heard = len(monitor.events)
        self._ours = wanted == "running"
        self._completed = False
        self.wanted = wanted
        self.downtime = 0.0

    @property
    def commands_of_others(self) -> list[str]:
        """Which of STOP and RESUME came, since our own ``stop``, or since QEMU's migration had completed."""
        return [event.name for event in self._monitor.events[self._heard :] if event.name in ("STOP", "RESUME")]

    @property
    def resumed(self) -> bool:
        """Whether somebody let the guest go on meanwhile."""
        return "RESUME" in self.commands_of_others

    def note_stopped(self, heard: int | None = None) -> None:
        """What comes from now on (event ``heard``) are others' commands, or QEMU's as its migration goes on."""
        self._heard = len(self._monitor.events) if heard is None else heard

    def note_completed(self, event: int | None, wanted: str) -> None:
        """QEMU's migration has completed, as the event of that number said; its owners wanted the guest so."""
        self.wanted = wanted
        self._completed = True
        self._heard = len(self._monitor.events) if event is None else event

    async def end(self, cause: BaseException | None = None) -> None:
        """Have the guest run if that is what its owners want; ``cause`` is what went wrong before."""
        with trio.CancelScope(shield=True):
            try:
                if not self._completed:
                    await _end_migration_of_others(self._monitor)
                if await self._is_ours():
                    await self._monitor.execute("cont")
            except QemuError as error:
                if not self._ours:
                    return
                text = cause if isinstance(cause, CkptfsError) else error
                raise QemuError(
                    f"{text}; if QEMU still runs, its guest is stopped: send it `cont` "
                    "(and `migrate_cancel` before, if it says that its migration is not finalized)",
                    error.errno,
                ) from cause

    async def _is_ours(self) -> bool:
        """Whether the guest stands still because of us alone."""
        state = await settled_run_state(self._monitor)
        if self._completed:  # QEMU leaves it in postmigrate, unless somebody has commanded it since
            return self.wanted == "running" and not self.commands_of_others
        if state == "postmigrate":
            return self._ours
        # a migration that did not complete has left the guest as it found it
        return self._ours and state in ("paused", "prelaunch") and not self.resumed


@asynccontextmanager
async def paused(monitor: "Monitor") -> AsyncIterator[Pause]:
    """Stop the guest; afterwards, whatever happened, it runs or stands still as its owners want it."""
    pause = Pause(monitor, await savable_run_state(monitor))
    started = trio.current_time()
    try:
        if pause.wanted == "running":
            with trio.CancelScope(shield=True):  # either we know that it is stopped, or QEMU does not answer
                await monitor.execute("stop")
            pause.note_stopped()
        yield pause
    except BaseException as error:
        await pause.end(error)
        raise
    await pause.end()
    if pause.wanted == "running":
        pause.downtime = trio.current_time() - started


def refuse_if_torn(events: Iterable["Event"], *, ran: bool) -> None:
    """The guest must have stood still while QEMU by itself took its device state; StateError (EBUSY) if not.

    ``events`` are those since QEMU's migration became active, ``ran`` says in which run state it found the guest.
    QEMU waits for its vCPUs without its big lock (system/cpus.c, pause_all_vcpus; all versions up to 10.0). When
    a `cont` of somebody else comes then, or his `stop` waits when QEMU comes to stop the guest, the device state is
    taken of vCPUs that run. The events tell: a guest is stopped and let go in turns, but not then.
    """
    expected = "STOP" if ran else "RESUME"
    for event in events:
        if event.name in ("STOP", "RESUME"):
            if event.name != expected:
                raise StateError(
                    "somebody else stopped the guest, or let it go on, at the moment when QEMU took its device "
                    "state: save again"
                )
            expected = "RESUME" if expected == "STOP" else "STOP"


def refuse_if_disturbed(events: Iterable["Event"]) -> None:
    """The guest must have stood still while its device state was taken; StateError (EBUSY) if not.

    QEMU itself refuses `cont` then, in run state finish-migrate; gdb's and a reset it does not.
    """
    names = {event.name for event in events}
    if "RESUME" in names:
        raise StateError("somebody else (gdb?) let the guest go on while its device state was taken")
    if "RESET" in names:
        raise StateError("somebody else reset the guest while its device state was taken")
