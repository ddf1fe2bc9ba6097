"""Multifd channels: N descriptors on one backing file, each carrying one payload at a time.

A payload is opaque (QEMU 9.2 made multifd's so): a function that is given the channel and does its own
positional I/O in the channel's thread, which waits for the next one in a queue: that costs a quarter of what
trio.to_thread does for each.

All channels are created before any carries a payload, and a failure on the way closes those that were made
(QEMU's leak fixes, migration/file.c). A descriptor is closed only when no thread is inside a payload with it:
a number that is closed too early can be handed out again and the thread would write into another file.

A storage may fall silent: a file server that went away, a file system whose daemon hangs. All payloads on a file
have one deadline then, that of the oldest: what waits when it passes fails with it, and what comes later is a probe
that gets a moment. The silence ends with the first answer, be it late or a probe's.
"""

import contextlib
import logging
import math
import os
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import trio

from ckptfs.channels.backing_file import BackingFile, DirectIO, pwritev_all
from ckptfs.channels.ring import PlainRead, ring_of_this_run
from ckptfs.errors import StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

BACKING_DEADLINE = 60.0
"""Seconds after which an I/O on the backing storage counts as failed: a reader of RAM can't be interrupted."""

PROBE_DEADLINE = 1.0
"""Seconds that a payload gets while the storage is silent."""

CLOSING_DEADLINE = 3.0
"""Seconds that what nobody waits for any more gets to end, before its thread is left behind."""


class NoAnswerError(StorageError):
    """The backing storage gave no answer before the deadline (EIO).

    ``returned`` is set when the thread that was left behind comes back; None if there is no thread.
    """

    def __init__(self, deadline: float, returned: trio.Event | None = None) -> None:
        """``deadline`` in seconds."""
        super().__init__(f"the backing storage gave no answer in {deadline:g} s")
        self.returned = returned


class _Call:
    """A payload under way: who waits for it (nobody any more: None), and what came of it."""

    def __init__(
        self, payload: Callable[["Channel"], Any], plain: PlainRead | None, task: trio.lowlevel.Task
    ) -> None:
        self.payload = payload
        self.plain = plain
        self.task: trio.lowlevel.Task | None = task
        self.trio_token = trio.lowlevel.current_trio_token()
        self.result: Any = None
        self.errors: list[BaseException] = []


