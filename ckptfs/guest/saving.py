"""Saving: one moment of RAM, and of the machine on it, becomes a checkpoint, and that the guest's new base.

The steps are those of `_save_to`, top to bottom: the target is opened, an epoch begins, its pages are written, the
file is published, and what was written since goes on top of it.
"""

import contextlib
import errno
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING

import trio

from ckptfs.channels.backing_file import DirectIO
from ckptfs.channels.channels import BACKING_DEADLINE, CLOSING_DEADLINE, NoAnswerError
from ckptfs.channels.descriptors import describe_address
from ckptfs.channels.identity import Identity
from ckptfs.channels.lane import Lane
from ckptfs.channels.target import Target, open_target
from ckptfs.channels.version import KnownFile, Version
from ckptfs.errors import QemuError, StateError
from ckptfs.foreign.libvirt import Domain
from ckptfs.guest.arriving import write_arriving
from ckptfs.guest.base import Base
from ckptfs.guest.block import GuestBlock
from ckptfs.guest.guest import Guest
from ckptfs.guest.layer import Layer, close_layers
from ckptfs.guest.live import compose, left_out
from ckptfs.guest.machine import Machine
from ckptfs.guest.migration import Migration
from ckptfs.guest.outgoing import STRETCH, Epoch, SaveOptions, Written, write_checkpoint
from ckptfs.guest.plain import write_stream
from ckptfs.mapped_ram.layout import Image, empty_image
from ckptfs.mapped_ram.page_stream import Head
from ckptfs.mapped_ram.stream import IGNORE_SHARED, MAPPED_RAM, uuid_of
from ckptfs.mapped_ram.trailer import NO_TRAILER, Depends, Trailer
from ckptfs.migration.address import FileMigrationArgs, SeekableAddress
from ckptfs.migration.capture import Way
from ckptfs.migration.ratelimit import RateLimit
from ckptfs.migration.status import MigrationStatus
from ckptfs.physical.plugged import entry_of
from ckptfs.qemu.backends import check_backends, has_ram_on, memory_devices
from ckptfs.qemu.capture.arriving import arriving
from ckptfs.qemu.capture.mounted import capture
from ckptfs.qemu.origin import saved_machine

if TYPE_CHECKING:
    from ckptfs.qemu.monitor import Monitor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveRequest:
    """Where to save (a path is absolute), as whom, and whether RAM alone is meant though there is device state.

    ``known`` is what has to be there now, and is told what is there afterwards; None for a place that nothing is
    known of. ``force``: whatever is there may be another version. ``libvirt``: as a save image of libvirt, as
    is whatever replaces one. ``permit`` is called before the file gets its name, and may raise.
    """

    address: SeekableAddress
    identity: Identity
    ram_only: bool = False
    known: KnownFile | None = None
    force: bool = False
    libvirt: bool = False
    permit: Callable[[], None] = lambda: None

    @property
    def expected(self) -> Version | None:
        """The version that is to be replaced, None for any."""
        return None if self.known is None or self.force else self.known.version

    @property
    def stream_offset(self) -> int:
        """Where in the file the stream begins."""
        return self.address.offset if isinstance(self.address, FileMigrationArgs) else 0


