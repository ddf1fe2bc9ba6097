"""What ``status`` and ``status.json`` say: one typed snapshot, two ways to write it.

``status`` is ``key value``, one a line: always all keys, always in this order, the value being the rest of the
line. After them comes a line ``bad-page`` for each page that could not be read. ``status.json`` has the same
keys, query-migrate's answer under ``migration``, and each block by itself.
"""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from ckptfs.migration.query import QueryMigrate
from ckptfs.namespace.names import encode_name


class MountState(StrEnum):
    """What the mount is doing."""

    IDLE = "idle"
    SAVING = "saving"
    RESTORING = "restoring"


@dataclass(frozen=True)
class BlockStatus:
    """A RAM block and how its pages stand: the four counts are those of pages/NAME, and add up."""

    idstr: str
    page_size: int
    page_count: int
    zero_pages: int
    checkpoint_pages: int
    """In the checkpoint and not yet read."""
    read_pages: int
    written_pages: int

    @property
    def used_length(self) -> int:
        """Bytes."""
        return self.page_count * self.page_size


@dataclass(frozen=True)
class BadPage:
    """A page that is in the checkpoint and can't be read, and the reason."""

    idstr: str
    page: int
    error: str


@dataclass(frozen=True)
class LastSave:
    """When the newest save ended that succeeded, and where it is."""

    time: datetime
    place: str


@dataclass(frozen=True)
class Status:
    """One moment of the mount; None stands for what there is not."""

    version: str
    pid: int
    """The daemon's process."""
    spec: str
    """The backing storage, as mounted."""
    state: MountState
    direct_io: str
    """``on`` or ``off``, and why: ``off (no O_DIRECT on this file system)``."""
    base: str | None
    """The checkpoint that RAM comes from."""
    vmstate: str
    """Whether that holds device state that a machine can be started from: ``none``, ``ready``, or why not."""
    restored: bool
    """Whether all RAM is in memory and the file is not needed any more."""
    writers: str
    """``running``, ``stopped`` by the command stop, or ``none`` in a read-only mount."""
    qmp: str
    """The QMP socket and how it stands: ``connected /run/vm1.qmp``; ``none``."""
    guest: str | None
    """Run state of the guest behind it, in QEMU's words."""
    capture: str | None
    """How the newest save got the RAM of a machine that has its own: ``snapshot``, ``precopy``."""
    overlay_bytes: int
    """Memory that written (and fully restored) pages take."""
    set_aside_pages: int
    """Pages kept in their former state for the running save."""
    waiting_readers: int
    storage: str
    """``ok``, or which pages of the base the storage gives no answer for."""
    shared_use: str | None
    """What two machines on this RAM do to one another."""
    time_to_first_byte: int | None
    """Milliseconds from the mount to the first page that was served."""
    time_to_full: int | None
    """Milliseconds from the mount to the last page that was restored."""
    last_command: str | None
    last_outcome: str | None
    last_save: LastSave | None = None
    log: str = "none"
    """Where the daemon logs, and what is missing there; ``none: `` and why."""
    base_offset: int | None = None
    """Where in its file ``base`` begins."""
    base_machine: str | None = None
    """The machine type it was saved from; ``none`` if it was no machine."""
    base_run_state: str | None = None
    """In which state a machine is that is started from it: ``running``, ``paused``."""
    base_devices: tuple[str, ...] = ()
    """The device sections in it."""
    memory: tuple[str, ...] = ()
    """The blocks (idstrs) that are a machine's memory: it has them as memory backends on this mount."""
    plugged: tuple[str, ...] = ()
    """Others that may be memory backends, of memory devices."""
    views: tuple[str, ...] = ()
    """The names in views/."""
    missing_views: dict[str, str] = field(default_factory=dict)
    """Why others can't be made, by name."""
    migration: QueryMigrate = field(default_factory=QueryMigrate)
    """The newest save or restore."""
    blocks: tuple[BlockStatus, ...] = ()
    bad_page_count: int = 0
    bad_pages: tuple[BadPage, ...] = ()
    """The first of them."""


