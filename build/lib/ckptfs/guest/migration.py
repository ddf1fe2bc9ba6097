"""Migrations, one at a time: what each is, how it stands, how it went, and how it is given up."""

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from ckptfs.channels.nursery import leading_error
from ckptfs.errors import StateError, StorageError
from ckptfs.guest.outgoing import Progress
from ckptfs.migration.status import RUNNING, MigrationStatus, next_status
from ckptfs.namespace.status import counted


@dataclass
class Migration:
    """One migration (``kind`` "save" or "restore") to or from ``uri``; times are trio's clock, in seconds."""

    kind: str
    uri: str
    on_status: Callable[[MigrationStatus], None] = lambda status: None
    """Called at every step."""
    multifd: bool = False
    """Whether pages go through multifd channels."""
    status: MigrationStatus = MigrationStatus.NONE
    progress: Progress = field(default_factory=Progress)
    error: str | None = None
    cancel_scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: trio.Event = field(default_factory=trio.Event)
    started: float = 0.0
    active: float | None = None
    ended: float | None = None
    downtime: float | None = None
    way: str | None = None
    """How a machine's RAM was captured, if not on the mount: ``snapshot``, ``precopy``."""
    remark: str | None = None
    """What whoever waits for it should know besides."""

    @property
    def running(self) -> bool:
        """Whether it has begun and not ended."""
        return self.status in RUNNING

    def advance(self, status: MigrationStatus) -> None:
        """Go on to ``status``; the transition table decides whether that is a step."""
        self.status = next_status(self.status, status)
        now = trio.current_time()
        if status is MigrationStatus.SETUP:
            self.started = now
        elif status is MigrationStatus.ACTIVE:
            self.active = now
        elif not self.running:
            self.ended = now
            self.over.set()
        self.on_status(status)

    def fail(self, error: str) -> None:
        """End with an error."""
        self.error = error
        self.advance(MigrationStatus.FAILED)

    def total_time(self) -> float:
        """Seconds from the beginning to the end, or to now."""
        return (trio.current_time() if self.ended is None else self.ended) - self.started

    def summary(self) -> str:
        """One line for the user who waited for it."""
        progress = self.progress
        pages = counted(progress.normal_pages, "page")
        text = f"{pages}, {progress.zero_pages} zero, in {self.total_time():.3f} s"
        if self.downtime is not None:
            text += f", guest paused {self.downtime * 1000:.1f} ms"
        if self.way is not None:
            text += f", captured by {self.way}"
        return text if self.remark is None else f"{text}; {self.remark}"


class Migrations:
    """The migrations of a guest: there is one at a time, and a second is refused."""

    def __init__(self) -> None:
        self._newest = Migration("migration", "")
        self._on_status: Callable[[MigrationStatus], None] = lambda status: None

    @property
    def newest(self) -> Migration:
        """The one that runs, or has run last; one without a status before the first."""
        return self._newest

    @property
    def running(self) -> bool:
        """Whether one runs."""
        return self._newest.running

    def watch(self, on_status: Callable[[MigrationStatus], None]) -> None:
        """Have ``on_status`` called at every step of those to come."""
        self._on_status = on_status

    def refuse_running(self) -> None:
        """Raise StateError (EBUSY) while one runs."""
        if self.running:
            raise StateError(f"a {self._newest.kind} is running: wait for it, or cancel it")

    @asynccontextmanager
    async def run(self, kind: str, uri: str, *, multifd: bool = False) -> AsyncIterator[Migration]:
        """Run a migration: its states, its cancellation, and one error out of many tasks."""
        self.refuse_running()
        self._newest = migration = Migration(kind, uri, self._on_status, multifd)
        migration.advance(MigrationStatus.SETUP)
        try:
            with migration.cancel_scope:
                yield migration
        except BaseException as error:
            leading = leading_error(error)
            if isinstance(leading, OSError):  # whatever name it has is one of ours on the way there
                leading = StorageError(f"{migration.uri}: {leading.strerror}", leading.errno)
            migration.fail(str(leading))
            if leading is error:
                raise
            raise leading from error
        if migration.cancel_scope.cancelled_caught:
            migration.advance(MigrationStatus.CANCELLED)
            raise StateError(f"the {migration.kind} was cancelled", errno.ECANCELED)
        migration.advance(MigrationStatus.COMPLETED)

    async def cancel(self) -> str:
        """Cancel the running migration and wait for its end; StateError (EINVAL) if there is none."""
        migration = self._newest
        if not migration.running:
            raise StateError("nothing is running, so there is nothing to cancel", errno.EINVAL)
        if migration.status is not MigrationStatus.CANCELLING:
            migration.advance(MigrationStatus.CANCELLING)
            migration.cancel_scope.cancel()
        await migration.over.wait()
        return f"{migration.kind} {migration.status}"