async def save(guest: Guest, request: SaveRequest) -> str:
    """Write a checkpoint and make it the base; return one line that says what was done.

    The file is durable and under its final name when this returns; after any error the former one is as
    it was, and RAM too. Raises CommandError, StateError, StorageError or OSError.
    """
    if guest.read_only:
        raise StateError("the mount is read-only (ro): there is nothing to save", errno.EPERM)
    if not guest.blocks and guest.machines.bound is None:
        raise StateError(
            "there is no RAM to save: fill the mount (migrate_incoming), make a block, or bind a QEMU (qmp SOCKET)",
            errno.EINVAL,
        )
    capabilities = guest.settings.capabilities
    capabilities.check_file_transport()
    name = describe_address(request.address)
    async with guest.migrations.run("save", name, multifd=capabilities.multifd) as migration:
        lane = Lane()
        opening = partial(
            open_target,
            request.address,
            request.identity,
            guest.settings.descriptors,
            guest.page_cache.device,
            guest.settings.store,
            request.expected,
        )
        target = await lane.ask(opening, undo=lambda target: target.discard(), deadline=BACKING_DEADLINE)
        try:
            await _save_to(guest, lane, target, request, migration)
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(NoAnswerError):
                await lane.ask(target.discard, deadline=CLOSING_DEADLINE)
            raise
        finally:
            if request.known is not None and target.published is not None:
                request.known.version = target.published
    answer = f"saved {name}: {migration.summary()}"
    if capabilities.mapped_ram and capabilities.x_ignore_shared:
        answer += "; QEMU 10.2 and older can't load mapped-ram with x-ignore-shared"
        log.warning("%s", answer)
    return answer


async def _save_to(guest: Guest, lane: Lane, target: Target, request: SaveRequest, migration: Migration) -> None:
    if guest.base is not None and not guest.restored:
        in_place = await lane.ask(partial(guest.base.lies_in, target.file), deadline=BACKING_DEADLINE)
        if in_place:
            raise StateError(
                f"{target.path}: is the file that RAM is restored from, and can't be overwritten in place: save"
                " elsewhere, or `restore` first"
            )
    await lane.ask(target.keep_prefix)
    carried: list[Layer] = []
    try:
        write = _write_machine if await _machine_has_own_ram(guest, request) else _write_moment
        epoch, fresh, written = await write(guest, lane, target, request, migration, carried)
        guest.note_direct_io(target.path, written.direct_io)
        migration.advance(MigrationStatus.DEVICE)
        # no await in between: what has its name is the base, whoever cancels
        base = await lane.ask(partial(_publish, guest, lane, target, written, request))
        with trio.CancelScope(shield=True):
            if base is not None:
                await guest.rebase(epoch, fresh, base)
                guest.machines.note_vmstate(None)  # what was wrong with the former one
                return
    except BaseException:
        await _give_up_epoch(guest, carried)
        raise
    await _give_up_epoch(guest, carried)  # it is saved, but where we can't read it


_Saved = tuple[Epoch, dict[str, GuestBlock], Written]


async def _write_moment(
    guest: Guest, lane: Lane, target: Target, request: SaveRequest, migration: Migration, carried: list[Layer]
) -> _Saved:
    """Begin an epoch, and write it while everybody goes on; ``carried`` gets the layers that it takes."""
    epoch, image = await _begin_epoch(guest, request)
    fresh = _fresh_blocks(epoch, image.page_size, carried)
    image = _configured(guest, image, epoch)
    migration.advance(MigrationStatus.ACTIVE)
    write = write_checkpoint if guest.settings.capabilities.mapped_ram else write_stream
    domain = _domain_of(guest, request, target, image.trailer)
    offset, options = request.stream_offset + _head_length(domain), _save_options(guest)
    written = await write(lane, target.file, offset, image, epoch, options, migration.progress)
    return epoch, fresh, _as_save_image(written, domain, image)


async def _write_machine(
    guest: Guest, lane: Lane, target: Target, request: SaveRequest, migration: Migration, carried: list[Layer]
) -> _Saved:
    """Write a machine whose RAM is its own, as QEMU sends it."""
    machine, capabilities = guest.machines.bound, guest.settings.capabilities
    assert machine is not None
    if capabilities.x_ignore_shared or not capabilities.mapped_ram:
        name, state = ("x-ignore-shared", "off") if capabilities.x_ignore_shared else ("mapped-ram", "on")
        raise StateError(f"a machine whose RAM is not on this mount is saved as a whole: switch {name} {state}")

    images: list[Image] = []  # the last one is that of the whole machine

    def configure(image: Image) -> Image:
        images.append(_with_capabilities(guest, replace(image, trailer=trailer)))
        return images[-1]

    async with machine.monitor() as monitor:
        trailer = await _trailer_of_machine(guest, monitor)
        domain = _domain_of(guest, request, target, trailer)
        async with arriving(monitor, guest.settings.capture) as stream:
            migration.way = stream.way
            migration.advance(MigrationStatus.ACTIVE)
            written, epoch, page_size = await write_arriving(
                lane,
                target.file,
                request.stream_offset + _head_length(domain),
                stream,
                partial(_accept_blocks, guest),
                configure,
                _save_options(guest),
                migration.progress,
            )
    migration.downtime = stream.downtime
    guest.machines.note_own_ram(True)
    return epoch, _fresh_blocks(epoch, page_size, carried), _as_save_image(written, domain, images[-1])


