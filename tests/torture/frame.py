"""Rounds of torture: seeds, a watchdog, and a count of what was done and of what went wrong.

A torture is a function of a `Round`. It does things to ckptfs until the round's time is over, looks whether all is
right, and counts both. A round has one seed: from it comes everything that the torture itself decides.
"""

import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TypeVar

T = TypeVar("T")

ROUND_LENGTH = 15.0
"""Seconds of a round, besides what its beginning and its last look take."""

FAULTS = ("hangs", "wrong bytes", "tracebacks", "surprises")
"""What must not happen. A surprise is an exception that the torture did not expect."""


class HangError(Exception):
    """Something did not end within its deadline."""


@dataclass
class Round:
    """One round: where it may work, its seed, and its counts."""

    directory: Path
    seed: int
    ends_at: float
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    def goes_on(self) -> bool:
        """Whether there is time left."""
        return time.monotonic() < self.ends_at

    def ends_in(self) -> float:
        """Seconds that are left."""
        return max(0.0, self.ends_at - time.monotonic())

    def count(self, what: str, note: str | None = None) -> None:
        """Count something; ``note`` is printed with the round."""
        self.counts[what] += 1
        if note is not None:
            self.notes.append(f"{what}: {note}")

    def within(self, seconds: float, what: str, work: Callable[[], T]) -> T:
        """Do ``work`` in a thread. HangError, counted, if it does not end in time: the thread is left behind."""
        outcome: list[T] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                outcome.append(work())
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                failure.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            self.count("hangs", f"{what} has not ended for {seconds:g} s")
            raise HangError(what)
        if failure:
            raise failure[0]
        return outcome[0]

    def look_into_log(self, path: Path) -> None:
        """Count tracebacks, and lines of a daemon's log that are errors; after a fault, note its end."""
        lines = path.read_text().splitlines()
        for line in lines:
            if line.startswith("Traceback") or ": ERROR: " in line:
                self.count("tracebacks", line)
        if any(self.counts[fault] for fault in FAULTS):
            self.notes.append("\n".join(["the log ends with:", *lines[-40:]]))


Torture = Callable[[Round], None]


def rounds(
    tortures: Mapping[str, Torture], seconds: float, seed: int, directory: Path
) -> Iterator[tuple[str, Round]]:
    """Run the tortures in turn until the time is over; each round has the next seed. The last one is shorter."""
    ends_at = time.monotonic() + seconds
    number = 0
    while number < len(tortures) or time.monotonic() < ends_at:
        name = list(tortures)[number % len(tortures)]
        length = max(3.0, min(ROUND_LENGTH, ends_at - time.monotonic()))
        with TemporaryDirectory(dir=directory, prefix=f"torture-{name}-", ignore_cleanup_errors=True) as place:
            yield name, run_round(tortures[name], Path(place), seed + number, length)
        number += 1


def run_round(torture: Torture, directory: Path, seed: int, seconds: float) -> Round:
    """Run one round."""
    this = Round(directory, seed, time.monotonic() + seconds)
    this.count("rounds")
    try:
        torture(this)
    except HangError:
        pass  # counted where it was found
    except Exception:  # noqa: BLE001 - whatever it is, the next round is run
        this.count("surprises", traceback.format_exc())
    return this


def table(counts: Mapping[str, Counter[str]]) -> str:
    """What was done, a column for each torture."""
    names = list(counts)
    rows = [row for row in dict.fromkeys(key for name in names for key in counts[name]) if row not in FAULTS]
    width = max(map(len, (*rows, *FAULTS)))
    lines = [" " * width + "".join(f"{name:>14}" for name in names)]
    lines += [f"{row:{width}}" + "".join(f"{counts[name][row]:14,}" for name in names) for row in (*rows, *FAULTS)]
    return "\n".join(lines)
