"""What a daemon holds: to be equal before and after whatever went wrong."""

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
    descriptors = Counter(os.readlink(directory / name) for name in os.listdir(directory))
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return Footprint(descriptors, Counter(line.split(maxsplit=5)[-1] for line in maps if "/memfd:ckptfs:" in line))


def thread_count(pid: int) -> int:
    """Threads of process ``pid``: trio keeps those that were needed at the same time for a while."""
    return len(os.listdir(f"/proc/{pid}/task"))


def resident_length(pid: int) -> int:
    """Bytes of memory of its own that process ``pid`` has resident (RssAnon and RssShmem of proc(5))."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
