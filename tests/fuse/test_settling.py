"""`Settling` among programs that go on writing: every schedule comes from a seed, and time is not real."""

import contextlib
import errno
from collections.abc import Callable, Coroutine
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from ckptfs.errors import StateError
from ckptfs.fuse import page_cache
from ckptfs.fuse.page_cache import SETTLE_DEADLINE, FileRange, Settling
from tests.doubles.kernel import INODE, PAGE_LENGTH, Daemon, Kernel, as_in_a_thread

PAGE_COUNT = 48


@pytest.fixture(autouse=True)
def _fake_threads_and_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio.to_thread, "run_sync", as_in_a_thread)
    monkeypatch.setattr(page_cache, "PIECE_LENGTH", 16 * PAGE_LENGTH)


class World:
    """A daemon, its kernel, and programs that use the file until they are told to stop."""

    def __init__(self, seed: int, slowest_read: float = 0.02, slowest_eviction: float = 0.004) -> None:
        self.random = Random(seed)
        self.daemon = Daemon(self.random, PAGE_COUNT, slowest_read)
        self.kernel = Kernel(self.random, self.daemon, slowest_eviction)
        self.writes_under_way = 0
        self.stopped = False
        numbers = list(range(PAGE_COUNT))
        self.random.shuffle(numbers)
        self.mapped, self.written = numbers[: PAGE_COUNT // 2], numbers[PAGE_COUNT // 2 :]

    async def settle(self) -> None:
        """What `KernelPageCache.settled` does, with a look at the promise in the middle."""
        file = FileRange(INODE, 0, PAGE_COUNT * PAGE_LENGTH)
        self.daemon.settling = settling = Settling([file], self.kernel.evict)  # type: ignore[arg-type]
        try:
            await settling.evict_all()
            await self._assert_at_rest()
        finally:
            settling.release()
            self.daemon.settling = None

    async def _assert_at_rest(self) -> None:
        """The daemon holds what is newest, and it stays so however long it takes."""
        for number in self.mapped:
            assert self.daemon.content[number] == self.kernel.newest[number]
        content, store_count = list(self.daemon.content), self.kernel.store_count
        newest = list(self.kernel.newest)
        under_way = self.writes_under_way
        await trio.sleep(self.random.uniform(0, 0.2))
        assert self.kernel.store_count == store_count
        for number in range(PAGE_COUNT):
            if number in self.mapped or not under_way:
                assert self.daemon.content[number] == content[number]
            else:  # a write(2) that was let in before may have ended
                assert self.daemon.content[number] in (content[number], self.kernel.newest[number])
                assert content[number] >= newest[number]

    # --- programs -------------------------------------------------------------------------------------

    async def pause(self) -> None:
        await trio.sleep(self.random.choice([0, self.random.uniform(0, 0.03)]))

    async def store_through_mmap(self) -> None:
        while not self.stopped:
            await self.kernel.store(self.random.choice(self.mapped))
            await self.pause()

    async def load_through_mmap(self) -> None:
        """What was seen once is never unseen."""
        seen = [0] * PAGE_COUNT
        while not self.stopped:
            number = self.random.choice(self.mapped)
            version = await self.kernel.load(number)
            assert version >= seen[number]
            seen[number] = version
            await self.pause()

    async def write(self) -> None:
        """write(2), to pages that nobody stores to through mmap, and no two such programs at once."""
        while not self.stopped:
            start = stop = self.random.choice(self.written)
            while stop in self.written and stop < start + 8:
                stop += 1
            self.writes_under_way += 1
            await self.kernel.write(start, stop)
            self.writes_under_way -= 1
            await self.pause()

    async def write_parts(self) -> None:
        """write(2) from anywhere to anywhere, one after another, and now and then across a border of pages."""
        at = 0
        while not self.stopped:
            number, start = divmod(at, PAGE_LENGTH)
            stop = min(start + 1000, PAGE_LENGTH)
            at = (at + stop - start) % (PAGE_COUNT * PAGE_LENGTH)
            if number in self.written:
                self.writes_under_way += 1
                await self.kernel.write_part(number, start, stop)
                self.writes_under_way -= 1
                await self.pause()

    async def flush(self) -> None:
        while not self.stopped:
            await self.kernel.write_back(self.random.randrange(PAGE_COUNT))
            await self.pause()

    async def run(self, *programs: Callable[[], Coroutine[Any, Any, None]], rounds: int) -> None:
        async with trio.open_nursery() as nursery:
            for program in programs:
                nursery.start_soon(program)
            await trio.sleep(self.random.uniform(0, 0.2))
            for _ in range(rounds):
                await self.settle()
                await trio.sleep(self.random.uniform(0, 0.1))
            self.stopped = True
        for number in self.mapped:
            assert await self.kernel.load(number) == self.kernel.newest[number]


def run(seed: int, main: Callable[[], Coroutine[Any, Any, None]]) -> float:
    """Run ``main`` in a time that takes none; return how long it took."""
    trio._core._run._r.seed(seed)  # the order of tasks goes by the seed, too (pytest-trio made it deterministic)
    clock = MockClock(autojump_threshold=0)

    async def within_an_hour() -> float:
        with trio.fail_after(3600):
            await main()
        return trio.current_time()

    return trio.run(within_an_hour, clock=clock)


@pytest.mark.parametrize("seed", range(60))
def test_all_comes_to_rest_among_programs_of_every_kind(seed: int) -> None:
    world = World(seed)
    programs = [world.store_through_mmap] * 3 + [world.load_through_mmap] * 2 + [world.write, world.flush]
    run(seed, lambda: world.run(*programs, rounds=4))
    assert world.kernel.store_count > 30


@pytest.mark.parametrize("seed", range(60))
def test_all_comes_to_rest_among_writes_of_parts_of_pages(seed: int) -> None:
    world = World(seed)
    programs = [world.store_through_mmap] * 2 + [
        world.load_through_mmap,
        world.write,
        world.write_parts,
        world.flush,
    ]
    run(seed, lambda: world.run(*programs, rounds=4))


@pytest.mark.parametrize("seed", range(30))
def test_all_comes_to_rest_while_the_backing_storage_is_slow(seed: int) -> None:
    world = World(seed, slowest_read=1.0)
    programs = [world.store_through_mmap] * 4 + [world.load_through_mmap, world.write, world.flush]
    run(seed, lambda: world.run(*programs, rounds=3))


@pytest.mark.parametrize("seed", range(10))
def test_all_comes_to_rest_when_nobody_else_is_there(seed: int) -> None:
    world = World(seed)

    async def main() -> None:
        for number in world.mapped:
            await world.kernel.store(number)
        await world.settle()
        assert not world.kernel.pages

    assert run(seed, main) < SETTLE_DEADLINE


@pytest.mark.parametrize("seed", range(20))
def test_it_ends_even_if_evicting_never_outruns_the_writers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "SETTLE_DEADLINE", 1.0)
    world = World(seed, slowest_read=0.001, slowest_eviction=0.1)

    async def settle() -> None:
        begun = trio.current_time()
        with contextlib.suppress(StateError):
            await world.settle()
        assert trio.current_time() - begun < 3

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for program in [world.store_through_mmap] * 6 + [world.flush]:
                nursery.start_soon(program)
            for _ in range(3):
                await settle()
                before = world.kernel.store_count
                await trio.sleep(0.5)
                assert world.kernel.store_count > before  # they go on
            world.stopped = True

    run(seed, main)


