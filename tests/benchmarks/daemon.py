"""What a mount costs: the daemon's memory, and what a save costs those who write RAM meanwhile."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.benchmarks.fio import fio
from tests.benchmarks.rows import MiB, Row, Samples
from tests.benchmarks.setting import Mount, Setting, fill, settle

SAMPLING = 0.01
"""Seconds between two looks at the daemon's memory."""


def memory(setting: Setting) -> Iterator[Row]:
    """The daemon's memory beyond the pages written, which are its to keep."""
    setting.make_checkpoint()
    written = setting.size // 4
    beyond: dict[str, Samples] = {"after mount": [], "after reading all": [], "after writing a quarter": []}
    beyond |= {"during a save of that, at most": [], "after it": []}
    for _ in range(setting.rounds):
        with Mount(setting) as mount:
            beyond["after mount"].append(memory_of(mount.pid))
            fio(mount.ram, "read", size=setting.size, block=MiB, direct=False)
            beyond["after reading all"].append(memory_of(mount.pid))
            fill(mount.ram, written)
            beyond["after writing a quarter"].append(memory_of(mount.pid) - written / MiB)
            with _watched(mount.pid) as seen:
                mount.ctl("save")
            beyond["during a save of that, at most"].append(max(seen) - written / MiB)
            beyond["after it"].append(memory_of(mount.pid))
    for when, samples in beyond.items():
        yield Row(f"daemon's memory beyond written pages, {when}", "MiB", samples, [], "", "<= 60")


def memory_of(pid: int) -> float:
    """MiB of a process's own memory: what it has mapped privately, and what lies in its memfds.

    A memfd's pages count in RssShmem only once they were touched through a mapping, hence the files themselves.
    """
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    anonymous = int(status["RssAnon"].split()[0]) << 10
    return (anonymous + sum(_memfds(pid).values())) / MiB


def _memfds(pid: int) -> dict[int, int]:
    """Bytes allocated, by inode number."""
    found = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(fd).startswith("/memfd:"):
                status = fd.stat()
                found[status.st_ino] = status.st_blocks * 512
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


@contextmanager
def _watched(pid: int) -> Iterator[Samples]:
    """Look at a process's memory again and again."""
    samples: Samples = []
    ended = threading.Event()

    def watch() -> None:
        while True:
            samples.append(memory_of(pid))
            if ended.wait(SAMPLING):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


WORKING_SET = 64 * MiB

# Writes page after page of the working set, and prints how many so far when it is asked.
PROGRAM = """
import mmap, os, sys, threading

path, length, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
fd = os.open(path, os.O_RDWR)
memory = mmap.mmap(fd, length)
page = b"ckptfs!\\n" * 512
offsets = [number * 40503 * len(page) % length for number in range(length // len(page))]
done = 0

def answer():
    for _ in sys.stdin:
        print(done, flush=True)
    os._exit(0)

threading.Thread(target=answer).start()
while True:
    for offset in offsets:
        if how == "mmap":
            memory[offset : offset + len(page)] = page
        else:
            os.pwrite(fd, page, offset)
        done += 1
"""


class Writer:
    """A program that writes pages of RAM all the time, `how` is "mmap" or "write"."""

    def __init__(self, path: Path, length: int, how: str) -> None:
        self._command = [sys.executable, "-c", PROGRAM, str(path), str(length), how]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def rate(self, meanwhile: Callable[[], object]) -> tuple[float, float]:
        """How many pages it writes a second while `meanwhile` runs, and how many seconds that took."""
        before, started = self._pages(), time.perf_counter()
        meanwhile()
        seconds = time.perf_counter() - started
        return (self._pages() - before) / seconds, seconds

    def _pages(self) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        return int(self._process.stdout.readline())


def writers(setting: Setting) -> Iterator[Row]:
    """A program that writes pages of RAM: during a save, and for as long while nothing else happens."""
    for how, what in (("mmap", "through mmap"), ("write", "by write(2)")):
        during: Samples = []
        without: Samples = []
        with Mount(setting, f"ram=pc.ram:{setting.size}") as mount:
            fill(mount.ram, setting.size)
            with Writer(mount.ram, min(WORKING_SET, setting.size), how) as writer:
                writer.rate(lambda: time.sleep(1))  # it has met every page now
                for _ in range(setting.rounds):
                    settle(setting.directory)
                    rate, seconds = writer.rate(partial(mount.ctl, "save"))
                    during.append(rate)
                    without.append(writer.rate(partial(time.sleep, seconds))[0])
        setting.checkpoint.unlink()
        yield Row(f"pages written {what} during a save", "1/s", during, without, "the same program, no save")
