"""How a command goes: a bar on a terminal, a line now and then elsewhere, JSON lines, or nothing."""

import argparse
import json
import sys
from math import ceil
from types import TracebackType
from typing import Protocol, Self

from ckptfs.api.status import Status

MiB = 1 << 20

CANCELLING = "cancelling ..."
"""What a command says to Ctrl-C and SIGTERM."""


class Display(Protocol):
    """Is shown status.json again and again, from `with` to its end."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def show(self, status: Status) -> None:
        """Show how it stands."""

    def say(self, words: str) -> None:
        """Say a line beside that."""


def display_for(arguments: argparse.Namespace) -> Display:
    """What the options ``quiet`` and ``json`` ask for, and what stderr is."""
    if arguments.json:
        return JSONLines()
    if arguments.quiet:
        return Nothing()
    if not sys.stderr.isatty():
        return Lines()
    from ckptfs.cli.terminal import Bar

    return Bar()


def tell(arguments: argparse.Namespace, answer: str) -> None:
    """Print what a command has answered, as ``quiet`` and ``json`` want it."""
    if arguments.json:
        print(json.dumps({"answer": answer}), flush=True)
    elif not arguments.quiet:
        print(answer, flush=True)


def extent(status: Status) -> tuple[int, int] | None:
    """How many bytes of the running save or restore are done, and of how many; None if that is not known yet."""
    ram = status["migration"].get("ram")
    if status["state"] == "idle" or not ram or not ram["total"]:
        return None
    return ram["total"] - ram["remaining"], ram["total"]


def describe_progress(status: Status) -> str | None:
    """How far a save or restore has come, None if none runs.

    As in ``saving (active): 43%, 440 of 1024 MiB, 210 MiB/s, 3 s left``.
    """
    if status["state"] == "idle":
        return None
    words = f"{status['state']} ({status['migration']['status']})"
    done_of = extent(status)
    if done_of is None:
        return words
    done, total = done_of
    words += f": {done * 100 // total}%, {done / MiB:.0f} of {total / MiB:.0f} MiB"
    if not done or not status["migration"]["total-time"]:
        return words
    speed = done / status["migration"]["total-time"] * 1000
    return f"{words}, {speed / MiB:.0f} MiB/s, {ceil((total - done) / speed)} s left"


class Nothing:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, status: Status) -> None:
        """Show nothing."""

    def say(self, words: str) -> None:
        """Say nothing."""


class Lines(Nothing):
    """A line for every tenth that is done."""

    def __init__(self) -> None:
        self._tenths = 0

    def say(self, words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    def show(self, status: Status) -> None:
        """Print a line if one is due."""
        done_of = extent(status)
        if done_of is None:
            return
        done, total = done_of
        tenths = done * 10 // total
        if tenths > self._tenths:
            self._tenths = tenths
            print(f"{status['state']}: {tenths * 10}% of {total / MiB:.0f} MiB", file=sys.stderr, flush=True)


class JSONLines(Nothing):
    """One JSON object a line on stdout: the state, and query-migrate's answer as QEMU has it."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, status: Status) -> None:
        """Print what has changed."""
        line = json.dumps({"state": status["state"], "migration": status["migration"]})
        if line != self._last and status["state"] != "idle":
            self._last = line
            print(line, flush=True)


class Prefetching:
    """Has a display show a prefetch, which is no migration: what the checkpoint still has of a block, or of all."""

    def __init__(self, display: Display, name: str | None) -> None:
        self._display = display
        self._name = name
        self._total: int | None = None

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, traceback)

    def say(self, words: str) -> None:
        """Say it there."""
        self._display.say(words)

    def show(self, status: Status) -> None:
        """Show it as a migration."""
        blocks = [block for block in status["blocks"] if block["file"] == f"ram/{self._name}" or self._name is None]
        remaining = sum(block["checkpoint-pages"] * block["page-size"] for block in blocks)
        if self._total is None:
            self._total = remaining
        ram = {"total": self._total, "remaining": remaining}
        self._display.show({**status, "state": "prefetching", "migration": {"status": "active", "ram": ram}})