def test_writers_that_never_let_go_are_named() -> None:
    """A reader of a page that is evicted just now, again and again, each time too late for the eviction."""

    async def main() -> None:
        request = FileRange(INODE, 0, PAGE_LENGTH)

        async def evict(piece: FileRange) -> None:
            await settling.admit(request, writing=True)
            await trio.sleep(1)

        settling = Settling([request], evict)  # type: ignore[arg-type]
        with pytest.raises(StateError, match="did not let it come to rest in 20 s") as error:
            await settling.evict_all()
        assert error.value.errno == errno.EBUSY
        assert trio.current_time() < SETTLE_DEADLINE + 1

    run(0, main)


def test_a_cancelled_attempt_lets_everybody_go_on() -> None:
    world = World(0, slowest_eviction=0.5)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for program in [world.store_through_mmap] * 3:
                nursery.start_soon(program)
            await trio.sleep(0.1)
            with trio.move_on_after(0.3) as scope:
                await world.settle()
            assert scope.cancelled_caught
            before = world.kernel.store_count
            await trio.sleep(1)
            assert world.kernel.store_count > before
            world.kernel.slowest_eviction = 0.004
            await world.settle()
            world.stopped = True

    run(0, main)


def test_an_eviction_that_fails_lets_everybody_go_on() -> None:
    async def main() -> None:
        async def fail(piece: FileRange) -> None:
            await trio.sleep(0.001)
            raise OSError(errno.ENODEV, "the connection is gone")

        settling = Settling([FileRange(INODE, 0, PAGE_LENGTH)], fail)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: settling.admit(FileRange(INODE, 0, PAGE_LENGTH), writing=False))
            with pytest.raises(OSError, match="the connection is gone"):
                await settling.evict_all()
            settling.release()

    run(0, main)


def test_nobody_waits_once_it_is_over() -> None:
    async def main() -> None:
        settling = Settling([FileRange(INODE, 0, PAGE_LENGTH)], as_in_a_thread)  # type: ignore[arg-type]
        settling.release()
        with trio.fail_after(0):
            await settling.admit(FileRange(INODE, 0, PAGE_LENGTH), writing=True)

    run(0, main)


# --- ranges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_of_a_range_is_what_no_other_covers(seed: int) -> None:
    random = Random(seed)

    def any_range() -> FileRange:
        start, stop = sorted(random.sample(range(40), 2))
        return FileRange(random.randint(1, 2), start, stop)

    whole, others = any_range(), [any_range() for _ in range(random.randint(0, 6))]
    left = whole.without(others)
    covered = {n for other in others if other.inode == whole.inode for n in range(other.start, other.stop)}
    assert [n for part in left for n in range(part.start, part.stop)] == [
        n for n in range(whole.start, whole.stop) if n not in covered
    ]
    assert all(part.start < part.stop and part.inode == whole.inode for part in left)
    assert not any(part.overlaps(other) for part in left for other in others)


def test_a_huge_file_is_cut_into_few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for length in (1, 64 << 20, (64 << 20) + 1, 1 << 44):
        pieces = page_cache._pieces(FileRange(INODE, 0, length))[::-1]
        assert len(pieces) <= 512
        assert (pieces[0].start, pieces[-1].stop) == (0, length)
        assert all(former.stop == latter.start for former, latter in pairwise(pieces))
