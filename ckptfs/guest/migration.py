"""The record of one migration: what it is, how it stands, how it went."""

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from ckptfs.guest.outgoing import Progress
from ckptfs.migration.status import RUNNING, MigrationStatus, next_status


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
        text = f"{progress.normal_pages} pages, {progress.zero_pages} zero, in {self.total_time():.3f} s"
        return text if self.downtime is None else f"{text}, guest paused {self.downtime * 1000:.1f} ms"
