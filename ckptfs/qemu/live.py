"""A live checkpoint of a running stock QEMU: what happens between the last look at RAM and the guest's next step.

RAM lies in files of the mount, so QEMU has only to write its device state: capability x-ignore-shared leaves
shared, file-backed RAM out of the stream (migration/ram.c, migrate_ram_is_ignored, since 4.0). The guest is
paused from ``stop`` to ``cont``; in between lie the device state, the last pages that the kernel still holds, and
the switch to a new epoch. Pages are written afterwards, in the background.
"""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import trio

from ckptfs.errors import QemuError, StateError
from ckptfs.qemu.monitor import Monitor

log = logging.getLogger(__name__)

E = TypeVar("E")

DEVICE_STATE_LIMIT = 1 << 30
_FD_NAME = "ckptfs"
FLUSH_ROUNDS = 8
FLUSHED_ENOUGH = 0.004
"""Seconds: a flush that takes no longer than this need not be repeated while the guest runs."""

CAPABILITIES = ("x-ignore-shared", "events")
"""On while the device state is taken; every other capability is off."""


@dataclass(frozen=True)
class Capture(Generic[E]):
    """One moment of a guest: what ``freeze`` returned, QEMU's device state stream, and how long it paused.

    ``run_state`` is the one before we stopped it; ``downtime`` is in seconds, 0 for a guest that did not run.
    """

    epoch: E
    stream: bytes
    run_state: str
    downtime: float


async def capture(monitor: Monitor, flush: Callable[[], Awaitable[None]], freeze: Callable[[], E]) -> Capture[E]:
    """Stop the guest, take its device state and the epoch, and let it go on; the guest's state is as before.

    Raises QemuError or StateError, whose text names the step; a guest that ran runs again then.
    """
    run_state = await _run_state(monitor)
    async with _capabilities_set(monitor):
        if run_state == "running":
            await _flush_until_it_settles(flush)
        started = trio.current_time()
        async with _paused(monitor, run_state):
            stream = await _device_state(monitor)
            await flush()
            epoch = freeze()
        downtime = trio.current_time() - started if run_state == "running" else 0.0
    return Capture(epoch, stream, run_state, downtime)


async def _run_state(monitor: Monitor) -> str:
    state: str = (await monitor.execute("query-status"))["status"]
    if state not in ("running", "paused", "prelaunch"):
        raise StateError(
            f"the guest is in state {state!r}, from which QEMU does not migrate: bring it to running or paused"
        )
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
async def _paused(monitor: Monitor, run_state: str) -> AsyncIterator[None]:
    """Keep the guest from running; afterwards, whatever happened, it runs again if it ran before."""
    if run_state != "running":
        yield
        return
    await monitor.execute("stop")
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await monitor.execute("cont")


@asynccontextmanager
async def _capabilities_set(monitor: Monitor) -> AsyncIterator[None]:
    """Set QEMU's capabilities and bandwidth for the device state, and put them back as they were found."""
    found = {entry["capability"]: entry["state"] for entry in await monitor.execute("query-migrate-capabilities")}
    bandwidth = (await monitor.execute("query-migrate-parameters"))["max-bandwidth"]
    changed = {name: name in CAPABILITIES for name, state in found.items() if state != (name in CAPABILITIES)}
    await _set_capabilities(monitor, changed)
    try:
        await monitor.execute("migrate-set-parameters", max_bandwidth=0)
        yield
    finally:
        with trio.CancelScope(shield=True):
            try:
                await monitor.execute("migrate-set-parameters", max_bandwidth=bandwidth)
                await _set_capabilities(monitor, {name: not state for name, state in changed.items()})
            except QemuError as error:
                log.warning("QEMU's migration capabilities could not be put back as found: %s", error)


async def _set_capabilities(monitor: Monitor, states: dict[str, bool]) -> None:
    # switched off first: some exclude one another
    for wanted in (False, True):
        entries: list[dict[str, Any]] = [
            {"capability": name, "state": state} for name, state in states.items() if state is wanted
        ]
        if entries:
            await monitor.execute("migrate-set-capabilities", capabilities=entries)


async def _device_state(monitor: Monitor) -> bytes:
    """Have QEMU migrate its device state into a pipe; no file is needed for it."""
    receiver, sender = os.pipe()
    received: list[bytes] = []

    async def receive() -> None:
        # the thread closes its descriptor by itself: it may outlive this task
        received.append(await trio.to_thread.run_sync(_read_to_end, receiver, abandon_on_cancel=True))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        try:
            await monitor.send_descriptor(_FD_NAME, sender)
        finally:
            os.close(sender)
        monitor.forget_events()
        try:
            await monitor.execute("migrate", uri=f"fd:{_FD_NAME}")
        except QemuError:
            with contextlib.suppress(QemuError):
                await monitor.execute("closefd", fdname=_FD_NAME)
            raise
        status = await monitor.migration_ended()
        if status != "completed":
            reason = (await monitor.execute("query-migrate")).get("error-desc", "no reason given")
            raise QemuError(f"QEMU's migration of its device state {status}: {reason}")
    return received[0]


def _read_to_end(fd: int) -> bytes:
    """Read a pipe until the other end is closed, and close it."""
    parts = []
    length = 0
    try:
        while part := os.read(fd, 1 << 20):
            parts.append(part)
            length += len(part)
            if length > DEVICE_STATE_LIMIT:
                raise QemuError(f"the device state is larger than {DEVICE_STATE_LIMIT} bytes")
    finally:
        os.close(fd)
    return b"".join(parts)
