"""Following a mount: poll(2) on status, and the lines of events."""

import json
import os
import select
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mount.conftest import Mount
from tests.mount.harness import DEADLINE, Mounted

MILLISECONDS = 1000
A_SAVE = ["setup", "active", "pass 1", "device", "completed"]


@pytest.fixture
def mounted(standing: Mounted) -> Iterator[Mounted]:
    """A mount on which a test may change what is put back here."""
    yield standing
    for command in ("qmp none", "cont", "migrate_set_parameter direct-io on", "migrate_set_capability events on"):
        standing.ctl(command)


# --- poll(2) on status ------------------------------------------------------------------------------------


@contextmanager
def polled(path: Path) -> Iterator[tuple[int, select.poll]]:
    fd = os.open(path, os.O_RDONLY)
    poll = select.poll()
    poll.register(fd, select.POLLPRI)
    yield fd, poll
    os.close(fd)


CHANGES: list[tuple[str, Callable[[Mounted], object]]] = [
    ("save", lambda mounted: mounted.ctl("save")),
    ("stop", lambda mounted: mounted.ctl("stop")),
    ("set", lambda mounted: mounted.ctl("migrate_set_parameter direct-io off")),
    ("file", lambda mounted: (mounted.path / "parameters/direct-io").write_text("off\n")),
    ("qmp", lambda mounted: mounted.ctl("qmp /nowhere")),
]


@pytest.mark.parametrize("name", ["status", "status.json"])
@pytest.mark.parametrize("change", [change for _, change in CHANGES], ids=[name for name, _ in CHANGES])
def test_poll_blocks_until_something_changes(
    name: str, change: Callable[[Mounted], object], mounted: Mounted
) -> None:
    with polled(mounted.path / name) as (fd, poll), ThreadPoolExecutor() as threads:
        assert poll.poll(0)  # nothing was read yet
        before = os.pread(fd, 1 << 16, 0)
        assert not poll.poll(0)
        waiting = threads.submit(poll.poll, DEADLINE * MILLISECONDS)
        change(mounted)
        assert waiting.result() == [(fd, select.POLLPRI)]
        assert os.pread(fd, 1 << 16, 0) != before
        assert not poll.poll(0)


def test_everybody_who_polls_is_woken(mounted: Mounted) -> None:
    with (
        polled(mounted.path / "status") as (one, one_poll),
        polled(mounted.path / "status") as (other, other_poll),
        polled(mounted.path / "status.json") as (_, never_read),
        ThreadPoolExecutor() as threads,
    ):
        for fd in (one, other):
            os.pread(fd, 1 << 16, 0)
        waiting = [threads.submit(poll.poll, DEADLINE * MILLISECONDS) for poll in (one_poll, other_poll)]
        mounted.ctl("stop")
        assert all(wait.result() for wait in waiting)
        assert never_read.poll(0)


def test_epoll_and_select_work_as_well(mounted: Mounted) -> None:
    with polled(mounted.path / "status") as (fd, _), select.epoll() as epoll, ThreadPoolExecutor() as threads:
        os.pread(fd, 1 << 16, 0)
        epoll.register(fd, select.EPOLLPRI)
        assert epoll.poll(0) == []
        waiting = [
            threads.submit(epoll.poll, DEADLINE),
            threads.submit(select.select, [], [], [fd], DEADLINE),
        ]
        mounted.ctl("stop")
        assert all(any(wait.result()) for wait in waiting)


# --- events -----------------------------------------------------------------------------------------------


class Reader:
    """Reads events in bites of any size."""

    def __init__(self, mounted: Mounted) -> None:
        self.fd = os.open(mounted.path / "events", os.O_RDONLY)
        self._text = b""
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)

    def take(self, bite: int = 1 << 16) -> None:
        """Take what there is."""
        while part := os.read(self.fd, bite):
            self._text += part

    def take_until(self, count: int) -> None:
        """Wait for so many lines."""
        while self._text.count(b"\n") < count:
            assert self._poll.poll(DEADLINE * MILLISECONDS)
            self.take()

    @property
    def events(self) -> list[dict[str, Any]]:
        assert self._text.endswith(b"\n") or not self._text
        return [json.loads(line) for line in self._text.splitlines()]

    @property
    def steps(self) -> list[str]:
        return [event["data"].get("status") or f"pass {event['data']['pass']}" for event in self.events]

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def reader(mounted: Mounted) -> Iterator[Callable[[], Reader]]:
    """`reader()` opens events once more."""
    readers: list[Reader] = []

    def new_reader() -> Reader:
        readers.append(Reader(mounted))
        return readers[-1]

    yield new_reader
    for one in readers:
        one.close()


