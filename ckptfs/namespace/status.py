"""What ``status`` and ``status.json`` say: one typed snapshot, two ways to write it.

``status`` is ``key value``, one a line: always all keys, always in this order, the value being the rest of the
line. After them comes a line ``bad-page`` for each page that could not be read. ``status.json`` has the same
keys, query-migrate's answer under ``migration``, and each block by itself. What the keys are, and what the manual
says of them, is in three tables: `KEYS`, `MIGRATION_KEYS`, `BLOCK_KEYS`.
"""

import json
from collections.abc import Callable
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
    downtime: int | None
    """Milliseconds for which the guest was paused; None without a machine."""


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
    lease: str | None = None
    """``held``, or ``lost: `` and why; None if none was wanted."""
    users: tuple[str, ...] = ()
    """Who has RAM open or mapped: ``qemu-system-x86 (1234, rw)`` each."""
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
    verified: str = "off"
    """Whether checksums are looked at, and of how much there are some."""
    bad_page_count: int = 0
    bad_pages: tuple[BadPage, ...] = ()
    """The first of them."""


@dataclass(frozen=True)
class Key:
    """A line of ``status``: ``unit`` of its value (nothing if it is a word or a text), and what it means."""

    name: str
    unit: str
    meaning: str
    value: Callable[[Status], Any]


@dataclass(frozen=True)
class BlockKey:
    """A member of each of the ``blocks`` in ``status.json``."""

    name: str
    unit: str
    meaning: str
    value: Callable[[Status, BlockStatus], Any]


def _pages(count: str) -> Callable[[Status], int]:
    """Of all blocks together."""
    return lambda status: sum(getattr(block, count) for block in status.blocks)


KEYS = (
    Key("version", "", "The version of ckptfs that serves this mount.", lambda status: status.version),
    Key("pid", "", "The daemon's process.", lambda status: status.pid),
    Key("spec", "", "What was mounted (SPEC), with its whole path.", lambda status: status.spec),
    Key("state", "", "`idle`, `saving` or `restoring`.", lambda status: status.state),
    Key("base", "", "The checkpoint that RAM comes from.", lambda status: status.base),
    Key("base-offset", "bytes", "Where in its file it begins.", lambda status: status.base_offset),
    Key(
        "base-machine",
        "",
        "The machine type in it; `none` if it holds RAM alone.",
        lambda status: status.base_machine,
    ),
    Key(
        "base-run-state",
        "",
        "The state in which a machine starts from it, in QEMU's words.",
        lambda status: status.base_run_state,
    ),
    Key(
        "vmstate",
        "",
        "Whether a machine can start from `vmstate`: `ready`; `none` (there is no device state); `stale`, `in use`,"
        " `used` or `refused`, and why.",
        lambda status: status.vmstate,
    ),
    Key(
        "direct-io",
        "",
        "Whether checkpoints are read and written with O_DIRECT: `on`, or `off` and why.",
        lambda status: status.direct_io,
    ),
    Key(
        "writers",
        "",
        "`running`; `stopped` (by `stop`: they wait for `cont`); `none` in a read-only mount.",
        lambda status: status.writers,
    ),
    Key("qmp", "", "The QMP socket, and whether QEMU answers there.", lambda status: status.qmp),
    Key("guest", "", "The state of the guest behind it, in QEMU's words.", lambda status: status.guest),
    Key(
        "capture",
        "",
        "How the newest save captured a machine with RAM of its own: `snapshot` or `precopy`.",
        lambda status: status.capture,
    ),
    Key(
        "users",
        "",
        "Who has RAM open or mapped: each program with its process and `r` or `rw`.",
        lambda status: ", ".join(status.users) or None,
    ),
    Key(
        "shared-use",
        "",
        "A warning: two machines write to the same RAM. `none` is as it should be.",
        lambda status: status.shared_use,
    ),
    Key(
        "lease",
        "",
        "Of a mount with `exclusive`: `held`, or `lost` and why: it does not save to SPEC then.",
        lambda status: status.lease,
    ),
    Key("block-count", "", "How many RAM blocks there are.", lambda status: len(status.blocks)),
    Key("page-count", "pages", "All pages of all blocks: the sum of the next four.", _pages("page_count")),
    Key("zero-pages", "pages", "Pages of zeros, which take no memory.", _pages("zero_pages")),
    Key("checkpoint-pages", "pages", "In the checkpoint, and not read yet.", _pages("checkpoint_pages")),
    Key("read-pages", "pages", "Read from the checkpoint.", _pages("read_pages")),
    Key("written-pages", "pages", "Written since. Lost at umount, unless saved.", _pages("written_pages")),
    Key(
        "restored",
        "",
        "`yes` when all RAM is in memory, and the checkpoint's file is no longer needed.",
        lambda status: status.restored,
    ),
    Key(
        "overlay-bytes",
        "bytes",
        "Memory that the daemon uses for written pages and, after `restore`, for all others.",
        lambda status: status.overlay_bytes,
    ),
    Key(
        "set-aside-pages",
        "pages",
        "Old versions of pages that were written while a save runs, kept for that save.",
        lambda status: status.set_aside_pages,
    ),
    Key("waiting-readers", "", "Reads that wait for the storage.", lambda status: status.waiting_readers),
    Key(
        "storage",
        "",
        "`ok`, or `silent` and the pages for which the storage does not answer.",
        lambda status: status.storage,
    ),
    Key("views", "", "The files in `views/`.", lambda status: " ".join(status.views) or None),
    Key(
        "views-missing",
        "",
        "Views that can't be made, and why.",
        lambda status: "; ".join(f"{name}: {why}" for name, why in status.missing_views.items()) or None,
    ),
    Key(
        "time-to-first-byte",
        "ms",
        "From the mount until the first page was served.",
        lambda status: status.time_to_first_byte,
    ),
    Key(
        "time-to-full",
        "ms",
        "From the mount until the last page was restored.",
        lambda status: status.time_to_full,
    ),
    Key(
        "verify",
        "",
        "`off`, or `on` and how many windows (of 64 KiB or more) have a checksum (`-o verify=on`).",
        lambda status: status.verified,
    ),
    Key(
        "bad-page-count",
        "pages",
        "Pages that can't be read from the checkpoint. A line `bad-page BLOCK PAGE REASON` follows for each, up to"
        " a limit.",
        lambda status: status.bad_page_count,
    ),
    Key("last-command", "", "The last command on `ctl` that ended.", lambda status: status.last_command),
    Key("last-outcome", "", "Its answer.", lambda status: status.last_outcome),
    Key(
        "last-save",
        "UTC",
        "When the last successful save ended.",
        lambda status: status.last_save and f"{status.last_save.time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
    ),
    Key(
        "last-save-to",
        "",
        "Where it was saved.",
        lambda status: status.last_save and status.last_save.place,
    ),
    Key(
        "last-save-downtime",
        "ms",
        "How long it paused the guest.",
        lambda status: status.last_save and status.last_save.downtime,
    ),
    Key(
        "log",
        "",
        "Where the daemon logs: `syslog`, a file, or `none` and why.",
        lambda status: status.log,
    ),
)
"""What is a single value, in the order in which it is shown."""

