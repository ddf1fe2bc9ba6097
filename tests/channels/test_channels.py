import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ckptfs.channels.backing_file import DirectIO, OpenedFile
from ckptfs.channels.channels import PROBE_DEADLINE, Channel, Channels, NoAnswerError
from ckptfs.errors import StorageError
from tests.doubles.storage import open_descriptors, wait_until_open

BUFFERED = DirectIO(wanted=False)


@pytest.fixture
def backing_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "backing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.pwrite(fd, b"abcd" * 1024, 0)
    yield fd
    os.close(fd)


@pytest.fixture
def open_channels(backing_fd: int) -> Iterator[Callable[..., Channels]]:
    """`open_channels(2, deadline=60.0)`; nothing but what was open before may be open at the end."""
    before = open_descriptors()
    opened = []

    def open_channels(channel_count: int, deadline: float = 60.0) -> Channels:
        opened.append(Watched.open(OpenedFile(backing_fd, os.O_RDWR), BUFFERED, channel_count, deadline))
        return opened[-1]

    yield open_channels
    for channels in opened:
        channels.close()
    wait_until_open(before)


class Watched(Channels):
    """Tells each payload when its channel has been released."""

    def _returned(self, channel: Channel, call: Any) -> None:
        super()._returned(channel, call)
        if isinstance(call.payload, Payload):
            call.payload.released.set()


class Payload:
    """A payload that ends when it is told to; ``started`` is set in its thread."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.started = threading.Event()
        self.may_end = threading.Event()
        self.released = trio.Event()
        self.channel: Channel | None = None

    def __call__(self, channel: Channel) -> str:
        self.channel = channel
        self.started.set()
        self.may_end.wait()
        return self.name

    async def wait_started(self) -> None:
        await trio.to_thread.run_sync(self.started.wait)

    async def end(self) -> None:
        """Let it end, and wait until its channel has been released."""
        self.may_end.set()
        await self.released.wait()


@asynccontextmanager
async def carrying(channels: Channels, *payloads: Payload) -> AsyncIterator[trio.Nursery]:
    """Carry payloads in the background, all of them started; they are told to end at the end."""
    async with trio.open_nursery() as nursery:
        for payload in payloads:
            nursery.start_soon(channels.carry, payload)
        for payload in payloads:
            await payload.wait_started()
        try:
            yield nursery
        finally:
            for payload in payloads:
                payload.may_end.set()


async def assert_all_in_service(channels: Channels) -> None:
    """Every channel takes a payload, all at the same time, and each its own."""
    payloads = [Payload() for _ in range(channels.channel_count)]
    async with carrying(channels, *payloads):
        pass
    assert len({payload.channel for payload in payloads}) == channels.channel_count


# --- creation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 4])
def test_either_all_channels_are_created_or_none(
    backing_fd: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = open_descriptors()
    plain_open, calls = os.open, iter(range(1, 100))

    def failing(path: str, flags: int) -> int:
        if next(calls) == number:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return plain_open(path, flags)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(OSError, match="Too many open files"):
        Channels.open(OpenedFile(backing_fd, os.O_RDONLY), BUFFERED, 4)
    monkeypatch.undo()
    assert open_descriptors() == before


def test_channels_know_whether_they_bypass_the_page_cache(backing_fd: int) -> None:
    for direct_io in (False, True):
        channels = Channels.open(OpenedFile(backing_fd, os.O_RDONLY), DirectIO(direct_io), 2)
        assert (channels.direct_io, channels.channel_count) == (direct_io, 2)
        channels.close()


# --- carrying payloads ------------------------------------------------------------------------------------


async def test_a_payload_reads_and_writes_through_its_channel(open_channels: Callable[..., Channels]) -> None:
    channels = open_channels(1)

    def payload(channel: Channel) -> bytes:
        buffer = memoryview(bytearray(4))
        channel.pwritev_all([memoryview(b"xy"), memoryview(b"z")], 4)
        channel.pread_exactly(buffer, 2)
        return bytes(buffer)

    assert await channels.carry(payload) == b"cdxy"


async def test_payloads_run_side_by_side_each_on_its_own_channel(open_channels: Callable[..., Channels]) -> None:
    await assert_all_in_service(open_channels(3))


async def test_no_more_payloads_run_than_there_are_channels(open_channels: Callable[..., Channels]) -> None:
    channels = open_channels(2)
    first, second, third = Payload(), Payload(), Payload()
    async with carrying(channels, first, second) as nursery:
        nursery.start_soon(channels.carry, third)
        await wait_all_tasks_blocked()
        assert not third.started.is_set()
        second.may_end.set()
        await third.wait_started()
        assert third.channel is second.channel
        third.may_end.set()


async def test_urgent_payloads_go_first_and_equal_ones_in_order(open_channels: Callable[..., Channels]) -> None:
    channels = open_channels(1)
    order = []
    blocker = Payload()
    async with carrying(channels, blocker) as nursery:
        for name in ("background 1", "urgent 1", "background 2", "urgent 2"):

            async def carry(name: str = name) -> None:
                await channels.carry(lambda channel: order.append(name), urgent=name.startswith("urgent"))

            nursery.start_soon(carry)
            await wait_all_tasks_blocked()
    assert order == ["urgent 1", "urgent 2", "background 1", "background 2"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "bad sector"), StorageError("cut short"), KeyError("bug")])
async def test_the_error_of_a_payload_reaches_its_caller_and_the_channel_goes_on(
    open_channels: Callable[..., Channels], error: Exception
) -> None:
    channels = open_channels(2)

    def fail(channel: Channel) -> None:
        raise error

    for _ in range(3):
        with pytest.raises(type(error)) as caught:
            await channels.carry(fail)
        assert caught.value is error
    await assert_all_in_service(channels)


async def test_a_thread_that_cannot_be_started_costs_no_channel(
    open_channels: Callable[..., Channels], monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = open_channels(1)

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await channels.carry(lambda channel: None)
    await assert_all_in_service(channels)


# --- cancellation -----------------------------------------------------------------------------------------


async def test_cancelled_before_it_begins(open_channels: Callable[..., Channels]) -> None:
    channels = open_channels(2)
    payload = Payload()
    with trio.CancelScope() as scope:
        scope.cancel()
        await channels.carry(payload)
    assert scope.cancelled_caught
    assert not payload.started.is_set()
    await assert_all_in_service(channels)


@pytest.mark.parametrize("urgent", [False, True])
async def test_cancelled_in_the_line(open_channels: Callable[..., Channels], urgent: bool) -> None:
    channels = open_channels(1)
    blocker, waiting = Payload(), Payload()
    async with carrying(channels, blocker):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: channels.carry(waiting, urgent=urgent))
                await wait_all_tasks_blocked()
                scope.cancel()
    assert not waiting.started.is_set()
    await assert_all_in_service(channels)


async def test_cancelled_at_the_moment_its_turn_comes(
    open_channels: Callable[..., Channels], monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = open_channels(1)
    blocker, waiting = Payload(), Payload()
    with trio.CancelScope() as scope:
        async with carrying(channels, blocker) as nursery:
            nursery.start_soon(channels.carry, waiting)
            await wait_all_tasks_blocked()
            release = channels._release

            def release_and_cancel(channel: Channel) -> None:
                release(channel)
                scope.cancel()

            monkeypatch.setattr(channels, "_release", release_and_cancel)
    monkeypatch.undo()
    assert not waiting.started.is_set()
    await assert_all_in_service(channels)


async def test_cancelled_at_the_moment_all_is_closed(open_channels: Callable[..., Channels]) -> None:
    channels = open_channels(1)
    blocker, waiting = Payload(), Payload()
    async with carrying(channels, blocker):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channels.carry, waiting)
                await wait_all_tasks_blocked()
                scope.cancel()
                channels.close()
    assert scope.cancelled_caught
    assert not waiting.started.is_set()


async def test_a_channel_whose_payload_was_abandoned_carries_nothing_else(
    open_channels: Callable[..., Channels],
) -> None:
    channels = open_channels(1)
    abandoned, following = Payload(), Payload()
    await abandon(channels, abandoned)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channels.carry, following)
        await wait_all_tasks_blocked()
        assert not following.started.is_set()
        await abandoned.end()
        await following.wait_started()
        following.may_end.set()
    await assert_all_in_service(channels)


async def abandon(channels: Channels, payload: Payload) -> None:
    """Carry a payload and cancel the wait for it while its thread is in it."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channels.carry, payload)
            await payload.wait_started()
            scope.cancel()


