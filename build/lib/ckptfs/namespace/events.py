"""The events that `events` tells: QEMU's names and members (qapi/migration.json, 10.0)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """An event; ``member`` is the one in its ``data``."""

    name: str
    member: str
    meaning: str


MIGRATION = Event(
    "MIGRATION", "status", "A save or a restore goes from one state to the next; `status` has QEMU's name for it."
)
MIGRATION_PASS = Event("MIGRATION_PASS", "pass", "Pages begin to move. There is one pass, number 1.")

EVENTS = (MIGRATION, MIGRATION_PASS)
