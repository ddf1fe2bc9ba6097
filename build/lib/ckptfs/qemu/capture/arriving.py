"""A machine whose RAM is its own, wherever it lies: QEMU sends pages and device state while its guest runs on.

Two ways, tried in this order; QEMU says at once where the first can't be had:

* **snapshot**: with capability background-snapshot QEMU write-protects RAM (userfaultfd), lets the guest go on
  after a few milliseconds, and sends every page as it was at that moment (bg_migration_thread in
  migration/migration.c, since 6.0). That works for anonymous memory, memfd, /dev/shm and hugetlbfs; not for a file
  that is mapped private, nor on FUSE.
* **precopy**: QEMU sends pages while the guest dirties them, round after round, and stops it for the last. Rounds
  are counted: when they no longer shrink, or are too many, we stop the guest, and what is left comes while it
  stands still.

QEMU may answer no sooner than its stream is read. With background-snapshot a vCPU waits for its page, and a `stop`
of somebody else, in QEMU's main thread, for that vCPU; and QEMU sends its last round while it holds its big lock.
So tasks of their own ask it and tell it what there is to say.

Each is a context. Inside, the stream is to be received until it has ``ended``, and then `Arriving.finish`ed. When
it is left before, QEMU's migration is cancelled, and the guest goes on.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from ckptfs.channels.nursery import open_nursery
from ckptfs.migration.capture import CaptureOptions, Way
from ckptfs.qemu.capture.session import (
    PARAMETERS,
    CapabilitiesRefusedError,
    Incoming,
    Pause,
    came_to,
    check_completed,
    migration,
    migration_settings,
    pipe_from_qemu,
    refuse_changed_capabilities,
    refuse_if_torn,
    savable_run_state,
    switch_over,
)

if TYPE_CHECKING:
    from ckptfs.qemu.monitor import Event, Monitor

log = logging.getLogger(__name__)

SNAPSHOT_CAPABILITIES = ("background-snapshot", "events")
PRECOPY_CAPABILITIES = ("pause-before-switchover", "events")
"""QEMU waits before its last round: when it has heard us say that it may go on, it has done with others' `stop`."""

SHRINKING = 0.7
"""A round of precopy that is larger than this part of the one before no longer shrinks."""


class Arriving:
    """A machine's stream, while it comes.

    After `finish`, ``downtime`` is how long the guest stood still, in seconds; and ``run_state`` the one in which a
    machine is to start from the stream, None for that which the stream says.
    """

    def __init__(self, way: Way, monitor: "Monitor", incoming: Incoming) -> None:
        self.way = way
        self.run_state: str | None = None
        self.downtime = 0.0
        self._monitor = monitor
        self._incoming = incoming
        self._since = len(monitor.events)

    @property
    def ended(self) -> bool:
        """Whether all has come."""
        return self._incoming.ended

    async def receive(self) -> bytes | bytearray:
        """Some bytes; none at times, and at the end."""
        return await self._incoming.receive()

    async def finish(self, run_state: str | None) -> None:
        """See that QEMU has sent all; ``run_state`` is the one in the stream. Raises QemuError, StateError."""
        await check_completed(self._monitor, self._incoming.begun)
        events = self._monitor.events[self._since :]
        active = came_to(self._monitor, self._incoming.begun, "active") or self._incoming.begun
        refuse_if_torn(self._monitor.events[active:], ran=run_state == "running")
        self.downtime = _pause_in(events)


