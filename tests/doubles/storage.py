"""Storage that shortens and fails: `os` functions replaced by ones with the fault that a test asks for."""

import errno
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest


def open_descriptors() -> dict[str, str]:
    """What this process has open: descriptor number to what is behind it."""
    links = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            links[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the listing itself
    return links


def wait_until_open(expected: dict[str, str]) -> None:
    """Return when nothing else is open: a thread that was left to itself closes its descriptor when it ends."""
    deadline = time.monotonic() + 60
    while (found := open_descriptors()) != expected:
        assert time.monotonic() < deadline, (found, expected)
        gc.collect()  # tracebacks of errors that tests saw hold on to memory


class ShortTransfers:
    """Reads and writes that move only some of what was asked, by chance; never nothing.

    ``counts`` holds the length of every transfer, so that a test can see that some were short indeed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, granularity: int = 1, seed: int = 0) -> None:
        self.counts: list[int] = []
        self._random = Random(seed)
        self._granularity = granularity
        for name in ("preadv", "pwritev"):
            monkeypatch.setattr(os, name, self._shortened_vector(getattr(os, name)))
        monkeypatch.setattr(os, "pwrite", self._shortened_write(os.pwrite))
        monkeypatch.setattr(os, "pread", self._shortened_read(os.pread))

    def _some_of(self, length: int) -> int:
        units = -(-length // self._granularity)
        return min(self._random.randint(1, units) * self._granularity, length)

    def _shortened_vector(self, transfer: Callable[..., int]) -> Callable[..., int]:
        def shortened(fd: int, views: list[memoryview], offset: int, *flags: int) -> int:
            rest = self._some_of(sum(map(len, views)))
            some = []
            for view in views:
                some.append(memoryview(view)[:rest])
                rest -= len(some[-1])
            count = transfer(fd, [view for view in some if view], offset, *flags)
            self.counts.append(count)
            return count

        return shortened

    def _shortened_write(self, transfer: Callable[..., int]) -> Callable[..., int]:
        def shortened(fd: int, data: memoryview, offset: int) -> int:
            count = transfer(fd, memoryview(data)[: self._some_of(len(data))], offset)
            self.counts.append(count)
            return count

        return shortened

    def _shortened_read(self, transfer: Callable[..., bytes]) -> Callable[..., bytes]:
        def shortened(fd: int, length: int, offset: int) -> bytes:
            data = transfer(fd, self._some_of(length), offset)
            self.counts.append(len(data))
            return data

        return shortened


class FailingCall:
    """The Nth call (from 1) of any of some functions of `os` fails, once, and does nothing.

    ``failed`` names the function whose call failed; None as long as that has not happened.
    """

    def __init__(self, names: tuple[str, ...], number: int, error: int) -> None:
        self.failed: str | None = None
        self._names = names
        self._left = number
        self._error = error

    @contextmanager
    def installed(self) -> Iterator["FailingCall"]:
        """Within this the functions are replaced."""
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name in self._names:
                monkeypatch.setattr(os, name, self._failing(name, getattr(os, name)))
            yield self

    def _failing(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                self.failed = name
                raise OSError(self._error, f"{os.strerror(self._error)} (injected)")
            return call(*args, **kwargs)

        return failing


def without_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open files as a file system does that has no O_DIRECT: EINVAL (open(2))."""
    plain_open = os.open

    def refusing(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return plain_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refusing)
