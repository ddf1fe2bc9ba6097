"""Telling whoever waits: the events file's lines, and poll(2) on it and on status.

Nothing here blocks the daemon, whatever a reader does: a line is kept until every open handle has read it, and a
read returns what there is. A read never waits either, as a process inside a FUSE read can't be killed; poll(2)
is what waits. `tail -n +1 -f` asks for the length instead: it is that of all lines so far.
"""

import json
import select
import time

from pyfuse3 import PollHandle

from ckptfs.namespace.events import Event

READABLE = select.POLLIN | select.POLLRDNORM


class Waiters:
    """The poll(2) calls that wait for something; each `PollHandle` is good for one wake-up."""

    def __init__(self) -> None:
        self._handles: dict[object, PollHandle] = {}

    def add(self, owner: object, handle: PollHandle | None) -> None:
        """Keep the newest handle of an open file."""
        if handle is not None:
            self._handles[owner] = handle

    def remove(self, owner: object) -> None:
        """The file was closed."""
        self._handles.pop(owner, None)

    def wake(self) -> None:
        """Wake all of them."""
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.notify()


class Changes:
    """Counts the changes of the mount's state, for poll(2) on status."""

    def __init__(self) -> None:
        self.count = 0
        self.waiters = Waiters()

    def note(self) -> None:
        """Something that status shows has changed its state."""
        self.count += 1
        self.waiters.wake()


class EventLog:
    """QMP events as lines of JSON, in QEMU's form, for all open handles of the events file."""

    def __init__(self) -> None:
        self.waiters = Waiters()
        self._lines: list[bytes] = []
        self._first = 0
        self._positions: dict[object, int] = {}
        self.length = 0
        """Bytes of all lines so far."""

    def publish(self, event: Event, value: str | int) -> None:
        """Add an event, if anybody has the file open."""
        if not self._positions:
            return
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        timestamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
        line = json.dumps({"timestamp": timestamp, "event": event.name, "data": {event.member: value}})
        self._lines.append(line.encode() + b"\n")
        self.length += len(self._lines[-1])
        self.waiters.wake()

    def open(self, reader: object) -> None:
        """``reader`` gets all that comes from now on."""
        self._positions[reader] = self._first + len(self._lines)

    def pending(self, reader: object) -> bool:
        """Whether there is anything that ``reader`` has not taken."""
        return self._positions[reader] < self._first + len(self._lines)

    def take(self, reader: object) -> bytes:
        """All that ``reader`` has not taken yet."""
        lines = b"".join(self._lines[self._positions[reader] - self._first :])
        self._positions[reader] = self._first + len(self._lines)
        self._forget_taken()
        return lines

    def close(self, reader: object) -> None:
        """``reader`` is gone."""
        del self._positions[reader]
        self.waiters.remove(reader)
        self._forget_taken()

    def _forget_taken(self) -> None:
        end = self._first + len(self._lines)
        oldest = min(self._positions.values(), default=end)
        del self._lines[: oldest - self._first]
        self._first = oldest
