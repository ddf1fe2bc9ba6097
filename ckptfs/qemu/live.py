"""A live checkpoint of a running stock QEMU: what happens between the last look at RAM and the guest's next step.

RAM lies in files of the mount, so QEMU has only to write its device state: capability x-ignore-shared leaves
shared, file-backed RAM out of the stream (migration/ram.c, migrate_ram_is_ignored, since 4.0). The guest is
paused from ``stop`` to ``cont``; in between lie the device state, the last pages that the kernel still holds, and
the switch to a new epoch. Pages are written afterwards, in the background.

The device state comes through a pipe. QEMU closes its end when the migration is over, whichever way
(migration/migration.c, migration_cleanup): so its end of file is awaited, and no event.
"""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import trio

from ckptfs.errors import CkptfsError, QemuError, StateError

if TYPE_CHECKING:
    from ckptfs.qemu.monitor import Monitor

log = logging.getLogger(__name__)

E = TypeVar("E")

DEVICE_STATE_LIMIT = 1 << 30
PIPE_LENGTH = 1 << 20
"""Bytes: the device state of most machines, so that QEMU need not wait for us."""

FLUSH_ROUNDS = 8
FLUSHED_ENOUGH = 0.004
"""Seconds: a flush that takes no longer than this need not be repeated while the guest runs."""

CAPABILITIES = ("x-ignore-shared", "validate-uuid")
"""On while the device state is taken; every other capability is off.

validate-uuid has QEMU send the guest's uuid; a checkpoint keeps it if the capability is on here too.
"""

PARAMETERS = {"max-bandwidth": 0, "tls-creds": "", "mode": "normal"}
"""Set while the device state is taken: no limit, no TLS (not through a pipe), no cpr."""

_FD_NAME = "ckptfs"


@dataclass(frozen=True)
class Capture(Generic[E]):
    """One moment of a guest: what ``freeze`` returned, QEMU's device state stream, and how long it paused.

    ``run_state`` is the one before we stopped it; ``downtime`` is in seconds, 0 for a guest that did not run.
    """

    epoch: E
    stream: bytes
    run_state: str
    downtime: float


async def capture(monitor: "Monitor", flush: Callable[[], Awaitable[None]], freeze: Callable[[], E]) -> Capture[E]:
    """Stop the guest, take its device state and the epoch, and let it go on.

    Afterwards, also after any error, a guest that ran runs; one that was paused stays paused, in QEMU's state
    postmigrate, from which it does not migrate once more before it has run. Capabilities and parameters are
    as before. Raises QemuError or StateError, whose text names the step.
    """
    run_state = await _run_state(monitor)
    async with _migration_settings(monitor), _pipe_from_qemu(monitor) as pipe:
        if run_state == "running":
            await _flush_until_it_settles(flush)
        started = trio.current_time()
        async with _paused(monitor, run_state):
            stream = await _device_state(monitor, pipe)
            await flush()
            epoch = freeze()
        downtime = trio.current_time() - started if run_state == "running" else 0.0
        await _check_completed(monitor)
    return Capture(epoch, stream, run_state, downtime)


async def _run_state(monitor: "Monitor") -> str:
    state: str = (await monitor.execute("query-status"))["status"]
    if state not in ("running", "paused", "prelaunch"):
        raise StateError(f"the guest is in state {state!r}: bring it to running or paused, then save")
    return state


async def _flush_until_it_settles(flush: Callable[[], Awaitable[None]]) -> None:
    """Write back what the guest dirtied while it runs, again and again until a round stops shrinking."""
    last = float("inf")
    for _ in range(FLUSH_ROUNDS):
        started = trio.current_time()
        await flush()
        took = trio.current_time() - started
        if took <= FLUSHED_ENOUGH or took > last * 0.7:
            return
        last = took


@asynccontextmanager
async def _paused(monitor: "Monitor", run_state: str) -> AsyncIterator[None]:
    """Keep the guest from running; afterwards, whatever happened, it runs again if it ran before."""
    if run_state != "running":
        yield
        return
    try:
        await monitor.execute("stop")
        yield
    except BaseException as error:
        await _let_go_on(monitor, error)
        raise
    await _let_go_on(monitor)


