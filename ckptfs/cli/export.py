"""ckptfs export: memory in another form, out of a checkpoint or a mount, without a copy in between.

A file is opened as a mount opens it, and read as views/ are. Of a mount it is views/ themselves that are read:
they are of one moment, and refused once RAM was written.
"""

import argparse
import contextlib
import errno
import os
import shlex
import signal
import sys
from typing import Self

import trio

from ckptfs.api.memory import MountedMemory
from ckptfs.api.status import Status, is_dead_mount, read_status
from ckptfs.channels.backing_file import DirectIO
from ckptfs.channels.descriptors import Descriptors
from ckptfs.channels.identity import Identity
from ckptfs.channels.nursery import leading_error
from ckptfs.channels.output import FileOutput, StreamOutput
from ckptfs.cli.control import perform
from ckptfs.cli.progress import CANCELLING, Display, display_for, tell
from ckptfs.cli.save import save_shown
from ckptfs.errors import CkptfsError, CommandError, StateError, StorageError
from ckptfs.guest.base import BaseOptions
from ckptfs.guest.export import Exported, GuestMemory, Memory, write_layout
from ckptfs.guest.guest import Guest
from ckptfs.guest.opening import open_checkpoint
from ckptfs.guest.views import look
from ckptfs.guest.vmstate import memory_on
from ckptfs.migration.address import FileMigrationArgs, ObjectAddress, SeekableAddress, parse_target
from ckptfs.migration.size import format_size
from ckptfs.migration.store import StoreOptions
from ckptfs.physical.layouts import Extent, Layout, flat, lime_image
from ckptfs.physical.memory_map import MemoryMap, Region, words_of

FORMATS = ("raw", "elf", "lime", "mapped-ram", "libvirt")
_CHECKPOINTS = ("mapped-ram", "libvirt")
"""Those that a save writes."""
_VIEWS = {"raw": "phys", "elf": "vmcore", "lime": "phys"}
"""The view that has the bytes, or the memory map, of a format."""

_INTERVAL = 0.2
"""Seconds between two looks at how far it has come."""

_CHANNELS = 4


def run(arguments: argparse.Namespace) -> int:
    """Export what is in FILE, or mounted on DIR, to OUT."""
    _check(arguments)
    with display_for(arguments) as display:
        answer = _export(arguments, display)
    if arguments.out != "-":
        tell(arguments, answer)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise CommandError for what can't be meant."""
    if arguments.map and arguments.format in _CHECKPOINTS:
        raise CommandError("--map: a checkpoint has blocks, not addresses: leave it out")
    if arguments.out != "-":
        if os.path.exists(arguments.path) and _is_same(arguments.path, arguments.out):
            raise CommandError(f"{arguments.out}: is the file to be exported: name another file")
        return
    if arguments.format in _CHECKPOINTS:
        raise CommandError("-: a checkpoint can't be written to a pipe: name a file")
    if arguments.json:
        raise CommandError("--json: standard output is taken by the export: name a file")
    if os.isatty(sys.stdout.fileno()):
        raise CommandError("-: standard output is a terminal: send it to a pipe, or name a file")


def _is_same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def _export(arguments: argparse.Namespace, display: Display) -> str:
    out = arguments.out if arguments.out == "-" else os.path.realpath(arguments.out)
    if os.path.isdir(arguments.path) or is_dead_mount(arguments.path):
        if arguments.map or arguments.offset:
            raise CommandError("--map and --offset are for a FILE; for a mount they are mount options")
        return _export_mount(arguments.path, out, arguments.format, display)
    address = _address(arguments.path, arguments.offset)
    return trio.run(_export_file, address, out, arguments, display)


def _address(path: str, offset: int) -> SeekableAddress:
    """A file, or an object (``s3://BUCKET/KEY``), as a mount takes it."""
    address = parse_target(path) if "://" in path else None
    return address if isinstance(address, ObjectAddress) else FileMigrationArgs(os.path.abspath(path), offset)


# ---- a file ------------------------------------------------------------------------------------------


async def _export_file(address: SeekableAddress, out: str, arguments: argparse.Namespace, display: Display) -> str:
    options = BaseOptions(DirectIO(False), _CHANNELS)
    guest = Guest.incoming(open_checkpoint(address, Identity.of_daemon(), Descriptors(), options, StoreOptions()))
    try:
        if arguments.format in _CHECKPOINTS:
            libvirt = arguments.format == "libvirt"
            return await save_shown(guest, FileMigrationArgs(out, 0), display, libvirt=libvirt)
        layout = await _layout_of(guest, arguments)
        return await _write(layout, GuestMemory(guest), out, -1, display)
    finally:
        guest.close()


async def _layout_of(guest: Guest, arguments: argparse.Namespace) -> Layout:
    name = _VIEWS[arguments.format]
    views = await look(guest, memory_on(guest, ()), arguments.map)
    if name not in views.layouts:
        problem = words_of(views.missing[name], "--map ")
        raise StateError(f"{arguments.path}: {arguments.format} can't be made of it: {problem}", errno.ENODATA)
    layout = views.layouts[name]
    return lime_image(layout.memory) if arguments.format == "lime" else layout


