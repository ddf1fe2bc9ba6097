"""A mount's life: the guest below, what the kernel asks above, and everything that starts and ends with it."""

import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import pyfuse3
import trio

from ckptfs.channels.lease.keeping import Lease
from ckptfs.channels.ring import ring_of_this_run
from ckptfs.fuse import connection
from ckptfs.fuse.control import Control
from ckptfs.fuse.daemon import Starter, end_by_force_after
from ckptfs.fuse.events import Changes, EventLog
from ckptfs.fuse.logs import Log
from ckptfs.fuse.nodes import Nodes
from ckptfs.fuse.opening import Opening
from ckptfs.fuse.operations import Operations
from ckptfs.fuse.page_cache import KernelPageCache
from ckptfs.fuse.ram_files import RAMFiles
from ckptfs.fuse.report import Origin
from ckptfs.fuse.session import open_session
from ckptfs.fuse.sharing import Sharing
from ckptfs.fuse.tuning import tune_backing_device
from ckptfs.fuse.utab import register, unregister
from ckptfs.fuse.view_files import ViewFiles
from ckptfs.guest.guest import Guest
from ckptfs.migration.address import SeekableAddress
from ckptfs.migration.size import MiB
from ckptfs.migration.status import MigrationStatus
from ckptfs.namespace.events import MIGRATION, MIGRATION_PASS
from ckptfs.namespace.options import MountOptions
from ckptfs.namespace.status import counted

log = logging.getLogger(__name__)

RETURN_DEADLINE = 1.0
"""Seconds after a signal in which threads have to be back from system calls on the mount."""

ENDING_DEADLINE = 10.0
"""Seconds after a signal in which the daemon ends, whatever else it waits for."""

MIN_TASKS = 4
MAX_TASKS = 2000
"""Tasks of pyfuse3's session loop: a few always wait for requests (starting one costs as much as a small read);
many may be inside one, as every writer that `stop` holds back is."""