async def _let_go_on(monitor: "Monitor", cause: BaseException | None = None) -> None:
    """Have the guest run again; ``cause`` is what went wrong before."""
    with trio.CancelScope(shield=True):
        try:
            await monitor.execute("cont")
        except QemuError as error:
            text = cause if isinstance(cause, CkptfsError) else error
            raise QemuError(
                f"{text}; if QEMU still runs, its guest is stopped: send it `cont`", error.errno
            ) from cause


@asynccontextmanager
async def _migration_settings(monitor: "Monitor") -> AsyncIterator[None]:
    """Set QEMU's capabilities and parameters for the device state, and put them back as they were found."""
    listed = await monitor.execute("query-migrate-capabilities")
    capabilities = {entry["capability"]: entry["state"] for entry in listed}
    capabilities = {name: state for name, state in capabilities.items() if state != (name in CAPABILITIES)}
    parameters = await monitor.execute("query-migrate-parameters")
    parameters = {name: parameters[name] for name, ours in PARAMETERS.items() if parameters.get(name, ours) != ours}
    with trio.CancelScope(shield=True):  # either it is set, or it is not
        await _set_capabilities(monitor, {name: not state for name, state in capabilities.items()})
    try:
        await _set_parameters(monitor, {name: PARAMETERS[name] for name in parameters})
        yield
    finally:
        with trio.CancelScope(shield=True):
            await _put_back(_set_parameters(monitor, parameters))
            await _put_back(_set_capabilities(monitor, capabilities))


async def _put_back(setting: Awaitable[None]) -> None:
    try:
        await setting
    except QemuError as error:
        log.warning("QEMU's migration settings could not be put back as they were: %s", error)


async def _set_capabilities(monitor: "Monitor", states: dict[str, bool]) -> None:
    """Set all of them in one command: QEMU checks then which of them go together, and not in between."""
    if states:
        entries = [{"capability": name, "state": state} for name, state in states.items()]
        await monitor.execute("migrate-set-capabilities", capabilities=entries)


async def _set_parameters(monitor: "Monitor", values: dict[str, Any]) -> None:
    if values:
        await monitor.execute("migrate-set-parameters", **values)


@asynccontextmanager
async def _pipe_from_qemu(monitor: "Monitor") -> AsyncIterator[trio.lowlevel.FdStream]:
    """The reading end of a pipe whose other end QEMU has, as descriptor `_FD_NAME`; no file is needed."""
    receiver, sender = os.pipe()
    async with trio.lowlevel.FdStream(receiver) as pipe:
        try:
            try:
                with contextlib.suppress(PermissionError):  # others of this user have large pipes already
                    fcntl.fcntl(sender, fcntl.F_SETPIPE_SZ, PIPE_LENGTH)
                await monitor.send_descriptor(_FD_NAME, sender)
            finally:
                os.close(sender)
            yield pipe
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(QemuError):
                await monitor.execute("closefd", fdname=_FD_NAME)  # refused if a migration has taken it
            raise


async def _device_state(monitor: "Monitor", pipe: trio.lowlevel.FdStream) -> bytes:
    """Have QEMU migrate its device state into the pipe; when this ends, the migration has ended."""
    with trio.CancelScope(shield=True):  # either it has begun, or it has not
        await monitor.execute("migrate", uri=f"fd:{_FD_NAME}")
    stream = bytearray()
    try:
        while part := await _receive(monitor, pipe):
            stream += part
            if len(stream) > DEVICE_STATE_LIMIT:
                raise QemuError(f"the device state is larger than {DEVICE_STATE_LIMIT} bytes")
    except BaseException:
        with trio.CancelScope(shield=True), contextlib.suppress(QemuError):
            await monitor.execute("migrate_cancel")
            while await _receive(monitor, pipe):
                pass
        raise
    return bytes(stream)


async def _receive(monitor: "Monitor", pipe: trio.lowlevel.FdStream) -> bytes | bytearray:
    with trio.move_on_after(monitor.deadline):
        return await pipe.receive_some(PIPE_LENGTH)
    raise QemuError(f"migrate: no device state came from QEMU in {monitor.deadline:g} s", errno.ETIMEDOUT)


async def _check_completed(monitor: "Monitor") -> None:
    """See how the migration ended: a stream that was cut short looks like any other here."""
    migration = await monitor.execute("query-migrate")
    status = migration.get("status", "none")
    if status != "completed":
        reason = migration.get("error-desc", "no reason given")
        raise QemuError(f"QEMU's migration of its device state ended as {status!r}: {reason}")