def _domain_of(guest: Guest, request: SaveRequest, target: Target, trailer: Trailer) -> Domain | None:
    """The domain whose save image the file is to be; None for a checkpoint of ours.

    Raises StateError where there is no whole machine, or libvirt's XML of it is not known.
    """
    former = target.save_image
    if former is None and not request.libvirt:
        return None
    if request.ram_only or not (guest.has_device_state or guest.machines.bound is not None):
        raise StateError("a save image of libvirt is a whole machine, and this would be RAM alone", errno.EINVAL)
    domain = Domain.of(trailer) or (None if former is None else former.domain)
    if domain is None:
        raise StateError(
            "libvirt's XML of this machine is not known: bind it as a domain (qmp libvirt:NAME), and save",
            errno.EINVAL,
        )
    return domain


def _head_length(domain: Domain | None) -> int:
    return 0 if domain is None else len(domain.head(was_running=False, mapped_ram=False))


def _as_save_image(written: Written, domain: Domain | None, image: Image) -> Written:
    """The same with libvirt's head before the stream's header: it is written last of all, too."""
    if domain is None:
        return written
    head = domain.head(was_running=image.run_state == "running", mapped_ram=MAPPED_RAM in image.capabilities)
    offset, header = written.header
    return replace(written, header=(offset - len(head), head + header))


def _accept_blocks(guest: Guest, head: Head) -> None:
    """A mount shows the same blocks for as long as it is there."""
    found = {block.idstr: block.used_length for block in head.blocks}
    shown = {idstr: block.used_length for idstr, block in guest.blocks.items()}
    if shown and found != shown:
        names = ", ".join(sorted(idstr for idstr in found | shown if found.get(idstr) != shown.get(idstr)))
        raise StateError(
            f"QEMU's RAM is no longer that of this mount ({names}): save it with "
            "`ckptfs save --qmp SOCKET FILE`, or mount again"
        )


def _fresh_blocks(epoch: Epoch, page_size: int, carried: list[Layer]) -> dict[str, GuestBlock]:
    """An empty block for each that the machine hands over: now, while a lack of memory can still fail the save."""
    carried += (epoch.stacks[idstr].written[0] for idstr in epoch.carried)
    fresh = {}
    for idstr in epoch.carried:
        fresh[idstr] = GuestBlock(idstr, epoch.stacks[idstr].page_count, page_size)
        carried += fresh[idstr].stack.written
    return fresh


async def _machine_has_own_ram(guest: Guest, request: SaveRequest) -> bool:
    """Whether the machine is to be captured with its RAM, which lies elsewhere.

    Raises StateError (EINVAL) where that is asked for (capture=), and would lose what was written here.
    """
    machine, way = guest.machines.bound, guest.settings.capture.way
    if machine is None or request.ram_only:
        return False
    if not guest.blocks:
        return True
    is_copy = guest.base is not None and not guest.has_written and not guest.machines.have_run
    if way is Way.AUTO and not is_copy:
        return False
    async with machine.monitor() as monitor:
        on_mount = await has_ram_on(monitor, guest.page_cache.files(guest.blocks))
    if way is not Way.AUTO and (on_mount or not is_copy):
        why = "QEMU has RAM on this mount" if on_mount else "RAM was written on this mount, and would be lost"
        raise StateError(f"capture={way} is for machines whose RAM lies elsewhere: {why}", errno.EINVAL)
    return not on_mount


