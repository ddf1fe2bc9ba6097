"""What the words on ctl do: one command in, one line out.

The grammar is `namespace.ctl`; here every typed command has its method, found in one table.
"""

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import trio

from ckptfs.channels.descriptors import describe_address
from ckptfs.channels.identity import Identity
from ckptfs.channels.lane import Lane
from ckptfs.channels.lease.keeping import Lease
from ckptfs.channels.version import NOTHING, KnownFile
from ckptfs.channels.working_set import SUFFIX
from ckptfs.errors import CkptfsError, CommandError, StateError
from ckptfs.fuse.events import Changes
from ckptfs.fuse.logs import Log
from ckptfs.fuse.outcome import Outcome, describe, errno_of
from ckptfs.fuse.page_cache import KernelPageCache
from ckptfs.fuse.ram_files import Opener, RAMFiles
from ckptfs.fuse.report import Origin, describe_mount, milliseconds, query_migrate
from ckptfs.fuse.sharing import Sharing
from ckptfs.fuse.view_files import ViewFiles
from ckptfs.guest.base import Base
from ckptfs.guest.guest import Guest
from ckptfs.guest.machine import Machine
from ckptfs.guest.opening import open_checkpoint
from ckptfs.guest.saving import SaveRequest, save
from ckptfs.migration.address import FileMigrationArgs, ObjectAddress, QMPSocket, SeekableAddress
from ckptfs.migration.capabilities import CAPABILITIES, format_state, parse_state
from ckptfs.migration.parameters import ParameterValue, find_parameter
from ckptfs.namespace import ctl
from ckptfs.namespace.names import decode_name
from ckptfs.namespace.status import LastSave, Status, printable

log = logging.getLogger(__name__)

LOOKING_DEADLINE = 10.0
"""Seconds for a look at who shares RAM once it is saved, also while the mount ends."""