class Mount:
    """One mount of ``guest``; made where trio runs, as its clock begins here."""

    def __init__(
        self,
        guest: Guest,
        mountpoint: str,
        source: str,
        options: MountOptions,
        spec: SeekableAddress | None,
        owner: tuple[int, int],
        journal: Log,
        lease: Lease,
    ) -> None:
        """``owner`` is uid and gid of all files."""
        self._guest = guest
        self._mountpoint = mountpoint
        self._source = source
        self._options = options
        self._log = journal
        self._lease = lease
        self._changes = Changes()
        self._events = EventLog()
        self._nursery: trio.Nursery
        self._in_utab = False
        views = ViewFiles(guest, options.backends, options.map) if options.views else None
        nodes = Nodes(guest, owner, options.umask, views, self._events)
        self._ram_files = RAMFiles(nodes, mountpoint)
        self._page_cache = page_cache = KernelPageCache(self._ram_files)
        origin = Origin(source, trio.current_time(), options.backends)
        sharing = Sharing(self._ram_files, self._changes, self._start_soon)
        self._control = Control(
            guest,
            spec,
            origin,
            self._ram_files,
            page_cache,
            self._changes,
            sharing,
            lease,
            views,
            journal,
            self._start_soon,
        )
        opening = Opening(
            guest,
            options,
            self._ram_files,
            page_cache,
            self._control,
            self._changes,
            self._events,
            sharing,
            views,
        )
        self._operations = Operations(nodes, opening)
        guest.migrations.watch(self._on_status)
        lease.watch(self._changes.note)
        guest.mounted(page_cache)

    async def serve(self, starter: Starter) -> None:
        """Mount, serve until umount or a signal, and leave nothing behind.

        A save that runs when the mount goes away is finished; a signal cancels it. If this raises, the mount
        point stays dead (ENOTCONN): better than an empty directory that looks like a guest without memory.
        StateError, naming the cause: it could not be mounted.
        """
        # from before there is a mount until it is gone: a signal in between must not leave a dead one
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            allow_other = self._options.allow_other
            open_session(self._operations, self._mountpoint, self._source, allow_other=allow_other)
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._heed_signals, signals, nursery)
                nursery.start_soon(self._set_up, starter)
                nursery.start_soon(self._lease.keep)
                with trio.CancelScope() as handlers:
                    nursery.start_soon(self._end_handlers, handlers)
                    await pyfuse3.main(MIN_TASKS, MAX_TASKS)
                await self._end_of_save()
                nursery.cancel_scope.cancel()
            pyfuse3.close(unmount=True)
            self._tell_what_is_lost()
            if self._in_utab:
                unregister(self._mountpoint)
        # files are closed by the end of the process: a thread in close(2) can't be killed where a storage is silent

    async def _set_up(self, starter: Starter) -> None:
        """What needs an answering mount: its device number, its tuning, its background work."""
        ring_of_this_run()  # now, and not at the first read: what the daemon has open stays the same
        await self._operations.initialized.wait()
        device = (await trio.to_thread.run_sync(os.stat, self._mountpoint, abandon_on_cancel=True)).st_dev
        self._ram_files.device = device
        if refused := await trio.to_thread.run_sync(tune_backing_device, device):
            log.info("only root can tune the mount: %s left as it was", ", ".join(refused))
        self._in_utab = await trio.to_thread.run_sync(register, self._source, self._mountpoint)
        self._control.look_at_views()
        if self._guest.base is not None and self._options.prefetch != "off":
            (self._control.start_restore if self._options.prefetch == "on" else self._control.start_warming)()
        if missing := self._log.missing:
            starter.remark(missing)
        starter.mounted()
        log.info("%s: mounted on %s", self._source, self._mountpoint)

    async def _end_of_save(self) -> None:
        migration = self._guest.migrations.newest
        if migration.running and migration.kind == "save":
            await migration.over.wait()

    async def _end_handlers(self, handlers: trio.CancelScope) -> None:
        """When the mount is gone, end those handlers whose answer nobody waits for any more, as of held writers."""
        await connection.gone()
        await self._end_of_save()
        handlers.cancel()

    async def _heed_signals(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                self._start_soon(self._reopen_log)
                continue
            log.info("%s: ending on %s", self._mountpoint, signal.Signals(number).name)
            end_by_force_after(ENDING_DEADLINE, self._mountpoint, self._abort)
            await self._leave_the_kernel()
            pyfuse3.terminate()
            nursery.cancel_scope.cancel()

    async def _reopen_log(self) -> None:
        await trio.to_thread.run_sync(self._log.reopen, self._ram_files.device, abandon_on_cancel=True)

    def _tell_what_is_lost(self) -> None:
        page_count = self._guest.written_page_count
        if page_count:
            size = page_count * self._guest.page_size / MiB
            pages = counted(page_count, "written page")
            log.warning("%s: unmounted, %s (%.4g MiB) not saved", self._mountpoint, pages, size)
        else:
            log.info("%s: unmounted", self._mountpoint)

    async def _leave_the_kernel(self) -> None:
        """See that no thread is left in a system call on this mount: it would keep the process from ending.

        What it waits for is a request to this daemon. If giving up a save does not have it answered, the connection
        is aborted.
        """
        with trio.move_on_after(RETURN_DEADLINE):
            if self._guest.migrations.running:
                await self._guest.migrations.cancel()
            await self._page_cache.come_back()
        if not self._page_cache.in_kernel:  # if it is the storage that takes its time, everybody can be let go
            return
        log.warning("%s: the kernel does not let go of the mount: its connection is aborted", self._mountpoint)
        try:
            await trio.to_thread.run_sync(self._abort, abandon_on_cancel=True)
        except OSError as error:
            log.warning("%s: its connection can't be aborted: %s", self._mountpoint, error)

    def _abort(self) -> None:
        connection.abort(self._mountpoint, self._ram_files.device)

    def _start_soon(self, work: Callable[[], Awaitable[None]]) -> None:
        self._nursery.start_soon(work)

    def _on_status(self, status: MigrationStatus) -> None:
        """A migration went on: events (QEMU's capability of that name) and status tell."""
        self._changes.note()
        if self._guest.settings.capabilities.events:
            self._events.publish(MIGRATION, str(status))
            if status is MigrationStatus.ACTIVE:
                self._events.publish(MIGRATION_PASS, 1)  # an epoch is saved in one pass