def test_a_save_as_qmp_tells_of_it(mounted: Mounted, reader: Callable[[], Reader]) -> None:
    events = reader()
    mounted.ctl("save")
    events.take()
    assert events.steps == A_SAVE
    for event in events.events:
        assert event.keys() == {"timestamp", "event", "data"}
        assert event["timestamp"].keys() == {"seconds", "microseconds"}
        assert event["event"] == ("MIGRATION_PASS" if "pass" in event["data"] else "MIGRATION")
    stamps = [(event["timestamp"]["seconds"], event["timestamp"]["microseconds"]) for event in events.events]
    assert stamps == sorted(stamps)


def test_a_restore_and_a_failure(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:1M")
    mounted.ctl("save")
    events = Reader(mounted)
    mounted.ctl("restore")
    with pytest.raises(OSError, match="No such file"):
        mounted.ctl("save /nowhere/at/all")
    events.take()
    events.close()
    assert events.steps == ["setup", "active", "pass 1", "completed", "setup", "failed"]


def test_no_reader_loses_a_line_and_none_holds_the_daemon_back(
    mounted: Mounted, reader: Callable[[], Reader]
) -> None:
    asleep, in_bites, *polling = (reader() for _ in range(5))
    saves = 25
    expected = A_SAVE * saves
    with ThreadPoolExecutor() as threads:
        waiting = [threads.submit(one.take_until, len(expected)) for one in polling]
        for number in range(saves):
            mounted.ctl("save")
            in_bites.take(1 + number)
        for wait in waiting:
            wait.result(DEADLINE)
    asleep.take()
    for one in (asleep, in_bites, *polling):
        assert one.steps == expected
        assert one.events == asleep.events


def test_tail_follows_them(mounted: Mounted, reader: Callable[[], Reader]) -> None:
    reader()
    mounted.ctl("save")  # so that the file has a length already
    with (
        (mounted.path / "events").open("rb") as file,
        subprocess.Popen(
            # without +1 it looks for the last lines first, reads what has come by then, and forgets it
            ["tail", "-n", "+1", "-f"],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as tail,
    ):
        watchdog = threading.Timer(DEADLINE, tail.kill)
        watchdog.start()
        mounted.ctl("save")
        assert tail.stdout is not None
        events = [json.loads(tail.stdout.readline()) for _ in A_SAVE]
        watchdog.cancel()
        tail.kill()
        _, stderr = tail.communicate()
    assert [event["data"].get("status", "pass 1") for event in events] == A_SAVE
    assert stderr == b""


def test_who_opens_later_reads_what_comes_later(mounted: Mounted, reader: Callable[[], Reader]) -> None:
    first = reader()
    mounted.ctl("save")
    second = reader()
    with pytest.raises(OSError, match="No such file"):
        mounted.ctl("save /nowhere/at/all")
    for one in (first, second):
        one.take()
    assert first.steps == [*A_SAVE, "setup", "failed"]
    assert second.steps == ["setup", "failed"]


def test_poll_on_events_blocks(mounted: Mounted, reader: Callable[[], Reader]) -> None:
    events = reader()
    poll = select.poll()
    poll.register(events.fd, select.POLLIN)
    assert not poll.poll(0)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(poll.poll, DEADLINE * MILLISECONDS)
        mounted.ctl("save")
        assert waiting.result() == [(events.fd, select.POLLIN)]
    assert poll.poll(0)
    events.take()
    assert not poll.poll(0)


def test_without_the_capability_there_are_none(mounted: Mounted, reader: Callable[[], Reader]) -> None:
    events = reader()
    mounted.ctl("migrate_set_capability events off")
    mounted.ctl("save")
    events.take()
    assert events.events == []
    mounted.ctl("migrate_set_capability events on")
    mounted.ctl("save")
    events.take()
    assert events.steps == A_SAVE


@pytest.mark.parametrize("name", ["events", "status", "status.json"])
def test_what_can_not_be_written(name: str, mounted: Mounted) -> None:
    with pytest.raises(PermissionError), (mounted.path / name).open("r+b", buffering=0) as file:
        file.write(b"{}\n")  # root may open it
