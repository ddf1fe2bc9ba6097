"""What a mount tells about itself: the snapshot behind status, and query-migrate's answer."""

import os
from collections.abc import Collection
from dataclasses import dataclass

from ckptfs import __version__
from ckptfs.guest.block import GuestBlock, PageState
from ckptfs.guest.guest import Guest
from ckptfs.guest.migration import Migration
from ckptfs.guest.vmstate import memory_on
from ckptfs.migration.query import MigrationStats, QueryMigrate
from ckptfs.migration.status import MigrationStatus
from ckptfs.namespace.status import BadPage, BlockStatus, MountState, Status


def describe_block(block: GuestBlock) -> BlockStatus:
    """How a block's pages stand."""
    counts = block.page_counts()
    return BlockStatus(
        block.idstr,
        block.page_size,
        block.page_count,
        counts[PageState.ZERO],
        counts[PageState.IN_CHECKPOINT],
        counts[PageState.READ],
        counts[PageState.WRITTEN],
    )


def milliseconds(seconds: float | None) -> int | None:
    """As QEMU counts times."""
    return None if seconds is None else round(seconds * 1000)


def query_migrate(migration: Migration, page_size: int) -> QueryMigrate:
    """The newest migration in QEMU's words: times in milliseconds, sizes in bytes."""
    if migration.status is MigrationStatus.NONE:
        return QueryMigrate()
    progress = migration.progress
    seconds = migration.total_time()
    ram = MigrationStats(
        transferred=progress.transferred,
        remaining=progress.remaining_pages * page_size,
        total=progress.total_pages * page_size,
        duplicate=progress.zero_pages,
        normal=progress.normal_pages,
        normal_bytes=progress.normal_pages * page_size,
        mbps=progress.transferred * 8 / seconds / 1e6 if seconds else 0.0,
        dirty_sync_count=1,
        page_size=page_size,
        multifd_bytes=progress.transferred if migration.multifd else 0,
        pages_per_second=int(progress.normal_pages / seconds) if seconds else 0,
    )
    return QueryMigrate(
        status=migration.status,
        total_time=round(seconds * 1000),
        downtime=milliseconds(migration.downtime),
        setup_time=None if migration.active is None else round((migration.active - migration.started) * 1000),
        error_desc=migration.error,
        ram=ram,
    )


@dataclass(frozen=True)
class Origin:
    """What a mount was made from: ``source`` as it was given, ``mounted_at`` on trio's clock, option backends=."""

    source: str
    mounted_at: float
    backends: Collection[str]

    def milliseconds_until(self, moment: float | None) -> int | None:
        """From the mount to ``moment`` on trio's clock."""
        return None if moment is None else milliseconds(moment - self.mounted_at)


def describe_mount(
    guest: Guest, origin: Origin, last_command: str | None, last_outcome: str | None, shared_use: str | None
) -> Status:
    """A moment of the mount."""
    memory = memory_on(guest, origin.backends)
    machine, readers = guest.machines.bound, guest.readers
    if machine is not None:
        machine.look()
    checkpoint = None if guest.base is None else guest.base.checkpoint
    blocks = tuple(describe_block(block) for block in guest.blocks.values())
    held = sum(
        layer.present.count() * block.page_size for block in guest.blocks.values() for layer in block.stack.layers
    )
    set_aside = sum(layer.present.count() for block in guest.blocks.values() for layer in block.stack.written[1:])
    return Status(
        version=__version__,
        pid=os.getpid(),
        spec=origin.source,
        state=_state(guest),
        migration=query_migrate(guest.migrations.newest, guest.page_size),
        base=None if guest.base is None else guest.base.path,
        vmstate=_vmstate(guest),
        direct_io=guest.direct_io_state,
        writers=_writers(guest),
        qmp="none" if machine is None else f"{machine.state} {machine.qmp_path}",
        guest=None if machine is None else machine.run_state,
        capture=guest.migrations.newest.way,
        restored=guest.restored,
        overlay_bytes=held,
        set_aside_pages=set_aside,
        waiting_readers=readers.waiting,
        storage=_storage(guest),
        shared_use=shared_use,
        time_to_first_byte=origin.milliseconds_until(readers.first_byte_at),
        time_to_full=origin.milliseconds_until(readers.full_at),
        blocks=blocks,
        bad_pages=tuple(BadPage(idstr, page, error) for (idstr, page), error in readers.bad_pages.items()),
        bad_page_count=len(readers.bad_pages),
        verified=_verified(guest),
        last_command=last_command,
        last_outcome=last_outcome,
        base_offset=None if checkpoint is None else checkpoint.stream_offset,
        base_machine=None if checkpoint is None else checkpoint.machine,
        base_run_state=None if checkpoint is None else checkpoint.run_state,
        base_devices=() if checkpoint is None else tuple(section.idstr for section in checkpoint.sections),
        memory=memory.main,
        plugged=memory.plugged,
    )


def _state(guest: Guest) -> MountState:
    if not guest.migrations.running:
        return MountState.IDLE
    return MountState.SAVING if guest.migrations.newest.kind == "save" else MountState.RESTORING


def _writers(guest: Guest) -> str:
    if guest.read_only:
        return "none"
    return "running" if guest.writers_run else "stopped"


def _storage(guest: Guest) -> str:
    unanswered = [] if guest.base is None else guest.base.unanswered
    if not unanswered:
        return "ok"
    pages = ", ".join(f"{late.idstr} {late.start} to {late.stop - 1}" for late in unanswered)
    return f"silent: no answer for pages {pages}"


def _vmstate(guest: Guest) -> str:
    if not guest.has_device_state:
        return "none"
    if guest.machines.refusal is not None:
        return f"refused: {guest.machines.refusal}"
    if guest.machines.have_run:
        machine = guest.machines.bound
        if machine is not None and machine.ended:
            return "used: a machine has run on this RAM, and has ended; `reset` makes it ready again"
        return "in use: a machine was started from it"
    return "stale: pages have been written since the checkpoint" if guest.has_written else "ready"


def _verified(guest: Guest) -> str:
    if not guest.settings.verify:
        return "off"
    windows = None if guest.base is None else guest.base.verified_windows
    if guest.base is None or windows is None:
        return "on: " + ("no checkpoint yet" if guest.base is None else "this checkpoint has no checksums")
    return f"on: {windows[0]} of {windows[1]} windows have checksums"