MIGRATION_KEYS = (
    Key(
        "status",
        "",
        "How the newest save or restore stands, in QEMU's words: `none`, `setup`, `active`, `device`, `completed`,"
        " `failed`, `cancelling`, `cancelled`.",
        lambda status: status.migration.status,
    ),
    Key("error-desc", "", "Why it failed.", lambda status: status.migration.error_desc),
    Key("total-time", "ms", "How long it has taken.", lambda status: status.migration.total_time),
    Key("setup-time", "ms", "How long it took to begin.", lambda status: status.migration.setup_time),
    Key("downtime", "ms", "How long the guest was paused.", lambda status: status.migration.downtime),
    Key(
        "total",
        "bytes",
        "RAM to save or restore.",
        lambda status: status.migration.ram and status.migration.ram.total,
    ),
    Key(
        "transferred",
        "bytes",
        "Written to, or read from, the checkpoint so far.",
        lambda status: status.migration.ram and status.migration.ram.transferred,
    ),
    Key(
        "remaining",
        "bytes",
        "RAM still to save or restore.",
        lambda status: status.migration.ram and status.migration.ram.remaining,
    ),
    Key(
        "normal",
        "pages",
        "Pages with data so far.",
        lambda status: status.migration.ram and status.migration.ram.normal,
    ),
    Key(
        "duplicate",
        "pages",
        "Pages of zeros so far.",
        lambda status: status.migration.ram and status.migration.ram.duplicate,
    ),
    Key(
        "mbps",
        "Mbit/s",
        "Average speed.",
        lambda status: status.migration.ram and round(status.migration.ram.mbps, 2),
    ),
)
"""The newest save or restore; ``status.json`` has QEMU's query-migrate in their place."""

BLOCK_KEYS = (
    BlockKey("idstr", "", "QEMU's name of the block.", lambda _, block: printable(block.idstr)),
    BlockKey("file", "", "Its file, below DIR.", lambda _, block: f"ram/{encode_name(block.idstr).decode()}"),
    BlockKey("page-size", "bytes", "The size of its pages.", lambda _, block: block.page_size),
    BlockKey("used-length", "bytes", "Its size.", lambda _, block: block.used_length),
    BlockKey(
        "backend",
        "",
        "Whether QEMU has it as a memory backend on this mount. All others travel inside `vmstate`.",
        lambda status, block: block.idstr in status.memory + status.plugged,
    ),
    BlockKey(
        "plugged",
        "",
        "Whether it is memory that was plugged in: a DIMM, or another memory device.",
        lambda status, block: block.idstr in status.plugged,
    ),
    BlockKey("page-count", "pages", "All of its pages.", lambda _, block: block.page_count),
    BlockKey("zero-pages", "pages", "As above, of this block.", lambda _, block: block.zero_pages),
    BlockKey("checkpoint-pages", "pages", "As above, of this block.", lambda _, block: block.checkpoint_pages),
    BlockKey("read-pages", "pages", "As above, of this block.", lambda _, block: block.read_pages),
    BlockKey("written-pages", "pages", "As above, of this block.", lambda _, block: block.written_pages),
)
"""Each block in ``status.json``."""


def format_status(status: Status) -> str:
    """The text of ``status``."""
    lines = [f"{key.name} {_plain(key.value(status))}" for key in (*KEYS, *MIGRATION_KEYS)]
    lines += [f"bad-page {_word(bad.idstr)} {bad.page} {_plain(bad.error)}" for bad in status.bad_pages]
    return "".join(line + "\n" for line in lines)


def format_status_json(status: Status) -> str:
    """The text of ``status.json``: one object."""
    values = {key.name: key.value(status) for key in KEYS}
    document = {
        **{name: printable(value) if isinstance(value, str) else value for name, value in values.items()},
        "base-devices": [printable(device) for device in status.base_devices],
        "migration": status.migration.to_json(),
        "blocks": [{key.name: key.value(status, block) for key in BLOCK_KEYS} for block in status.blocks],
        "bad-pages": [
            {"block": printable(bad.idstr), "page": bad.page, "error": printable(bad.error)}
            for bad in status.bad_pages
        ],
    }
    return json.dumps(document, indent=2) + "\n"


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