class _Precopy(Arriving):
    """Counts rounds, and ends them."""

    def __init__(self, monitor: "Monitor", incoming: Incoming, runs: bool, max_rounds: int) -> None:
        super().__init__(Way.PRECOPY, monitor, incoming)
        self._runs = runs
        self._max_rounds = max_rounds
        self._rounds = [0]  # bytes
        self._too_long = trio.Event()
        self._stopped: int | None = None
        self._ready = trio.Event()
        self._finished = False

    async def receive(self) -> bytes | bytearray:
        if came_to(self._monitor, self._incoming.begun, "pre-switchover") is not None:
            self._ready.set()
        part = await super().receive()
        self._rounds[-1] += len(part)
        passes = sum(event.name == "MIGRATION_PASS" for event in self._monitor.events[self._since :])
        if passes > len(self._rounds):
            self._judge_rounds()
            self._rounds.append(0)
        return part

    def _judge_rounds(self) -> None:
        *_, former, last = [0, *self._rounds]
        if len(self._rounds) >= self._max_rounds or (former and last > former * SHRINKING):
            self._too_long.set()

    async def stop_what_takes_too_long(self) -> None:
        """Stop the guest when rounds no longer get it done."""
        while True:
            await self._too_long.wait()
            self._too_long = trio.Event()
            if self._stands_still or self.ended:
                continue
            log.info(
                "precopy: the guest dirties RAM as fast as it is sent (%d rounds, the last of %d MiB): "
                "it is paused for the rest",
                len(self._rounds),
                self._rounds[-2] >> 20,
            )
            self._stopped = len(self._monitor.events)
            await self._monitor.execute("stop")

    async def switch_over_when_ready(self) -> None:
        """Have QEMU go on to the last round."""
        await self._ready.wait()
        await switch_over(self._monitor)

    @property
    def _stands_still(self) -> bool:
        """Whether it does since we, or somebody else, stopped it."""
        names = [event.name for event in self._monitor.events[self._since :] if event.name in ("STOP", "RESUME")]
        return names[-1] == "STOP" if names else not self._runs

    async def finish(self, run_state: str | None) -> None:
        """QEMU leaves a guest that it has sent away standing still: let it go on, if that is what is wanted."""
        monitor = self._monitor
        await check_completed(monitor, self._incoming.begun)
        over = came_to(monitor, self._since, "completed") or len(monitor.events)
        stopped_by_us = self._stopped is not None and not _has_resumed(monitor.events[self._stopped : over])
        self.run_state = "running" if stopped_by_us else None
        wanted = self.run_state or run_state or "running"
        pause = Pause(monitor, wanted)
        pause.note_completed(over, wanted)
        self._finished = True
        await pause.end()
        if wanted == "running":
            self.downtime = _last_pause_in(monitor.events[self._since :])

    async def give_up(self, cause: BaseException) -> None:
        """After an error: QEMU itself has put back what it stopped, unless it was done already."""
        if not self._finished and self._runs and (self._stopped is not None or self.ended):
            pause = Pause(self._monitor, "running")
            if self._stopped is not None:
                pause.note_stopped(self._stopped + 1)
            await pause.end(cause)


@asynccontextmanager
async def arriving(monitor: "Monitor", options: CaptureOptions) -> AsyncIterator[Arriving]:
    """Capture a machine. Raises QemuError (CapabilitiesRefusedError) or StateError."""
    if options.way is not Way.PRECOPY:
        try:
            async with _snapshot(monitor) as stream:
                yield stream
                return
        except CapabilitiesRefusedError as error:
            if options.way is Way.SNAPSHOT:
                raise
            log.info("%s: precopy instead", error)
    async with _precopy(monitor, options.max_rounds) as stream:
        yield stream


@asynccontextmanager
async def _snapshot(monitor: "Monitor") -> AsyncIterator[Arriving]:
    await savable_run_state(monitor)
    async with (
        pipe_from_qemu(monitor) as incoming,
        migration_settings(monitor, SNAPSHOT_CAPABILITIES, PARAMETERS),
    ):
        stream = Arriving(Way.SNAPSHOT, monitor, incoming)
        async with migration(monitor, incoming), open_nursery() as nursery:
            nursery.start_soon(refuse_changed_capabilities, monitor, SNAPSHOT_CAPABILITIES)
            yield stream


@asynccontextmanager
async def _precopy(monitor: "Monitor", max_rounds: int) -> AsyncIterator[Arriving]:
    runs = await savable_run_state(monitor) == "running"
    async with (
        pipe_from_qemu(monitor) as incoming,
        migration_settings(monitor, PRECOPY_CAPABILITIES, PARAMETERS),
    ):
        stream = _Precopy(monitor, incoming, runs, max_rounds)
        try:
            async with migration(monitor, incoming), open_nursery() as nursery:
                nursery.start_soon(refuse_changed_capabilities, monitor, PRECOPY_CAPABILITIES)
                nursery.start_soon(stream.stop_what_takes_too_long)
                nursery.start_soon(stream.switch_over_when_ready)
                yield stream
                nursery.cancel_scope.cancel()
        except BaseException as error:
            await stream.give_up(error)
            raise


def _has_resumed(events: "Sequence[Event]") -> bool:
    return any(event.name == "RESUME" for event in events)


def _pause_in(events: "Sequence[Event]") -> float:
    """Seconds from the first STOP to the RESUME after it, by QEMU's clock; 0 without them."""
    stops = [number for number, event in enumerate(events) if event.name == "STOP"]
    return _pause_from(events[stops[0] :]) if stops else 0.0


def _last_pause_in(events: "Sequence[Event]") -> float:
    """Seconds from the last STOP to the RESUME after it."""
    stops = [number for number, event in enumerate(events) if event.name == "STOP"]
    return _pause_from(events[stops[-1] :]) if stops else 0.0


def _pause_from(events: "Sequence[Event]") -> float:
    resumed = next((event for event in events if event.name == "RESUME"), None)
    return 0.0 if resumed is None else resumed.at - events[0].at