async def _begin_epoch(guest: Guest, request: SaveRequest) -> tuple[Epoch, Image]:
    """Return RAM at one moment, and what goes into the file beside it."""
    machine = guest.machines.bound
    if machine is not None and not request.ram_only:
        captured = await _capture(guest, machine)
        if captured is not None:
            return captured
    async with guest.settled():
        _refuse_mixed_moments(guest, request)
        return guest.freeze(guest.blocks), _image(guest, request.ram_only)


async def _capture(guest: Guest, machine: Machine) -> tuple[Epoch, Image] | None:
    """Take RAM and device state of the machine behind the mount at one moment.

    None if it has been saved while it was paused: QEMU does not do that twice (run state postmigrate), but
    then nothing has changed since, and RAM and device state are those of the base.
    """
    page_cache = guest.page_cache
    async with machine.monitor() as monitor:
        if machine.run_state == "postmigrate":
            return None
        found = await check_backends(monitor, page_cache.files(guest.blocks))
        if not found:
            raise QemuError(
                "QEMU has none of its RAM on this mount: see `ckptfs qemu-args` for how to start it",
                errno.EINVAL,
            )
        trailer = await _trailer_of_machine(guest, monitor)
        captured = await capture(monitor, _MachineRAM(guest, list(found)))
    epoch, image = await trio.to_thread.run_sync(compose, captured, list(guest.blocks))
    guest.migrations.newest.downtime = captured.downtime
    if absent := left_out(epoch, guest.blocks):
        guest.migrations.newest.remark = f"{', '.join(absent)} is no RAM of this QEMU now, and left out"
    guest.machines.note_run()
    return epoch, replace(image, trailer=trailer)


class _MachineRAM:
    """The blocks that a machine has as its memory, as `capture` wants them."""

    def __init__(self, guest: Guest, idstrs: list[str]) -> None:
        self._guest = guest
        self._idstrs = idstrs

    async def flush(self) -> None:
        await self._guest.flush(self._idstrs)

    def freeze(self) -> Epoch:
        return self._guest.freeze(self._idstrs)

    def was_written(self) -> bool:
        blocks = (self._guest.blocks[idstr] for idstr in self._idstrs)
        return any(block.stack.written[0].present.any(0, block.page_count) for block in blocks)


def _refuse_mixed_moments(guest: Guest, request: SaveRequest) -> None:
    """RAM of one moment and device state of another would be a checkpoint that corrupts its guest."""
    if request.ram_only:
        return
    unchanged = guest.machines.have_run and guest.has_device_state and not guest.has_written
    if guest.machines.bound is not None and not unchanged:
        raise StateError(
            "QEMU saved this guest while it was paused, and saves it again only after it has run: `cont`, then"
            " save",
            errno.EBUSY,
        )
    if guest.machines.have_run and (guest.has_written or not guest.has_device_state):
        why = (
            "the device state of the checkpoint is older"
            if guest.has_device_state
            else "its device state is not known"
        )
        raise StateError(
            f"a machine has run on this RAM, and {why}: "
            "bind its QMP socket (qmp SOCKET) to save both, or say `save ram-only`, or `reset`",
            errno.EPERM,
        )


def _image(guest: Guest, ram_only: bool) -> Image:
    """What goes into a checkpoint beside RAM: the base's device state, or none."""
    change = Depends.RAM if guest.has_written else Depends.NOTHING
    if guest.base is not None and not ram_only:
        return replace(guest.base.image(), trailer=_trailer_after(guest, change))
    image = empty_image([(block.idstr, block.used_length) for block in guest.blocks.values()], guest.page_size)
    return replace(image, trailer=_trailer_after(guest, change | Depends.DEVICE_STATE))


def _trailer_after(guest: Guest, change: Depends) -> Trailer:
    """What the base's trailer says that still holds after a ``change``."""
    return NO_TRAILER if guest.base is None else guest.base.trailer.after(change)


