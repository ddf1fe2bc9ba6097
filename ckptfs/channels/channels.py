"""Multifd channels: N descriptors on one backing file, each carrying one payload at a time.

A payload is opaque (QEMU 9.2 made multifd's so): a function that is given the channel and does its own
positional I/O in a worker thread. The channel knows its descriptor, the limit of threads and who goes first.

All channels are created before any carries a payload, and a failure on the way closes those that were made
(QEMU's leak fixes, migration/file.c). A descriptor is closed only when no thread is inside a payload with it:
a number that is closed too early can be handed out again and the thread would write into another file.
"""

import contextlib
import math
import os
from collections.abc import Callable
from typing import TypeVar

import trio

from ckptfs.channels.backing_file import BackingFile, DirectIO, pread, pread_exactly, pwritev_all
from ckptfs.errors import StorageError

T = TypeVar("T")

BACKING_DEADLINE = 60.0
"""Seconds after which an I/O on the backing storage counts as failed: a reader of RAM can't be interrupted."""


class Channel:
    """One descriptor for pages. Its methods block: they are called by payloads, in worker threads."""

    def __init__(self, fd: int, direct_io: bool) -> None:
        self._fd = fd
        self.direct_io = direct_io

    def pread_exactly(self, buffer: memoryview, file_offset: int) -> None:
        """Fill ``buffer`` from ``file_offset`` on; StorageError or OSError if that can't be done."""
        pread_exactly(self._fd, buffer, file_offset)

    def pread(self, file_offset: int, length: int) -> bytes:
        """Read bytes that need not be aligned (so not with O_DIRECT); fewer only at the end of the file."""
        return pread(self._fd, length, file_offset)

    def pwritev_all(self, views: list[memoryview], file_offset: int) -> None:
        """Write ``views`` from ``file_offset`` on; StorageError or OSError if that can't be done."""
        pwritev_all(self._fd, views, file_offset)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


class Channels:
    """A fixed number of channels, handed to the next payload in line; urgent payloads go first."""

    def __init__(self, channels: list[Channel], deadline: float = BACKING_DEADLINE) -> None:
        self.direct_io = all(channel.direct_io for channel in channels)
        self.channel_count = len(channels)
        self._deadline = deadline
        self._idle = list(channels)
        self._open_count = len(channels)
        self._all_closed = trio.Event()
        self._line: list[_Turn] = []
        self._answered = -math.inf  # when a payload last ended, in trio's time
        self._limiter = trio.CapacityLimiter(math.inf)  # the channels themselves are the limit
        self._closed = False

    @classmethod
    def open(
        cls, file: BackingFile, direct_io: DirectIO, channel_count: int, deadline: float = BACKING_DEADLINE
    ) -> "Channels":
        """Create ``channel_count`` channels on ``file``, all or none (blocking). Raises StorageError, OSError."""
        with contextlib.ExitStack() as undo:
            channels = []
            for _ in range(channel_count):
                channel = Channel(*file.open_pages(direct_io))
                undo.callback(channel.close)
                channels.append(channel)
            undo.pop_all()
        return cls(channels, deadline)

    async def carry(self, payload: Callable[[Channel], T], *, urgent: bool = False) -> T:
        """Run ``payload`` on the next idle channel, in a worker thread, and return what it returns.

        Raises what the payload raises, and StorageError (EIO) when the backing storage gives no answer
        before the deadline: the thread is then left to itself and its channel is out of service until it ends.
        The deadline counts from when the thread begins; the line may take longer, as long as it moves.
        """
        channel = await self._next_idle(payload, urgent)
        # trio.fail_after says the same, and costs several times as much for every read
        with trio.CancelScope(deadline=trio.current_time() + self._deadline):
            return await self._run(payload, channel)
        raise self._no_answer()

    def hurry(self, payload: Callable[[Channel], object]) -> None:
        """Make ``payload`` urgent, if it is still in the line: it keeps the place of its arrival."""
        for turn in self._line:
            turn.urgent |= turn.payload is payload

    def _no_answer(self) -> StorageError:
        return StorageError(f"the backing storage gave no answer in {self._deadline:g} s")

    async def _run(self, payload: Callable[[Channel], T], channel: Channel) -> T:
        trio_token = trio.lowlevel.current_trio_token()
        duty = [channel]  # whoever pops it has to release the channel: list.pop is atomic

        def run() -> T:
            duty.pop()
            try:
                return payload(channel)
            finally:
                try:
                    trio_token.run_sync_soon(self._release, channel)
                except trio.RunFinishedError:
                    channel.close()

        try:
            return await trio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=self._limiter)
        finally:
            with contextlib.suppress(IndexError):  # the thread had it, or takes it just now
                duty.pop()  # cancelled before the thread was started: if it is just starting, its pop fails
                self._release(channel)

    async def _next_idle(self, payload: Callable[[Channel], object], urgent: bool) -> Channel:
        if self._closed:
            raise StorageError("the backing file was closed")
        if self._idle:
            return self._idle.pop()
        turn = _Turn(payload, urgent)
        self._line.append(turn)
        try:
            await self._wait_for(turn)
        except BaseException:
            if turn.channel is not None:
                self._release(turn.channel)
            elif not turn.come.is_set():
                self._line.remove(turn)
            raise
        if turn.channel is None:
            raise StorageError("the backing file was closed")
        return turn.channel

    async def _wait_for(self, turn: "_Turn") -> None:
        """Wait in the line; StorageError when nobody in it got an answer for as long as the deadline is."""
        arrived = trio.current_time()
        while not turn.come.is_set():
            deadline = max(arrived, self._answered) + self._deadline
            if deadline <= trio.current_time():
                raise self._no_answer()
            with trio.CancelScope(deadline=deadline):
                await turn.come.wait()

    def _release(self, channel: Channel) -> None:
        self._answered = trio.current_time()
        if self._closed:
            self._close(channel)
        elif self._line:
            turn = next((turn for turn in self._line if turn.urgent), self._line[0])
            self._line.remove(turn)
            turn.channel = channel
            turn.come.set()
        else:
            self._idle.append(channel)

    def close(self) -> None:
        """Close every idle channel now and every other one when its payload ends; waiters get an error."""
        self._closed = True
        for turn in self._line:
            turn.come.set()
        self._line.clear()
        while self._idle:
            self._close(self._idle.pop())

    async def aclose(self) -> None:
        """Close, and wait for payloads that still run: none may touch the file later. Not past the deadline."""
        self.close()
        with trio.move_on_after(self._deadline, shield=True):
            await self._all_closed.wait()

    def _close(self, channel: Channel) -> None:
        channel.close()
        self._open_count -= 1
        if not self._open_count:
            self._all_closed.set()


class _Turn:
    """A payload in the line for a channel; ``come`` is set with a channel, or without one when all is closed."""

    def __init__(self, payload: Callable[[Channel], object], urgent: bool) -> None:
        self.payload = payload
        self.urgent = urgent
        self.come = trio.Event()
        self.channel: Channel | None = None