# --- the deadline -----------------------------------------------------------------------------------------


@pytest.fixture
def silence(expect_log: Callable[[str], None]) -> None:
    """The storage falls silent in this test, and the log has to say so."""
    expect_log(r"ERROR ckptfs\.channels\.channels: .*/backing: the storage has not answered for .* s: whatever")


async def fails_for_want_of_an_answer(channels: Channels, payload: Payload) -> None:
    """Carry a payload that gets no answer in time."""
    with pytest.raises(NoAnswerError, match=r"no answer in 10 s") as error:
        await channels.carry(payload)
    assert error.value.errno == errno.EIO
    if payload.started.is_set():
        assert error.value.returned is not None
        assert not error.value.returned.is_set()


@pytest.mark.usefixtures("silence")
async def test_storage_that_gives_no_answer_is_an_io_error(
    open_channels: Callable[..., Channels], mock_clock: MockClock
) -> None:
    channels = open_channels(2, deadline=10)
    stuck = Payload()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails_for_want_of_an_answer, channels, stuck)
        await stuck.wait_started()
        mock_clock.jump(9)
        await wait_all_tasks_blocked()
        assert nursery.child_tasks
        mock_clock.jump(1)
    # the other one serves on
    for _ in range(3):
        await channels.carry(lambda channel: None)
    await stuck.end()
    await assert_all_in_service(channels)


