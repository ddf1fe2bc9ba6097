"""Many programs on the same RAM while it is saved, cancelled, stopped, reset: many `program.py`, and a judge."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random

from tests.doubles.checkpoints import verified
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.decode import decode
from tests.mount.harness import Mounted, unmount_by_force
from tests.torture.frame import Round
from tests.torture.program import (
    NUMBER_OF_PROGRAMS,
    PAGE,
    SLOT,
    SLOTS_LENGTH,
    Part,
    Step,
    slot_of,
    steps,
)

PAGE_COUNT = 1200
LENGTH = PAGE_COUNT * PAGE
HANG = 45.0
"""Seconds in which every command ends: one that finds RAM never at rest gives up after 20."""


class Replay:
    """A program's part as it was after any of its steps, each no earlier than the one asked for before."""

    def __init__(self, part: Part, content: bytes) -> None:
        self._part = part
        self._content = content
        self._begin()

    def _begin(self) -> None:
        self._model = bytearray(self._content[self._part.start : self._part.stop])
        self._steps = steps(self._part)
        self._next = next(self._steps)
        self._number = 0

    def differs(self, content: bytes) -> str | None:
        """Say what is wrong with this part of RAM at one moment: the next step may have been done in part."""
        last = SLOT.unpack_from(content, self._part.slot)[0]
        if last < self._number:
            self._begin()
        while self._number < last:
            self._next.apply(self._model, self._part)
            self._next = next(self._steps)
            self._number += 1
        found = content[self._part.start : self._part.stop]
        if found == self._model:
            return None
        after = bytearray(self._model)
        self._next.apply(after, self._part)
        wrong = [n for n, byte in enumerate(found) if byte != self._model[n] and byte != after[n]]
        if not wrong:
            return None
        return (
            f"program {self._part.number} after step {last}: {len(wrong)} bytes from"
            f" {self._part.start + wrong[0]:#x} on; the next step is {_text(self._next)}"
        )


def _text(step: Step) -> str:
    return f"{step.way} {step.start:#x} to {step.stop:#x}"


class Judge:
    """Looks at RAM as it was at one moment."""

    def __init__(self, parts: list[Part], content: bytes) -> None:
        self._parts = parts
        self._replays = [Replay(part, content) for part in parts]

    def look(self, this: Round, what: str, content: bytes) -> None:
        """Count what is wrong with ``content``."""
        wrong = [text for replay in self._replays if (text := replay.differs(content))]
        wrong += self._effects_without_cause(content)
        for text in wrong:
            this.count("wrong bytes", f"{what}: {text}")

    def _effects_without_cause(self, content: bytes) -> Iterator[str]:
        """A step that somebody has seen, and that is not there."""
        for part in self._parts:
            for other in range(NUMBER_OF_PROGRAMS):
                seen = SLOT.unpack_from(content, part.seen_slot(other))[0]
                last = SLOT.unpack_from(content, slot_of(other))[0]
                if other != part.number and seen > last:
                    yield f"program {part.number} has seen step {seen} of program {other}, whose last is {last}"


def torture(this: Round) -> None:
    """Programs, a commander and somebody who asks, on one mount; then a look at what is left."""
    path = this.directory / "checkpoint"
    content = bytes(LENGTH)
    options = [f"ram=pc.ram:{LENGTH}"]
    if this.random.random() < 0.6:  # restored lazily
        content, options = _golden(this.random, path), []
    mounted = Mounted(path, this.directory / "mnt", this.directory / "log", *options, deadline=600)
    try:
        _torture(this, mounted, path, content)
        subprocess.run(["umount", mounted.path], check=True, timeout=HANG)
        if code := this.within(HANG, "the daemon's end", mounted.wait):
            this.count("surprises", f"the daemon's exit code is {code}")
    finally:
        mounted.break_off()
        this.look_into_log(mounted.log)
        unmount_by_force(mounted.path)


def _torture(this: Round, mounted: Mounted, path: Path, content: bytes) -> None:
    parts = _parts(this, mounted.ram / "pc.ram")
    judge = Judge(parts, content)
    commander = Commander(this, mounted, path, judge)
    with ExitStack() as stack:
        running = [stack.enter_context(_program(part)) for part in parts]
        for process in running:
            assert process.stdout is not None
            assert this.within(HANG, "a program's beginning", process.stdout.readline) == b"ready\n"
        stack.enter_context(_somebody_who_asks(this, mounted))
        while this.goes_on():
            commander.command()
        commander.run("cont")
        for part, process in zip(parts, running, strict=True):
            output, errors = this.within(HANG, f"program {part.number}", process.communicate)
            if process.returncode:
                this.count("wrong bytes", f"program {part.number} saw it: {errors.decode()[-300:]}")
            else:
                this.counts["steps of programs"] += int(output)
    commander.at_the_end()


def _golden(random: Random, path: Path) -> bytes:
    """Write a checkpoint, with pages of data and of zeros, and return RAM as it is in it."""
    pages = {page: random.randbytes(PAGE) for page in range(1, PAGE_COUNT) if random.random() < 0.5}
    MigrationFile(blocks=[Block("pc.ram", PAGE_COUNT, pages, {})]).write(path)
    return b"".join(pages.get(page, bytes(PAGE)) for page in range(PAGE_COUNT))


