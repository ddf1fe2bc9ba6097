"""Calls whose thread may be left behind: what counts, what is undone, and who waits for whom."""

import threading
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ckptfs.channels.channels import CLOSING_DEADLINE, NoAnswerError
from ckptfs.channels.lane import Lane
from ckptfs.errors import StorageError


class Call:
    """A call that ends when it is told to, after `Lane.commit` if it is to commit; all it does is in ``steps``."""

    def __init__(self, steps: list[str], name: str, commit: Callable[[], None] = lambda: None) -> None:
        self.started = threading.Event()
        self.may_commit = threading.Event()
        self.committed = threading.Event()
        self.may_end = threading.Event()
        self._steps = steps
        self._name = name
        self._commit = commit

    def __call__(self) -> str:
        self.started.set()
        self.may_commit.wait()
        self._commit()
        self.committed.set()
        self.may_end.wait()
        self._steps.append(self._name)
        return self._name

    async def wait_for(self, event: threading.Event) -> None:
        await trio.to_thread.run_sync(event.wait)

    def end(self) -> None:
        self.may_commit.set()
        self.may_end.set()


@pytest.fixture
def steps() -> list[str]:
    return []


async def test_calls_are_made_one_after_another(steps: list[str]) -> None:
    lane = Lane()
    first, second = Call(steps, "first"), Call(steps, "second")
    second.end()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.ask, first)
        await first.wait_for(first.started)
        nursery.start_soon(lane.ask, second)
        await wait_all_tasks_blocked()
        assert not second.started.is_set()
        first.end()
    assert steps == ["first", "second"]


async def test_results_and_errors_are_those_of_the_call(steps: list[str]) -> None:
    lane = Lane()
    assert await lane.ask(lambda: 5) == 5

    def fail() -> None:
        raise KeyError("why")

    for _ in range(2):
        with pytest.raises(KeyError, match="why"):
            await lane.ask(fail)


async def leave_behind(lane: Lane, call: Call, clock: MockClock, undo: Callable[[str], object]) -> None:
    """Cancel the wait for a call that does not come back."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: lane.ask(call, undo=undo))
            await call.wait_for(call.started)
            scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
                assert len(nursery.child_tasks) == 1  # it gets a moment
                clock.jump(CLOSING_DEADLINE)
    assert scope.cancelled_caught


async def test_a_call_that_was_left_behind_is_undone_before_the_next_begins(
    steps: list[str], mock_clock: MockClock
) -> None:
    lane = Lane()
    stuck = Call(steps, "late")
    await leave_behind(lane, stuck, mock_clock, lambda result: steps.append(f"undo {result}"))
    assert not steps
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.ask, lambda: steps.append("next"))
        await wait_all_tasks_blocked()
        assert not steps
        stuck.end()
    assert steps == ["late", "undo late", "next"]


async def test_a_call_that_was_left_behind_can_not_commit(steps: list[str], mock_clock: MockClock) -> None:
    lane = Lane()
    stuck = Call(steps, "late", lane.commit)
    await leave_behind(lane, stuck, mock_clock, steps.append)
    stuck.end()
    await lane.ask(lambda: None)
    assert not stuck.committed.is_set()
    assert not steps


async def test_a_result_that_comes_with_the_cancellation_is_undone(steps: list[str]) -> None:
    lane = Lane()
    call = Call(steps, "done")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: lane.ask(call, undo=lambda result: steps.append(f"undo {result}")))
            await call.wait_for(call.started)
            call.end()
            while not steps:
                pass  # the thread goes on, and trio does not
            scope.cancel()
    assert scope.cancelled_caught
    assert steps == ["done", "undo done"]


async def test_a_call_that_has_committed_counts_whoever_cancels(steps: list[str]) -> None:
    lane = Lane()
    call = Call(steps, "done", lane.commit)
    results = []

    async def ask() -> None:
        results.append(await lane.ask(call, undo=lambda result: steps.append("undone")))

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            call.may_commit.set()
            await call.wait_for(call.committed)
            scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            call.end()
    assert results == ["done"]
    assert steps == ["done"]


async def test_a_call_that_committed_and_does_not_come_back_is_an_error(
    steps: list[str], mock_clock: MockClock
) -> None:
    lane = Lane()
    call = Call(steps, "late", lane.commit)
    call.may_commit.set()

    async def ask() -> None:
        with pytest.raises(StorageError, match="whether the last step was done is unknown"):
            await lane.ask(call, deadline=10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await call.wait_for(call.committed)
        mock_clock.jump(10)
        await wait_all_tasks_blocked()
        mock_clock.jump(CLOSING_DEADLINE)
    call.end()


async def test_a_deadline(steps: list[str], mock_clock: MockClock) -> None:
    lane = Lane()
    stuck = Call(steps, "late")

    async def ask() -> None:
        with pytest.raises(NoAnswerError, match="no answer in 10 s"):
            await lane.ask(stuck, undo=lambda result: steps.append("undone"), deadline=10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await stuck.wait_for(stuck.started)
        mock_clock.jump(10)
        await wait_all_tasks_blocked()
        mock_clock.jump(CLOSING_DEADLINE)
    stuck.end()
    await lane.ask(lambda: None)
    assert steps == ["late", "undone"]
