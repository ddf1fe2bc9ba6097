"""What a daemon holds: to be equal before and after whatever went wrong."""

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Footprint:
    """Open descriptors by what they are open on, and mapped layers of RAM (memfds) by name."""

    descriptors: Counter[str]
    layers: Counter[str]


def footprint(pid: int) -> Footprint:
    """Look at process ``pid``."""
    directory = Path(f"/proc/{pid}/fd")
    descriptors: Counter[str] = Counter()
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):  # of this process: the listing itself
            descriptors[os.readlink(directory / name)] += 1
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return Footprint(descriptors, Counter(line.split(maxsplit=5)[-1] for line in maps if "/memfd:ckptfs:" in line))


def thread_count(pid: int) -> int:
    """Threads of process ``pid``: trio keeps those that were needed at the same time for a while."""
    return len(os.listdir(f"/proc/{pid}/task"))


def memory_length(pid: int) -> int:
    """Bytes that process ``pid`` holds: memory of its own (RssAnon of proc(5)), and RAM in memfds."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    memfds = {}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:ckptfs:" in os.readlink(descriptor):
            memfds[descriptor.stat().st_ino] = descriptor.stat().st_blocks * 512
    return int(fields["RssAnon"].split()[0]) * 1024 + sum(memfds.values())