def _parts(this: Round, path: Path) -> list[Part]:
    """Disjoint parts with borders amid pages; the slots are in the first page, alone."""
    borders = sorted(this.random.sample(range(PAGE, LENGTH, 997), NUMBER_OF_PROGRAMS - 1))
    while any(stop - start < 4 * PAGE for start, stop in zip([PAGE, *borders], [*borders, LENGTH], strict=True)):
        borders = sorted(this.random.sample(range(PAGE, LENGTH, 997), NUMBER_OF_PROGRAMS - 1))
    assert SLOTS_LENGTH <= PAGE
    ranges = zip([PAGE, *borders], [*borders, LENGTH], strict=True)
    return [Part(str(path), *range_, number, this.random.getrandbits(32)) for number, range_ in enumerate(ranges)]


@contextmanager
def _program(part: Part) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.torture.program", json.dumps(asdict(part))]
    pipe = subprocess.PIPE
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=root, bufsize=0)
    try:
        yield process
    finally:
        process.kill()


@contextmanager
def _somebody_who_asks(this: Round, mounted: Mounted) -> Iterator[None]:
    """Somebody who reads status and asks ctl, whatever goes on: he is answered."""
    over = threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            while not over.wait(0.05):
                (mounted.path / "status").read_text()
                mounted.ctl("info migrate")
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        this.within(HANG, "asking", thread.join)
    if failures:
        raise failures[0]


class Commander:
    """Writes to ctl, one command after another, and has each checkpoint looked at."""

    def __init__(self, this: Round, mounted: Mounted, path: Path, judge: Judge) -> None:
        self._this = this
        self._mounted = mounted
        self._path = path
        self._judge = judge
        self._random = this.random

    def run(self, command: str) -> bool:
        """Run a command; whether it was done. What is refused is counted."""
        self._this.count(command.split()[0])
        try:
            self._this.within(HANG, command, lambda: self._mounted.ctl(command))
        except OSError as error:
            self._this.count(f"refused: {errno.errorcode[error.errno or 0]}")
            if "come to rest" in str(error) or "busy with the pages" in str(error):
                self._this.count("not at rest", f"{command}: {error}")
            return False
        return True

    def command(self) -> None:
        """One thing that somebody may want."""
        what = self._random.choice(
            (self.save, self.save, self.save_elsewhere, self.save_and_cancel, self.stop, self.reset, self.others)
        )
        what()

    def save(self) -> None:
        """Over the file that RAM came from."""
        if self.run("save"):
            self._look_at(self._path)

    def save_elsewhere(self) -> None:
        """To another file, which RAM comes from then; and back."""
        other = self._path.with_name("other")
        if self.run(f"save {other}"):
            self._look_at(other)
            if self.run(f"save {self._path}"):
                other.unlink()

    def save_and_cancel(self) -> None:
        """A moment later: perhaps there is nothing left to cancel."""
        if self.run("save nowait"):
            threading.Event().wait(self._random.choice([0, 0.005, 0.05, 0.2]))
            if self.run("cancel"):
                self._this.count("cancelled")
            self._this.within(HANG, "a save nowait", self._wait_until_idle)
            self._look_at(self._path)

    def _wait_until_idle(self) -> None:
        while self._mounted.status()["state"] != "idle":
            threading.Event().wait(0.01)

    def stop(self) -> None:
        """Hold writers back, and save what RAM was then."""
        if not self.run("stop"):
            return
        if self._random.random() < 0.7:
            self.save()
        threading.Event().wait(self._random.choice([0, 0.05, 0.3]))
        self.run("cont")

    def reset(self) -> None:
        """Refused: programs have RAM open."""
        if self.run("reset"):
            self._this.count("wrong bytes", "reset was not refused while programs had RAM open for writing")

    def others(self) -> None:
        """What changes nothing."""
        self.run(
            self._random.choice(["prefetch", "restore", "info migrate", "cancel", "prefetch pc.ram 4096 100000"])
        )
        if self._random.random() < 0.1:
            Path("/proc/sys/vm/drop_caches").write_text("1")
            self._this.count("drop_caches")

    def _look_at(self, path: Path) -> None:
        if path.exists():
            self._this.count("looked at")
            self._judge.look(self._this, path.name, decode(path).blocks["pc.ram"].tobytes())
            if (found := verified(path)).findings or found.unknown:
                self._this.count("wrong bytes", f"{path.name} is not verified: {found}")

    def at_the_end(self) -> None:
        """Nobody is there: the last save is RAM as it was left, and reset brings that back."""
        ram = self._mounted.ram / "pc.ram"
        left = ram.read_bytes()
        self._judge.look(self._this, "RAM at the end", left)
        if not self.run("save"):
            self._this.count("surprises", "a save that nobody disturbs was refused")
            return
        if decode(self._path).blocks["pc.ram"].tobytes() != left:
            self._this.count("wrong bytes", "the last checkpoint is not what RAM was")
        with open(ram, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"to be dropped" * 1000, PAGE + 1)
        if self.run("reset") and ram.read_bytes() != left:
            self._this.count("wrong bytes", "after reset, RAM is not the checkpoint")