async def test_a_line_that_moves_has_no_deadline(
    open_channels: Callable[..., Channels], mock_clock: MockClock
) -> None:
    channels = open_channels(1, deadline=10)
    slow = [Payload() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for payload in slow:
            nursery.start_soon(channels.carry, payload)
            await wait_all_tasks_blocked()
        for payload in slow:
            await payload.wait_started()
            mock_clock.jump(7)
            await wait_all_tasks_blocked()  # a deadline that had passed would have been seen
            await payload.end()
    await assert_all_in_service(channels)


@pytest.mark.usefixtures("silence")
async def test_a_line_that_does_not_move_is_an_io_error(
    open_channels: Callable[..., Channels], mock_clock: MockClock
) -> None:
    channels = open_channels(1, deadline=10)
    stuck, waiting = Payload(), Payload()
    await abandon(channels, stuck)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails_for_want_of_an_answer, channels, waiting)
        await wait_all_tasks_blocked()
        mock_clock.jump(10)
    assert not waiting.started.is_set()
    await stuck.end()
    await assert_all_in_service(channels)


@pytest.mark.usefixtures("silence")
async def test_the_deadline_of_the_oldest_is_that_of_all_who_wait(
    open_channels: Callable[..., Channels], mock_clock: MockClock
) -> None:
    channels = open_channels(2, deadline=10)
    stuck = [Payload(), Payload()]
    waiting = Payload()
    async with trio.open_nursery() as nursery:
        for payload in stuck:
            nursery.start_soon(fails_for_want_of_an_answer, channels, payload)
            await payload.wait_started()
            mock_clock.jump(4)
        nursery.start_soon(fails_for_want_of_an_answer, channels, waiting)
        await wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 3
        mock_clock.jump(2)
    assert not waiting.started.is_set()
    for payload in stuck:
        await payload.end()
    await assert_all_in_service(channels)


@pytest.mark.usefixtures("silence")
async def test_what_comes_in_a_silence_gets_a_moment_and_the_first_answer_ends_it(
    open_channels: Callable[..., Channels], mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ckptfs")
    channels = open_channels(3, deadline=10)
    stuck = [Payload(), Payload()]
    for payload, patience in zip(stuck, (10, PROBE_DEADLINE), strict=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails_for_want_of_an_answer, channels, payload)
            await payload.wait_started()
            mock_clock.jump(patience)
    assert channels.silent
    assert await channels.carry(lambda channel: "a probe") == "a probe"
    assert not channels.silent
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert caplog.messages[1].endswith("the storage answers again, after 11 s")
    late = Payload()
    async with carrying(channels, late):
        mock_clock.jump(9)
        await wait_all_tasks_blocked()
        assert not channels.silent
    for payload in stuck:
        await payload.end()
    await assert_all_in_service(channels)


async def test_where_others_are_answered_one_that_is_not_fails_alone(
    open_channels: Callable[..., Channels], mock_clock: MockClock
) -> None:
    channels = open_channels(2, deadline=10)
    stuck, slow = Payload(), Payload()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails_for_want_of_an_answer, channels, stuck)
        await stuck.wait_started()
        mock_clock.jump(4)
        await channels.carry(lambda channel: None)
        async with carrying(channels, slow):
            mock_clock.jump(6)
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 0
            assert not channels.silent
    await stuck.end()
    await assert_all_in_service(channels)


# --- closing ----------------------------------------------------------------------------------------------


async def test_waiters_get_an_error_when_all_is_closed(open_channels: Callable[..., Channels]) -> None:
    channels = open_channels(1)
    running, waiting = Payload(), Payload()
    errors = []
    async with carrying(channels, running) as nursery:

        async def carry(urgent: bool) -> None:
            with pytest.raises(StorageError, match="the backing file was closed") as error:
                await channels.carry(waiting, urgent=urgent)
            errors.append(error.value.errno)

        nursery.start_soon(carry, True)
        nursery.start_soon(carry, False)
        await wait_all_tasks_blocked()
        channels.close()
    assert errors == [errno.EIO, errno.EIO]
    assert not waiting.started.is_set()
    with pytest.raises(StorageError, match="the backing file was closed"):
        await channels.carry(waiting)


async def test_a_descriptor_in_use_is_closed_when_its_payload_ends(backing_fd: int) -> None:
    before = open_descriptors()
    channels = Channels.open(OpenedFile(backing_fd, os.O_RDONLY), BUFFERED, 3)
    during = []

    def payload(channel: Channel) -> None:
        channels_closed.wait()
        during.append(len(open_descriptors()))
        channel.pread_exactly(memoryview(bytearray(4)), 0)

    channels_closed = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channels.carry, payload)
        await wait_all_tasks_blocked()
        channels.close()
        channels_closed.set()
    assert during == [len(before) + 1]
    assert open_descriptors() == before


def test_a_thread_that_outlives_trio_closes_its_descriptor(
    backing_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    abandoned = Payload()
    closed = threading.Event()
    close = Channel.close
    monkeypatch.setattr(Channel, "close", lambda channel: (close(channel), closed.set()))

    async def main() -> None:
        channels = Channels.open(OpenedFile(backing_fd, os.O_RDONLY), BUFFERED, 1)
        await abandon(channels, abandoned)
        channels.close()

    trio.run(main)
    assert len(open_descriptors()) == len(before) + 1
    abandoned.may_end.set()
    assert closed.wait(10)
    assert open_descriptors() == before
