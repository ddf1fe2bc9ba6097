"""A machine whose RAM lies in files of the mount: QEMU has only to write its device state.

Capability x-ignore-shared leaves shared, file-backed RAM out of the stream (migration/ram.c,
migrate_ram_is_ignored, since 4.0). The guest is paused from ``stop`` to ``cont``. In between, RAM and device state
have to be of one moment, though others may say `cont` as well. So QEMU is asked to wait before the device state
(pause-before-switchover): it has stopped the guest once more by itself then, and refuses every `cont` until its
migration is over (run state finish-migrate; system/runstate.c, qmp_cont). There the last pages are taken that the
kernel still holds, a new epoch begins, and QEMU goes on (migrate-continue). What could still move the guest, gdb
and a reset, shows in QEMU's events. Pages are written afterwards, in the background.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import trio

from ckptfs.channels.nursery import open_nursery
from ckptfs.errors import QemuError, StateError
from ckptfs.mapped_ram.precopy import read_precopy
from ckptfs.mapped_ram.stream import BytesSource
from ckptfs.qemu.capture.session import (
    PARAMETERS,
    Incoming,
    Pause,
    came_to,
    check_completed,
    migration,
    migration_settings,
    paused,
    pipe_from_qemu,
    refuse_changed_capabilities,
    refuse_if_disturbed,
    savable_run_state,
    switch_over,
)

if TYPE_CHECKING:
    from ckptfs.qemu.monitor import Monitor

E = TypeVar("E")
E_co = TypeVar("E_co", covariant=True)

DEVICE_STATE_LIMIT = 1 << 30

FLUSH_ROUNDS = 8
FLUSHED_ENOUGH = 0.004
"""Seconds: a flush that takes no longer than this need not be repeated while the guest runs."""

CAPABILITIES = ("x-ignore-shared", "validate-uuid", "pause-before-switchover", "events")
"""On while the device state is taken; every other capability is off.

validate-uuid has QEMU send the guest's uuid; a checkpoint keeps it if the capability is on here too.
"""


@dataclass(frozen=True)
class Capture(Generic[E]):
    """One moment of a guest: what ``freeze`` returned, QEMU's device state stream, and how long it paused.

    ``run_state`` is that which its owners want; ``downtime`` is in seconds, 0 for a guest that did not run.
    """

    epoch: E
    stream: bytes
    run_state: str
    downtime: float


class RAM(Protocol[E_co]):
    """The machine's RAM on the mount."""

    async def flush(self) -> None:
        """Bring in what was written and the kernel still holds."""

    def freeze(self) -> E_co:
        """Begin an epoch."""

    def was_written(self) -> bool:
        """Whether anything has come in since the epoch began."""
        ...


async def capture(monitor: "Monitor", ram: RAM[E]) -> Capture[E]:
    """Stop the guest, take its device state and the epoch, and let it go on.

    Afterwards, also after any error, a guest that ran runs, unless somebody else has stopped it; one that was
    paused stays paused, in QEMU's state postmigrate, from which it does not migrate once more before it has run.
    Capabilities and parameters are as before. Raises QemuError or StateError, whose text names the step.
    """
    runs = await savable_run_state(monitor) == "running"
    async with pipe_from_qemu(monitor) as incoming:
        if runs:
            await _flush_until_it_settles(ram.flush)
        async with migration_settings(monitor, CAPABILITIES, PARAMETERS), paused(monitor) as pause:
            stream, epoch = await _take(monitor, incoming, pause, ram)
    return Capture(epoch, stream, pause.wanted, pause.downtime)


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


async def _take(monitor: "Monitor", incoming: Incoming, pause: Pause, ram: RAM[E]) -> tuple[bytes, E]:
    """Take RAM, and then the device state, of a guest that stands still."""
    since = len(monitor.events)
    stream = bytearray()
    async with migration(monitor, incoming):
        await refuse_changed_capabilities(monitor, CAPABILITIES)
        while (still := came_to(monitor, since, "pre-switchover")) is None and not incoming.ended:
            await _receive(incoming, stream)
        if still is None:
            await check_completed(monitor, incoming.begun)
            raise StateError("QEMU's migration ended before it came to the device state")
        resumed = pause.resumed
        await ram.flush()
        epoch = ram.freeze()
        refuse_if_disturbed(monitor.events[still:])  # QEMU 10.0 aborts if it goes on with a guest that runs
        async with open_nursery() as nursery:
            nursery.start_soon(
                switch_over, monitor
            )  # QEMU may answer when it has sent what is more than the pipe holds
            while not incoming.ended:
                await _receive(incoming, stream)
    await check_completed(monitor, incoming.begun)
    over = came_to(monitor, still, "completed")
    pause.note_completed(over, await _run_state_of(bytes(stream)) if resumed else pause.wanted)
    refuse_if_disturbed(monitor.events[still:over])
    if not pause.resumed:
        await ram.flush()
        if ram.was_written():
            raise StateError(
                "RAM was written while its device state was taken, by a device of QEMU (data for a serial port?) "
                "or by a program: save again"
            )
    return bytes(stream), epoch


async def _receive(incoming: Incoming, stream: bytearray) -> None:
    stream += await incoming.receive()
    if len(stream) > DEVICE_STATE_LIMIT:
        raise QemuError(f"the device state is larger than {DEVICE_STATE_LIMIT} bytes")


async def _run_state_of(stream: bytes) -> str:
    """The run state from which QEMU itself stopped the guest, after somebody else had let it go on."""
    precopy = await trio.to_thread.run_sync(read_precopy, BytesSource(stream))
    return precopy.checkpoint.run_state or "running"
