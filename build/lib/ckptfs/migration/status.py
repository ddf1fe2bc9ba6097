"""The states of a migration, and which may follow which (MigrationStatus of qapi/migration.json, 10.2).

A save of ours walks none, setup, active, device, completed; a restore none, setup, active, completed. Anything
that runs may turn to failed, or through cancelling to cancelled. The others are QEMU's for postcopy, COLO and
network migration: they are read from a QEMU, never entered here.
"""

from enum import StrEnum

from ckptfs.errors import StateError


class MigrationStatus(StrEnum):
    """QEMU's names."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"


_S = MigrationStatus

RUNNING = frozenset({_S.SETUP, _S.ACTIVE, _S.DEVICE, _S.CANCELLING})
"""The states in which nothing else may start."""

TRANSITIONS: dict[MigrationStatus, frozenset[MigrationStatus]] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, _S.CANCELLING, _S.FAILED}),
    _S.ACTIVE: frozenset({_S.DEVICE, _S.COMPLETED, _S.CANCELLING, _S.FAILED}),
    _S.DEVICE: frozenset({_S.COMPLETED, _S.CANCELLING, _S.FAILED}),
    _S.CANCELLING: frozenset({_S.CANCELLED, _S.COMPLETED, _S.FAILED}),
    _S.CANCELLED: frozenset({_S.SETUP}),
    _S.COMPLETED: frozenset({_S.SETUP}),
    _S.FAILED: frozenset({_S.SETUP}),
}
"""What may follow each state. Cancelling may end completed: the file was published before it was noticed."""


def next_status(old: MigrationStatus, new: MigrationStatus) -> MigrationStatus:
    """Return ``new`` if it may follow ``old``; raises StateError, a fault of ours, otherwise."""
    if new not in TRANSITIONS.get(old, ()):
        raise StateError(f"migration status cannot go from '{old}' to '{new}'")
    return new
