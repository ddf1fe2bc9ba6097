"""ckptfs status: how a mount stands, for people; with --watch again every second, on a terminal in one place."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from textwrap import wrap
from typing import Self

from ckptfs.api.status import Status, read_status
from ckptfs.cli.progress import describe_progress
from ckptfs.errors import StateError
from ckptfs.migration.size import format_size
from ckptfs.namespace.status import counted

INTERVAL = 1.0
"""Seconds between two looks."""

DAY = 86400
"""Seconds."""

_WIDTH = 76
_LABEL = 10
_STATES = (
    ("zeros", "zero-pages"),
    ("not read", "checkpoint-pages"),
    ("read", "read-pages"),
    ("written", "written-pages"),
)
"""How pages stand: the words for it, and the key."""


def run(arguments: argparse.Namespace) -> int:
    """Show the status of a mount, once or until it is unmounted."""
    write = _as_json if arguments.json else format_status
    status = read_status(arguments.directory)
    if not arguments.watch:
        print(write(arguments.directory, status))
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _screen(arguments) as show:
            _watch(arguments.directory, status, write, show)
    except KeyboardInterrupt:  # as it is meant to end
        pass
    return 0


def _watch(directory: str, status: Status, write: "_Write", show: Callable[[str], None]) -> None:
    """Show it again and again. The status is opened each time: an open file would keep it from being unmounted."""
    pace = None
    while True:
        show(write(directory, status, pace))
        former, seen = status, time.monotonic()
        time.sleep(INTERVAL)
        try:
            status = read_status(directory)
        except StateError as error:
            if isinstance(error.__context__, FileNotFoundError):
                return  # it was unmounted
            raise
        pace = Pace.between(former, status, time.monotonic() - seen)


@dataclass(frozen=True)
class Pace:
    """Bytes a second that were read from the checkpoint, and written by programs and guests."""

    read: float
    written: float

    @classmethod
    def between(cls, former: Status, status: Status, seconds: float) -> Self:
        """From one look to the next."""
        read = _length(former, "checkpoint-pages") - _length(status, "checkpoint-pages")
        written = _length(status, "written-pages") - _length(former, "written-pages")
        return cls(max(read, 0) / seconds, max(written, 0) / seconds)


_Write = Callable[[str, Status, Pace | None], str]


def _as_json(directory: str, status: Status, pace: Pace | None = None) -> str:
    """One line."""
    return json.dumps(status)


def format_status(directory: str, status: Status, pace: Pace | None = None) -> str:
    """Write a status for people, in lines of less than 80 columns."""
    lines = [f"{directory}: {describe_progress(status) or status['state']}"]
    for label, text in _facts(status, pace):
        indent = " " * _LABEL
        lines += wrap(
            f"{label:{_LABEL}}{text}",
            _WIDTH,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    lines[_HEAD:_HEAD] = _pages(status)
    return "\n".join(lines)


_HEAD = 2
"""Lines before those of the pages."""


def _facts(status: Status, pace: Pace | None) -> list[tuple[str, str]]:
    """All that has a line of its own, by its label."""
    facts = [
        ("RAM", _extent_of_ram(status)),
        ("restore", _restore(status)),
        ("now", _now(status, pace)),
        ("base", _base(status)),
        ("machine", _machine(status)),
        ("last save", _last_save(status)),
        ("in use by", status["users"] or "nobody"),
    ]
    return facts + _troubles(status)


def _extent_of_ram(status: Status) -> str:
    size = format_size(sum(block["used-length"] for block in status["blocks"]))
    return f"{size} in {counted(status['block-count'], 'block')}, {counted(status['page-count'], 'page')}"


def _pages(status: Status) -> list[str]:
    """A line with a bar for each state of pages."""
    lines = []
    for label, key in _STATES:
        count, share = status[key], status[key] / max(status["page-count"], 1)
        size = format_size(_length(status, key))
        bar = "#" * round(share * 30)
        lines.append(f"  {label:9} {size:>10} {count:>11} {share:>5.0%}  {bar}".rstrip())
    return lines


def _restore(status: Status) -> str:
    """How far the lazy restore has come."""
    if status["base"] is None:
        return "none: there is no checkpoint yet"
    if status["restored"]:
        words = "all of it is in memory, the file is no longer needed"
    elif not status["checkpoint-pages"]:
        words = "all pages are read"
    else:
        left, done = _length(status, "checkpoint-pages"), _length(status, "read-pages")
        words = f"{format_size(done)} read, {format_size(left)} left in the checkpoint"
    full = status["time-to-full"]
    return words if full is None else f"{words}, after {full / 1000:.1f} s"


def _now(status: Status, pace: Pace | None) -> str:
    """What goes on."""
    waiting = f"{counted(status['waiting-readers'], 'reader')} waiting"
    return waiting if pace is None else f"{_speed(pace.read)} read, {_speed(pace.written)} written, {waiting}"


def _base(status: Status) -> str:
    if status["base"] is None:
        return "none"
    kind = "RAM alone" if status["base-machine"] == "none" else status["base-machine"]
    return f"{status['base']} ({kind}), vmstate {status['vmstate']}"


def _machine(status: Status) -> str:
    if status["qmp"] == "none":
        return "none is bound (qmp=)"
    return f"{status['guest'] or 'unknown'}, QMP {status['qmp']}"


def _last_save(status: Status) -> str:
    if status["last-save"] is None:
        return "none since the mount"
    when = datetime.strptime(status["last-save"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    ago = max(int((datetime.now(UTC) - when).total_seconds()), 0)
    form, pause = "%H:%M:%S" if ago < DAY else "%Y-%m-%d", status["last-save-downtime"]
    words = "" if pause is None else f", guest paused {pause} ms"
    return f"{when.astimezone():{form}} ({_duration(ago)} ago) to {status['last-save-to']}{words}"


def _troubles(status: Status) -> list[tuple[str, str]]:
    """What somebody should look after; nothing if all is well."""
    troubles = []
    migration = status["migration"]
    if migration.get("status") == "failed":
        troubles.append(("failed", migration.get("error-desc") or "the last save or restore"))
    if status["storage"] != "ok":
        troubles.append(("storage", status["storage"]))
    if status["bad-page-count"]:
        troubles.append(
            (
                "bad",
                f"{counted(status['bad-page-count'], 'page')} can't be read from the checkpoint: see DIR/status",
            )
        )
    if status["shared-use"] is not None:
        troubles.append(("warning", status["shared-use"]))
    if (status["lease"] or "held") != "held":
        troubles.append(("error", f"the lease is {status['lease']}"))
    if status["writers"] == "stopped":
        troubles.append(("stopped", "writers of ram/ wait for `cont`"))
    return troubles


def _length(status: Status, key: str) -> int:
    """Bytes of the pages in that state."""
    length: int = sum(block[key] * block["page-size"] for block in status["blocks"])
    return length


def _speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / (1 << 20):.1f} MiB/s"


def _duration(seconds: int) -> str:
    for unit, length in (("days", DAY), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _screen(arguments: argparse.Namespace) -> AbstractContextManager[Callable[[str], None]]:
    """Where each look goes: over the last one on a terminal, below it elsewhere."""
    if arguments.json:
        return nullcontext(lambda text: print(text, flush=True))
    if not sys.stdout.isatty():
        return nullcontext(lambda text: print(text, end="\n\n", flush=True))
    from ckptfs.cli.terminal import Screen

    return Screen()