class Control:
    """Runs commands on a mount: ``start_soon`` those that need not be waited for.

    ``spec`` is the file that the mount is of, to which `save` goes if nothing else is said.
    """

    def __init__(
        self,
        guest: Guest,
        spec: SeekableAddress | None,
        origin: Origin,
        ram_files: RAMFiles,
        page_cache: KernelPageCache,
        changes: Changes,
        sharing: Sharing,
        lease: Lease,
        views: ViewFiles | None,
        journal: Log,
        start_soon: Callable[[Callable[[], Awaitable[None]]], None],
    ) -> None:
        self._guest = guest
        self._log = journal
        self._last_save: LastSave | None = None
        self._spec = spec
        self._known = KnownFile(NOTHING if guest.base is None else guest.base.version)  # under the name in spec
        self._origin = origin
        self._ram_files = ram_files
        self._page_cache = page_cache
        self._changes = changes
        self._sharing = sharing
        self._lease = lease
        self._views = views
        self.start_soon = start_soon
        self._prefetches: set[trio.CancelScope] = set()
        self.last = Outcome(b"")
        self.last_command: str | None = None

    async def execute(self, text: bytes, opener: Opener, identity: Identity) -> Outcome:
        """Run the command in ``text`` for ``opener``, who is ``identity``; raises nothing but trio.Cancelled."""
        try:
            outcome = await self._outcome(text, identity)
        except trio.Cancelled:
            _log_command(text, opener, "the mount ended before it did")
            raise
        _log_command(text, opener, outcome.line.decode(errors="replace"))
        self.last = outcome
        self._changes.note()
        self.last_command = text[:200].decode(errors="replace").strip()
        return outcome

    async def _outcome(self, text: bytes, identity: Identity) -> Outcome:
        try:
            command = ctl.parse_command(text)
            answer = await _METHODS[type(command)](self, command, identity)
            if not isinstance(command, ctl.Info | ctl.Help):
                answer = printable(answer)  # one line, whatever the name of a file
            return Outcome(answer.encode() + b"\n")
        except (CkptfsError, OSError) as error:
            return Outcome(f"error: {describe(error)}\n".encode(), errno_of(error))
        except Exception:
            log.exception("ctl: %r", text[:200])
            return Outcome(b"error: internal error, see the log\n", errno.EIO)

    # ---- commands ----------------------------------------------------------------------------------

    async def _save(self, command: ctl.Save, identity: Identity) -> str:
        request = self._save_request(command, identity)
        if not command.nowait:
            return f"ok {await self._saved(request)}"
        self._guest.migrations.refuse_running()
        begun = trio.Event()
        self._go_on("save", lambda: self._saved(request), begun)
        await begun.wait()  # so that whoever looks at status from now on sees it
        return f"ok saving to {describe_address(request.address)} in the background: follow it in status"

    async def _saved(self, request: SaveRequest) -> str:
        answer = await save(self._guest, request)
        self._last_save = LastSave(
            datetime.now(UTC),
            describe_address(request.address),
            milliseconds(self._guest.migrations.newest.downtime),
        )
        self.look_at_views()
        problem = self._sharing.problem
        with trio.move_on_after(
            LOOKING_DEADLINE, shield=True
        ):  # else nobody would hear of a save that the mount ends with
            problem = await self._sharing.look()
        return answer if problem is None else f"{answer}; but {problem}"

    def _save_request(self, command: ctl.Save, identity: Identity) -> SaveRequest:
        target = command.target or self._spec
        if target is None:
            raise CommandError("there is no file behind this mount (none): say where to save, as in `save /PATH`")
        address = _absolute(target, identity)
        if not _same_path(address, self._spec):
            return SaveRequest(address, identity, command.ram_only, None, command.force, command.libvirt)
        permit = self._lease.refuse_lost
        permit()
        return SaveRequest(address, identity, command.ram_only, self._known, command.force, command.libvirt, permit)

    def _go_on(self, what: str, work: Callable[[], Awaitable[str]], begun: trio.Event | None = None) -> None:
        """Run something that nobody waits for; its outcome is in status and in the log, whatever becomes of it."""

        async def run() -> None:
            if begun is not None:
                begun.set()  # who waits for it comes after what follows here, up to the first await in it
            try:
                log.info("%s", await work())
            except (CkptfsError, OSError) as error:
                cancelled = errno_of(error) == errno.ECANCELED
                log.log(logging.INFO if cancelled else logging.ERROR, "in the background: %s", describe(error))
            except trio.Cancelled:
                log.info("in the background: the mount ended before the %s did", what)
                raise
            except Exception:
                log.exception("in the background")

        self.start_soon(run)

    async def _migrate_incoming(self, command: ctl.MigrateIncoming, identity: Identity) -> str:
        source = _absolute(command.source, identity)
        guest, settings = self._guest, self._guest.settings
        guest.refuse_filled()
        opening = partial(
            open_checkpoint,
            source,
            identity,
            settings.descriptors,
            settings.base_options(),
            settings.store,
            guest.page_cache.device,
        )
        guest.fill(await Lane().ask(opening, undo=Base.close))
        self.look_at_views()
        return f"ok incoming from {describe_address(source)}"

    def look_at_views(self) -> None:
        """Begin to find out what can be shown of the checkpoint, so that status tells of this one."""
        if self._views is not None:
            self.start_soon(partial(self._look_at, self._views))

    async def _look_at(self, views: ViewFiles) -> None:
        await views.refresh()
        self._changes.note()

    async def _cancel(self, command: ctl.Cancel, identity: Identity) -> str:
        if self._prefetches and not self._guest.migrations.running:
            for scope in self._prefetches:
                scope.cancel()
            return "ok prefetch cancelled"
        return f"ok {await self._guest.migrations.cancel()}"

    async def _migrate_continue(self, command: ctl.MigrateContinue, identity: Identity) -> str:
        raise StateError(
            f"Migration not in expected state: {self._guest.migrations.newest.status}: "
            "there is no switchover before which a save pauses",
            errno.EINVAL,
        )

    async def _restore(self, command: ctl.Restore, identity: Identity) -> str:
        return f"ok {await self._guest.restore()}"

    async def _record(self, command: ctl.Record, identity: Identity) -> str:
        base = self._guest.base
        if base is None:
            raise StateError("this mount has no checkpoint, and the list is kept beside one", errno.EINVAL)
        pages = {idstr: block.received.copy() for idstr, block in self._guest.blocks.items() if block.stack.base}
        length = await Lane().ask(partial(base.record, pages, identity), deadline=base.deadline)
        return f"ok {length >> 20} MiB are read first with prefetch=recorded: {base.path}{SUFFIX}"

    async def _lock_steal(self, command: ctl.LockSteal, identity: Identity) -> str:
        answer = await self._lease.steal(identity, self._page_cache.device)
        self.start_soon(self._lease.keep)
        return f"ok {answer}"

    def start_warming(self) -> None:
        """Begin to warm what was recorded of the checkpoint (mount option prefetch=recorded)."""
        self._go_on("prefetch", self._warm_recorded)

    async def _warm_recorded(self) -> str:
        base, warmed = self._guest.base, 0
        assert base is not None
        for idstr, run in await Lane().ask(base.read_working_set, deadline=base.deadline):
            start, stop = (page * self._guest.page_size for page in run)
            channel_count = self._guest.settings.parameters.multifd_channels
            warmed += await self._page_cache.warm([idstr], start, stop - start, channel_count)
        return f"{warmed} bytes that were recorded are in the page cache"

    def start_restore(self) -> None:
        """Begin to restore in the background (mount option prefetch=on)."""
        self._go_on("restore", self._guest.restore)

    async def _prefetch(self, command: ctl.Prefetch, identity: Identity) -> str:
        guest = self._guest
        idstrs = list(guest.blocks) if command.name is None else [decode_name(os.fsencode(command.name))]
        for idstr in idstrs:
            block = guest.blocks.get(idstr)
            if block is None:
                raise CommandError(f"there is no ram/{command.name}: `ls ram` lists what there is", errno.ENOENT)
            if command.start > block.used_length:
                size = block.used_length
                raise CommandError(
                    f"START {command.start} is beyond the end of ram/{command.name}: it has {size} bytes"
                )
        with trio.CancelScope() as scope:
            self._prefetches.add(scope)
            try:
                length = await self._page_cache.warm(
                    idstrs, command.start, command.length, guest.settings.parameters.multifd_channels
                )
            finally:
                self._prefetches.remove(scope)
        if scope.cancelled_caught:
            raise StateError("the prefetch was cancelled", errno.ECANCELED)
        return f"ok {length} bytes are in the page cache"

    async def _reset(self, command: ctl.Reset, identity: Identity) -> str:
        if await self._ram_files.are_written():
            raise StateError("a program has a file in ram/ open for writing: stop it first")
        return f"ok {await self._guest.reset()}"

    async def _set_capability(self, command: ctl.SetCapability, identity: Identity) -> str:
        self._change_capability(command.name, command.state)
        return f"ok {command.name} {format_state(command.state)}{_remark(CAPABILITIES[command.name].no_effect)}"

    async def _set_parameter(self, command: ctl.SetParameter, identity: Identity) -> str:
        self._change_parameter(command.name, command.value)
        value = self._guest.settings.parameters.get(command.name)
        return f"ok {command.name} {value}{_remark(find_parameter(command.name).no_effect)}"

    async def _info(self, command: ctl.Info, identity: Identity) -> str:
        match command.topic:
            case ctl.InfoTopic.MIGRATE:
                return query_migrate(self._guest.migrations.newest, self._guest.page_size).info().rstrip("\n")
            case ctl.InfoTopic.MIGRATE_PARAMETERS:
                return self._guest.settings.parameters.info().rstrip("\n")
            case ctl.InfoTopic.MIGRATE_CAPABILITIES:
                return self._guest.settings.capabilities.info().rstrip("\n")

    async def _stop(self, command: ctl.Stop, identity: Identity) -> str:
        if await self._machine_does("stop"):
            return "ok the guest is stopped"
        if self._guest.read_only:
            return "ok the mount is read-only (ro): nobody can write"
        await self._guest.hold_writers()
        return "ok writers of ram/ wait until `cont`"

    async def _cont(self, command: ctl.Cont, identity: Identity) -> str:
        if await self._machine_does("cont"):
            return "ok the guest goes on"
        self._guest.let_writers_go()
        return "ok writers of ram/ go on"

    async def _machine_does(self, what: str) -> bool:
        machine = self._guest.machines.bound
        if machine is None:
            return False
        async with machine.monitor() as monitor:
            await monitor.execute(what)
        return True

    async def _qmp(self, command: ctl.Qmp, identity: Identity) -> str:
        self._guest.migrations.refuse_running()
        address = command.address
        if address is None:
            self._guest.machines.bind(None)
            return "ok no QEMU is bound"
        if isinstance(address, QMPSocket):
            address = QMPSocket(describe_address(_absolute(FileMigrationArgs(address.path), identity)))
        self._guest.machines.bind(Machine(self._guest.settings.located(address), identity))
        return f"ok bound to {address}"

    async def _loglevel(self, command: ctl.LogLevel, identity: Identity) -> str:
        logging.getLogger("ckptfs").setLevel(command.level.upper())
        return f"ok logging from {command.level} on"

    async def _help(self, command: ctl.Help, identity: Identity) -> str:
        return ctl.help_text(command.word).rstrip("\n")

    # ---- settings: the files in parameters/ and capabilities/ --------------------------------------

    def set_parameter(self, name: str, data: bytes, opener: Opener) -> None:
        """Set a parameter from what was written to its file: bytes, not MiB."""
        with self._words_kept(f"parameters/{name}", data, opener):
            self._change_parameter(name, find_parameter(name).parse(_one_line(data)))

    def set_capability(self, name: str, data: bytes, opener: Opener) -> None:
        """Switch a capability from what was written to its file."""
        with self._words_kept(f"capabilities/{name}", data, opener):
            self._change_capability(name, parse_state(_one_line(data)))

    @contextmanager
    def _words_kept(self, file: str, data: bytes, opener: Opener) -> Iterator[None]:
        """A file of a setting has only an errno to tell: the words behind it are read from ctl."""
        try:
            yield
            _log_command(data, opener, "ok", file)
        except CkptfsError as error:
            _log_command(data, opener, f"error: {error}", file)
            self.last = Outcome(f"error: {error}\n".encode(errors="surrogateescape"), errno_of(error))
            raise

    def parameter_text(self, name: str) -> bytes:
        """What the file of a parameter holds."""
        return f"{self._guest.settings.parameters.get(name)}\n".encode()

    def capability_text(self, name: str) -> bytes:
        """What the file of a capability holds."""
        return f"{format_state(self._guest.settings.capabilities.get(name))}\n".encode()

    def _change_parameter(self, name: str, value: ParameterValue) -> None:
        self._guest.settings.set_parameter(name, value, running=self._guest.migrations.running)
        self._changes.note()

    def _change_capability(self, name: str, state: bool) -> None:
        self._guest.settings.set_capability(name, state, running=self._guest.migrations.running)
        self._changes.note()

    # ---- status ------------------------------------------------------------------------------------

    def status(self) -> Status:
        """A snapshot of the mount."""
        outcome = self.last.line.decode(errors="replace").strip() or None
        status = describe_mount(self._guest, self._origin, self.last_command, outcome, self._sharing.problem)
        users = self._ram_files.users
        status = replace(
            status, last_save=self._last_save, log=self._log.state, users=users, lease=self._lease.state
        )
        if self._views is None:
            return status
        return replace(status, views=tuple(self._views.names), missing_views=self._views.missing)


