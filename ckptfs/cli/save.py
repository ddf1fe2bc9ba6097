"""ckptfs save: of a mount, through its ctl; of a machine, without any mount, wherever its RAM lies."""

import argparse
import os
import signal
from collections.abc import AsyncIterator
from functools import partial

import trio

from ckptfs.channels.identity import Identity
from ckptfs.channels.nursery import open_nursery
from ckptfs.cli import operate
from ckptfs.cli.progress import CANCELLING, Display, display_for, tell
from ckptfs.errors import CommandError, StateError
from ckptfs.fuse.report import query_migrate
from ckptfs.guest.guest import Guest
from ckptfs.guest.machine import Machine, Machines
from ckptfs.guest.saving import SaveRequest, save
from ckptfs.guest.settings import Settings
from ckptfs.migration.address import (
    FdAddress,
    FileMigrationArgs,
    MonitorAddress,
    QMPSocket,
    SeekableAddress,
    parse_monitor,
    parse_target,
    seekable_file,
)
from ckptfs.migration.capture import CaptureOptions, Way
from ckptfs.migration.parameters import MigrationParameters

_INTERVAL = 0.2
"""Seconds between two looks at how far it has come."""


def run(arguments: argparse.Namespace) -> int:
    """Save what is mounted on DIR, or with ``--qmp`` the machine behind that socket."""
    if arguments.qmp is None:
        return operate.save(arguments)
    if arguments.target is not None:
        raise CommandError(f"{arguments.target}: --qmp takes one FILE, and no DIR")
    if arguments.ram_only or arguments.force:
        raise CommandError("--ram-only and --force are for mounts, not for --qmp")
    target = seekable_file(parse_target(operate.target_of(arguments.directory)))
    if isinstance(target, FdAddress):
        raise CommandError(f"{arguments.directory}: save to a path")
    if isinstance(target, FileMigrationArgs):
        target = FileMigrationArgs(os.path.abspath(target.filename), target.offset)
    capture = CaptureOptions(Way(arguments.capture), arguments.capture_rounds)
    with display_for(arguments) as display:
        address = parse_monitor(arguments.qmp, arguments.libvirt_uri)
        if isinstance(address, QMPSocket):
            address = QMPSocket(os.path.abspath(address.path))
        libvirt = arguments.format == "libvirt"
        try:
            answer = trio.run(partial(save_machine, address, target, capture, display, libvirt=libvirt))
        except CommandError as error:  # the words were right; what is there is not
            raise StateError(str(error), error.errno) from None
    tell(arguments, answer)
    return 0


async def save_machine(
    address: MonitorAddress,
    target: SeekableAddress,
    capture: CaptureOptions,
    display: Display,
    *,
    libvirt: bool = False,
) -> str:
    """Save the machine whose monitor is at an address; return one line that says what was done.

    ``libvirt``: as a save image of libvirt.

    Raises CommandError, StateError, QemuError, StorageError or OSError; its guest runs on, whatever comes.
    """
    machine = Machine(address, Identity.of_daemon())
    guest = Guest(Settings(MigrationParameters(), capture=capture), Machines(machine))
    try:
        return await save_shown(guest, target, display, libvirt=libvirt)
    finally:
        guest.close()


async def save_shown(guest: Guest, target: SeekableAddress, display: Display, *, libvirt: bool = False) -> str:
    """Save a guest that is not mounted, and show how it goes; return one line that says what was done.

    SIGINT, SIGTERM and SIGHUP cancel it, and nothing is left. Raises what `save` does; a former file is then as it
    was.
    """
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with open_nursery() as nursery:
            nursery.start_soon(_cancel_on_signal, guest, signals, display)
            nursery.start_soon(_show, guest, display)
            try:
                return await save(guest, SaveRequest(target, Identity.of_daemon(), libvirt=libvirt))
            finally:
                nursery.cancel_scope.cancel()


async def _cancel_on_signal(guest: Guest, signals: AsyncIterator[int], display: Display) -> None:
    async for _ in signals:
        if guest.migrations.running:
            display.say(CANCELLING)
            await guest.migrations.cancel()


async def _show(guest: Guest, display: Display) -> None:
    while True:
        newest = guest.migrations.newest
        state = "saving" if newest.running else "idle"
        display.show({"state": state, "migration": query_migrate(newest, guest.page_size).to_json()})
        await trio.sleep(_INTERVAL)