class Channel:
    """One descriptor for pages, and a thread. Its methods but `start` block: payloads call them, in that thread."""

    def __init__(self, file: BackingFile, fd: int, direct_io: bool) -> None:
        self._file = file
        self._fd = fd
        self.direct_io = direct_io
        self.given_up = False
        """Whether nobody waits for the payload any more: it should end soon, and begin nothing new."""
        self._calls: queue.SimpleQueue[tuple[_Call, Callable[[Channel, _Call], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, call: _Call, returned: Callable[["Channel", _Call], None]) -> None:
        """Perform a call, and have ``returned`` called in trio's thread. RuntimeError if there is no thread.

        The kernel does a plain read by itself; where it can't, our thread performs the payload.
        """
        plain = call.plain
        if plain is not None and self._file.holds(plain.file_offset, len(plain.buffer)):
            ring = ring_of_this_run()
            if ring is not None:
                with contextlib.suppress(OSError):  # the kernel has no memory for one more request
                    ring.begin(self._fd, plain, partial(self._plain_ended, call, returned))
                    return
        self._start_thread(call, returned)

    def _plain_ended(self, call: _Call, returned: Callable[["Channel", _Call], None], count: int) -> None:
        assert call.plain is not None
        try:
            if call.task is not None and count != len(call.plain.buffer):
                self._start_thread(call, returned)
                return
        except RuntimeError as error:
            call.errors.append(error)
        returned(self, call)

    def _start_thread(self, call: _Call, returned: Callable[["Channel", _Call], None]) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._perform_calls, name="ckptfs channel", daemon=True)
            thread.start()
            self._thread = thread
        self._calls.put((call, returned))

    def _perform_calls(self) -> None:
        while self._perform(self._calls.get()):
            pass  # no variable here holds on to what a payload had

    def _perform(self, what: tuple[_Call, Callable[["Channel", _Call], None]] | None) -> bool:
        if what is None:
            return False
        call, returned = what
        try:
            call.result = call.payload(self)
        except BaseException as error:  # noqa: BLE001 - it is raised where the call is waited for
            call.errors.append(error)
        try:
            call.trio_token.run_sync_soon(returned, self, call)
        except trio.RunFinishedError:
            self.close()
        return True

    def pread_exactly(self, buffer: memoryview, file_offset: int) -> None:
        """Fill ``buffer`` from ``file_offset`` on; StorageError or OSError if that can't be done."""
        self._file.pread_exactly(self._fd, buffer, file_offset)

    def pread(self, file_offset: int, length: int) -> bytes:
        """Read bytes that need not be aligned (so not with O_DIRECT); fewer only at the end of the file."""
        return self._file.pread(self._fd, length, file_offset)

    def pwritev_all(self, views: list[memoryview], file_offset: int) -> None:
        """Write ``views`` from ``file_offset`` on; StorageError or OSError if that can't be done."""
        pwritev_all(self._fd, views, file_offset)

    def close(self) -> None:
        """Close the descriptor and end the thread, which is in no payload."""
        os.close(self._fd)
        self._calls.put(None)

    @property
    def path(self) -> str:
        """The file's name, as far as it can be told without asking the storage."""
        return self._file.name(self._fd)


class Channels:
    """A fixed number of channels, handed to the next payload in line; urgent payloads go first."""

    def __init__(self, channels: list[Channel], deadline: float = BACKING_DEADLINE) -> None:
        self.direct_io = all(channel.direct_io for channel in channels)
        self.channel_count = len(channels)
        self._deadline = deadline
        self._idle = list(channels)
        self._open_count = len(channels)
        self._all_returned = trio.Event()
        self._line: list[_Turn] = []
        self._waits: dict[Channel, trio.CancelScope] = {}  # for each payload under way, whoever waits for it or did
        self._left_behind: dict[Channel, trio.Event] = {}
        self._answered = -math.inf  # when a payload last ended, in trio's time
        self._silent_since: float | None = None  # as it was logged
        self._closed = False
        self._given_up = False

    @classmethod
    def open(
        cls, file: BackingFile, direct_io: DirectIO, channel_count: int, deadline: float = BACKING_DEADLINE
    ) -> "Channels":
        """Create ``channel_count`` channels on ``file``, all or none (blocking). Raises StorageError, OSError."""
        with contextlib.ExitStack() as undo:
            channels = []
            for _ in range(channel_count):
                channel = Channel(file, *file.open_pages(direct_io))
                undo.callback(channel.close)
                channels.append(channel)
            undo.pop_all()
        return cls(channels, deadline)

    async def carry(self, payload: Callable[[Channel], T], *, urgent: bool = False) -> T:
        """Run ``payload`` on the next idle channel, in its thread, and return what it returns.

        Raises what the payload raises, and NoAnswerError (EIO) when the backing storage gives no answer
        before the deadline: the thread is then left to itself and its channel is out of service until it ends.
        The deadline counts from when the thread begins, or for all from when the storage fell silent; the line may
        take longer, as long as it moves.
        """
        result: T = await self._carry(payload, None, urgent)
        return result

    async def fill(self, plain: PlainRead, payload: Callable[[Channel], T], *, urgent: bool = False) -> T | None:
        """Have the kernel read without a thread, and return None; where it can't, do what `carry` does."""
        result: T | None = await self._carry(payload, plain, urgent)
        return result

    async def _carry(self, payload: Callable[[Channel], Any], plain: PlainRead | None, urgent: bool) -> Any:
        channel = await self._next_idle(payload, urgent)
        # trio.fail_after says the same, and costs several times as much for every read
        with trio.CancelScope(deadline=trio.current_time() + self._patience) as wait:
            self._waits[channel] = wait
            return await self._run(payload, plain, channel)
        left_behind = self._waits.get(channel) is wait  # and not returned just now
        returned = self._left_behind.setdefault(channel, trio.Event()) if left_behind else None
        self._note_silence(channel)
        raise NoAnswerError(self._deadline, returned)

    @property
    def silent(self) -> bool:
        """Whether all that is under way has waited for the whole deadline, and nothing was answered meanwhile."""
        now = trio.current_time()
        # the first is a part of the second, and nearly always enough
        return self._answered + self._deadline <= now and self._silence_begins <= now

    @property
    def _silence_begins(self) -> float:
        """When the storage will have to be called silent."""
        oldest = min((wait.deadline for wait in self._waits.values()), default=math.inf)
        return max(self._answered + self._deadline, oldest)

    @property
    def _patience(self) -> float:
        """Seconds for the next payload."""
        return min(PROBE_DEADLINE, self._deadline) if self.silent else self._deadline

    def _note_silence(self, channel: Channel) -> None:
        """If none is answered at all, those who wait beside ``channel`` need not wait any longer."""
        if self._silent_since is not None or not self.silent:
            return
        self._silent_since = trio.current_time() - self._deadline
        log.error(
            "%s: the storage has not answered for %g s: whatever needs it fails until it does",
            channel.path,
            self._deadline,
        )
        for wait in self._waits.values():
            wait.cancel()

    def hurry(self, payload: object) -> None:
        """Make ``payload`` urgent, if it is still in the line: it keeps the place of its arrival."""
        for turn in self._line:
            turn.urgent |= turn.payload is payload

    async def _run(self, payload: Callable[[Channel], Any], plain: PlainRead | None, channel: Channel) -> Any:
        call = _Call(payload, plain, trio.lowlevel.current_task())

        def leave(raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            call.task = None
            channel.given_up = True
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            channel.start(call, self._returned)
        except BaseException:
            self._release(channel)
            raise
        await trio.lowlevel.wait_task_rescheduled(leave)
        if call.errors:
            raise call.errors.pop()  # and keep it nowhere: its traceback has this frame
        return call.result

    def _returned(self, channel: Channel, call: _Call) -> None:
        """The storage has answered, in whatever way."""
        self._answered = trio.current_time()
        if self._silent_since is not None:
            seconds = self._answered - self._silent_since
            log.info("%s: the storage answers again, after %.0f s", channel.path, seconds)
            self._silent_since = None
        self._release(channel)
        if call.task is not None:
            trio.lowlevel.reschedule(call.task)

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
        """Wait in the line; NoAnswerError when nobody at all was answered for as long as the deadline is."""
        while not turn.come.is_set():
            if self.silent:
                self._note_silence(next(iter(self._waits)))
                raise NoAnswerError(self._deadline)
            with trio.CancelScope(deadline=self._silence_begins):
                await turn.come.wait()

    def _release(self, channel: Channel) -> None:
        self._waits.pop(channel, None)
        if channel in self._left_behind:
            self._left_behind.pop(channel).set()
        channel.given_up = False
        if self._closed:
            self._close(channel)
            if self._given_up:
                self.close()
        elif self._line:
            turn = next((turn for turn in self._line if turn.urgent), self._line[0])
            self._line.remove(turn)
            turn.channel = channel
            turn.come.set()
        else:
            self._idle.append(channel)

    def close(self) -> None:
        """Close every idle channel now and every other one when its payload ends; waiters get an error."""
        self._refuse_more()
        while self._idle:
            self._close(self._idle.pop())

    async def aclose(self) -> None:
        """Close, and wait a while for payloads that still run: none should touch the file later.

        Closing a descriptor asks some storages something (FUSE, NFS), so a thread does it; and where a payload does
        not come back, it waits for that: a thread in close(2) can't even be killed.
        """
        self._refuse_more()
        with trio.move_on_after(min(CLOSING_DEADLINE, self._deadline), shield=True):
            if self._open_count > len(self._idle):
                await self._all_returned.wait()
            idle, self._idle = self._idle, []
            self._open_count -= len(idle)
            await trio.to_thread.run_sync(_close, idle, abandon_on_cancel=True)
            return
        self._given_up = True

    def _refuse_more(self) -> None:
        self._closed = True
        for turn in self._line:
            turn.come.set()
        self._line.clear()

    def _close(self, channel: Channel) -> None:
        channel.close()
        self._open_count -= 1
        if self._open_count == len(self._idle):
            self._all_returned.set()


def _close(channels: list[Channel]) -> None:
    for channel in channels:
        channel.close()


class _Turn:
    """A payload in the line for a channel; ``come`` is set with a channel, or without one when all is closed."""

    def __init__(self, payload: Callable[[Channel], object], urgent: bool) -> None:
        self.payload = payload
        self.urgent = urgent
        self.come = trio.Event()
        self.channel: Channel | None = None