async def _trailer_of_machine(guest: Guest, monitor: "Monitor") -> Trailer:
    """What is to be remembered of the machine behind ``monitor``, which is being captured."""
    trailer = _trailer_after(guest, Depends.RAM | Depends.DEVICE_STATE)
    assert guest.machines.bound is not None
    identity = guest.machines.bound.identity
    saved = await trio.to_thread.run_sync(saved_machine, monitor.pid, monitor.version, identity)
    known = [entry.entry() for entry in (saved, monitor.domain) if entry is not None]
    if (plugged := entry_of(await memory_devices(monitor))) is not None:
        known.append(plugged)
    return reduce(Trailer.with_entry, known, trailer)


def _configured(guest: Guest, image: Image, epoch: Epoch) -> Image:
    """The image as the capabilities want it, without the blocks that stay in their shared files."""
    return _with_capabilities(guest, image, _ignored(guest, epoch))


def _with_capabilities(guest: Guest, image: Image, ignored: Collection[str] = ()) -> Image:
    capabilities = tuple(name for name in (IGNORE_SHARED, MAPPED_RAM) if guest.settings.capabilities.get(name))
    uuid = uuid_of(image.subsections) or guest.settings.uuid if guest.settings.capabilities.validate_uuid else None
    return image.configured(capabilities, uuid, ignored)


def _ignored(guest: Guest, epoch: Epoch) -> set[str]:
    """The blocks whose content stays in the shared file that it came from: capability x-ignore-shared.

    That file is never written here, so whatever was written over it would be lost: StateError (EPERM).
    """
    if guest.base is None or not guest.settings.capabilities.x_ignore_shared:
        return set()
    for idstr in guest.base.shared:
        if any(layer.present.any(0, layer.present.page_count) for layer in epoch.stacks[idstr].written):
            raise StateError(
                f"{idstr}: pages were written, and with x-ignore-shared the save would leave them out: "
                "switch x-ignore-shared off, or `reset`",
                errno.EPERM,
            )
    return set(guest.base.shared)


def _publish(guest: Guest, lane: Lane, target: Target, written: Written, request: SaveRequest) -> Base | None:
    """Publish what was written, once it has been read back: it becomes the base, so it had better be whole.

    Until the target commits to it, it can be cancelled.

    None if it can't be read (a descriptor for writing alone was handed in): the base stays what it was.
    """

    def commit() -> None:
        request.permit()
        lane.commit()

    target.seal(*written.header)
    file = target.reader()
    if file is None:
        target.publish(commit, lane.go_on)
        return None
    try:
        base = Base(target.path, file, request.stream_offset, guest.settings.base_options())
    except BaseException:
        file.close()
        raise
    try:
        target.publish(commit, lane.go_on)
    except BaseException:
        base.close()
        raise
    return base


def _save_options(guest: Guest) -> SaveOptions:
    """As QEMU: without multifd there is one channel, and direct-io has no effect."""
    parameters, multifd = guest.settings.parameters, guest.settings.capabilities.multifd
    rate_limit = RateLimit()
    return SaveOptions(
        channel_count=parameters.multifd_channels if multifd else 1,
        direct_io=guest.settings.direct_io() if multifd else DirectIO(False),
        zero_page_detection=parameters.zero_page_detection,
        wait_for_bandwidth=partial(_wait_for_bandwidth, guest, rate_limit),
        charge=rate_limit.charge,
        stretch=lambda: 0.0 if guest.settings.parameters.max_bandwidth else STRETCH,
    )


async def _wait_for_bandwidth(guest: Guest, rate_limit: RateLimit, length: int) -> None:
    """max-bandwidth may change while a save runs, and counts at once."""
    rate_limit.bytes_per_second = guest.settings.parameters.max_bandwidth
    while delay := rate_limit.delay(trio.current_time()):
        await trio.sleep(delay)
        rate_limit.bytes_per_second = guest.settings.parameters.max_bandwidth
    rate_limit.charge(length)


async def _give_up_epoch(guest: Guest, carried: list[Layer]) -> None:
    with trio.CancelScope(shield=True):
        await guest.thaw()
    await close_layers(carried)