def format_status(status: Status) -> str:
    """The text of ``status``."""
    values = {**_values(status), **_migration_values(status.migration)}
    lines = [f"{key} {_plain(value)}" for key, value in values.items()]
    lines += [f"bad-page {_word(bad.idstr)} {bad.page} {_plain(bad.error)}" for bad in status.bad_pages]
    return "".join(line + "\n" for line in lines)


def format_status_json(status: Status) -> str:
    """The text of ``status.json``: one object."""
    blocks = [
        {
            "idstr": printable(block.idstr),
            "file": f"ram/{encode_name(block.idstr).decode()}",
            "page-size": block.page_size,
            "used-length": block.used_length,
            "backend": block.idstr in status.memory + status.plugged,
            "plugged": block.idstr in status.plugged,
            **_page_counts((block,)),
        }
        for block in status.blocks
    ]
    bad_pages = [
        {"block": printable(bad.idstr), "page": bad.page, "error": printable(bad.error)} for bad in status.bad_pages
    ]
    values = {key: printable(value) if isinstance(value, str) else value for key, value in _values(status).items()}
    document = {
        **values,
        "base-devices": [printable(device) for device in status.base_devices],
        "migration": status.migration.to_json(),
        "blocks": blocks,
        "bad-pages": bad_pages,
    }
    return json.dumps(document, indent=2) + "\n"


def _values(status: Status) -> dict[str, Any]:
    """All that is a single value, in the order in which it is shown."""
    return {
        "version": status.version,
        "pid": status.pid,
        "spec": status.spec,
        "state": status.state,
        "base": status.base,
        "base-offset": status.base_offset,
        "base-machine": status.base_machine,
        "base-run-state": status.base_run_state,
        "vmstate": status.vmstate,
        "direct-io": status.direct_io,
        "writers": status.writers,
        "qmp": status.qmp,
        "guest": status.guest,
        "capture": status.capture,
        "shared-use": status.shared_use,
        "block-count": len(status.blocks),
        **_page_counts(status.blocks),
        "restored": status.restored,
        "overlay-bytes": status.overlay_bytes,
        "set-aside-pages": status.set_aside_pages,
        "waiting-readers": status.waiting_readers,
        "storage": status.storage,
        "views": " ".join(status.views) or None,
        "views-missing": "; ".join(f"{name}: {why}" for name, why in status.missing_views.items()) or None,
        "time-to-first-byte": status.time_to_first_byte,
        "time-to-full": status.time_to_full,
        "bad-page-count": status.bad_page_count,
        "last-command": status.last_command,
        "last-outcome": status.last_outcome,
        "last-save": status.last_save and f"{status.last_save.time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "last-save-to": status.last_save and status.last_save.place,
        "log": status.log,
    }


def _page_counts(blocks: tuple[BlockStatus, ...]) -> dict[str, int]:
    return {
        "page-count": sum(block.page_count for block in blocks),
        "zero-pages": sum(block.zero_pages for block in blocks),
        "checkpoint-pages": sum(block.checkpoint_pages for block in blocks),
        "read-pages": sum(block.read_pages for block in blocks),
        "written-pages": sum(block.written_pages for block in blocks),
    }


def _migration_values(migration: QueryMigrate) -> dict[str, Any]:
    ram = migration.ram
    return {
        "status": migration.status,
        "error-desc": migration.error_desc,
        "total-time": migration.total_time,
        "setup-time": migration.setup_time,
        "downtime": migration.downtime,
        "total": ram and ram.total,
        "transferred": ram and ram.transferred,
        "remaining": ram and ram.remaining,
        "normal": ram and ram.normal,
        "duplicate": ram and ram.duplicate,
        "mbps": ram and round(ram.mbps, 2),
    }


def _plain(value: object) -> str:
    """A value as the rest of a line, whatever characters a file or a user put into it."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case _:
            return printable(str(value))


def printable(text: str) -> str:
    """Return ``text`` with all that would break a line, a terminal or an encoding written as ``\\x0a``."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def counted(count: int, noun: str) -> str:
    """Return ``1 page``, ``2 pages``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _word(idstr: str) -> str:
    """A block's file name as one word."""
    return encode_name(idstr).decode().replace(" ", "%20")