def _log_command(text: bytes, opener: Opener, outcome: str, file: str = "ctl") -> None:
    """Keep who wrote what, and what came of it: the first line, as an answer may have many."""
    command = printable(text[:200].decode(errors="replace").strip())
    first, _, more = outcome.strip().partition("\n")
    log.info("%s: %s (uid %d, pid %d): %s", file, command, opener.uid, opener.pid, first + (" ..." if more else ""))


def _remark(no_effect: str) -> str:
    """Say of a setting that it does nothing, and why."""
    return f" (without effect: {no_effect})" if no_effect else ""


def _absolute(address: SeekableAddress, identity: Identity) -> SeekableAddress:
    """The address with its path made absolute: a relative one is meant from where the writer of ctl stands."""
    if not isinstance(address, FileMigrationArgs) or os.path.isabs(address.filename):
        return address
    if identity.working_directory is None:
        raise CommandError(f"{address.filename}: give the whole path, beginning with /", errno.ENOENT)
    return FileMigrationArgs(os.path.join(identity.working_directory, address.filename), address.offset)


def _same_path(address: SeekableAddress, spec: SeekableAddress | None) -> bool:
    """Whether both name the same file, by their text: nothing is looked up, as it may lie on our own mount."""
    return _path_of(address) is not None and _path_of(address) == _path_of(spec)


def _path_of(address: SeekableAddress | None) -> str | None:
    """The path of a file that has one."""
    if isinstance(address, FileMigrationArgs) and address.fdset_id is None:
        return os.path.normpath(address.filename)
    return address.url if isinstance(address, ObjectAddress) else None


def _one_line(data: bytes) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError:
        raise CommandError("a value has to be UTF-8 text") from None


_METHODS: dict[type, Callable[[Control, Any, Identity], Awaitable[str]]] = {
    ctl.Save: Control._save,
    ctl.MigrateIncoming: Control._migrate_incoming,
    ctl.Cancel: Control._cancel,
    ctl.MigrateContinue: Control._migrate_continue,
    ctl.Restore: Control._restore,
    ctl.Prefetch: Control._prefetch,
    ctl.Record: Control._record,
    ctl.LockSteal: Control._lock_steal,
    ctl.Reset: Control._reset,
    ctl.SetCapability: Control._set_capability,
    ctl.SetParameter: Control._set_parameter,
    ctl.Info: Control._info,
    ctl.Stop: Control._stop,
    ctl.Cont: Control._cont,
    ctl.Qmp: Control._qmp,
    ctl.LogLevel: Control._loglevel,
    ctl.Help: Control._help,
}