# ---- a mount -----------------------------------------------------------------------------------------


def _export_mount(directory: str, out: str, kind: str, display: Display) -> str:
    status = read_status(directory)
    if kind in _CHECKPOINTS:
        if status["base"] is not None and _is_same(status["base"], out):
            raise CommandError(f"{out}: is what is mounted: name another file, or `ckptfs save {directory}`")
        return perform(directory, f"save {shlex.quote(out)}{' libvirt' if kind == 'libvirt' else ''}", display)
    with _MountedMemory(directory, kind, status) as memory:
        device = os.stat(directory).st_dev
        if status["base"] is not None and _is_same(status["base"], out):
            raise CommandError(f"{out}: is what is mounted: name another file")
        return trio.run(_write, memory.layout, memory, out, device, display)


class _MountedMemory:
    """The RAM of a mount, read from views/; ``layout`` is what the mount shows it as, or LiME's of the same."""

    def __init__(self, directory: str, kind: str, status: Status) -> None:
        self._directory = directory
        self._kind = kind
        self._status = status
        self.page_size: int = status["blocks"][0]["page-size"] if status["blocks"] else 1

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._phys = self._open("phys", undo)
            mounted = undo.enter_context(MountedMemory(self._directory))
            self.with_data = {idstr: block.with_data for idstr, block in mounted.blocks.items()}
            self.layout = self._layout_of(mounted.physical.map, undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    async def read(self, region: Region) -> memoryview:
        """Read it by its address. StateError if RAM was written meanwhile."""
        return memoryview(await trio.to_thread.run_sync(self._read, region, abandon_on_cancel=True))

    def _read(self, region: Region) -> bytes:
        try:
            data = os.pread(self._phys, region.length, region.start)
        except OSError as error:
            if error.errno == errno.EPERM:
                raise self._written() from None
            raise StorageError(
                f"{self._directory}: {region.idstr} at {region.block_offset:#x}: {error.strerror}", error.errno
            ) from None
        if len(data) != region.length:
            raise StorageError(f"{self._directory}: views/phys ends at {region.start + len(data):#x}")
        return data

    def _open(self, name: str, undo: contextlib.ExitStack) -> int:
        try:
            fd = os.open(os.path.join(self._directory, "views", name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            without = (
                "it was mounted with views=off" if self._status["base"] else "there is no checkpoint yet: save it"
            )
            why = self._status["views-missing"] or without
            raise StateError(f"{self._directory}: has no views/{name}: {why}", errno.ENODATA) from None
        except PermissionError:
            raise self._written() from None
        undo.callback(os.close, fd)
        return fd

    def _written(self) -> StateError:
        return StateError(
            f"{self._directory}: pages have been written since the checkpoint, so its registers do not match this"
            " RAM: `ckptfs reset` drops them, `ckptfs save` makes a new checkpoint",
            errno.EPERM,
        )

    def _layout_of(self, memory: MemoryMap, undo: contextlib.ExitStack) -> Layout:
        if self._kind == "raw":
            return flat(memory)
        if self._kind == "lime":
            return lime_image(memory)
        core = self._open("vmcore", undo)
        length = os.fstat(core).st_size
        position = length - sum(region.length for region in memory.regions)
        extents = [Extent(0, position, os.pread(core, position, 0))]
        for region in memory.regions:
            extents.append(Extent(position, region.length, region))
            position += region.length
        return Layout(tuple(extents), length)


# ---- both --------------------------------------------------------------------------------------------


async def _write(layout: Layout, memory: Memory, out: str, forbidden_device: int, display: Display) -> str:
    """Write a layout to ``out``; SIGINT, SIGTERM and SIGHUP leave nothing of it."""
    exported = Exported()
    try:
        output = StreamOutput(sys.stdout.fileno()) if out == "-" else FileOutput(out, forbidden_device)
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror}", error.errno) from None
    whole = False
    try:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:

                async def stop_on_signal() -> None:
                    async for _ in signals:
                        display.say(CANCELLING)
                        nursery.cancel_scope.cancel()

                nursery.start_soon(stop_on_signal)
                nursery.start_soon(_show, exported, display)
                await write_layout(layout, memory, output, exported)
                whole = True
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise _named(leading_error(group), out) from None
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(output.discard)
    if not whole:
        raise StateError(f"{out}: interrupted: the incomplete file was removed", errno.ECANCELED)
    return f"exported {out}: {format_size(layout.length)}, {format_size(exported.done)} read"


def _named(error: BaseException, out: str) -> BaseException:
    """An error of writing, with what was written."""
    if isinstance(error, OSError) and not isinstance(error, CkptfsError):
        return StorageError(f"{out}: {error.strerror}", error.errno)
    return error


async def _show(exported: Exported, display: Display) -> None:
    while True:
        ram = {"total": exported.total, "remaining": exported.total - exported.done}
        display.show({"state": "exporting", "migration": {"status": "active", "ram": ram}})
        await trio.sleep(_INTERVAL)
