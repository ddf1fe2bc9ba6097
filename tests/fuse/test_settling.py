"""`Settling` among programs that go on writing: every schedule comes from a seed, and time is not real."""

import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from random import Random
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from ckptfs.errors import StateError
from ckptfs.fuse import connection, settling
from ckptfs.fuse.page_cache import KERNEL_DEADLINE, KernelPageCache
from ckptfs.fuse.settling import SETTLE_DEADLINE, FileRange, Settling, UnderWay
from tests.doubles.kernel import CELLS, INODE, PAGE_LENGTH, Daemon, Kernel, ModelledPageCache, cells_of
from tests.doubles.steps import Steps

PAGE_COUNT = 48


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "PIECE_LENGTH", 16 * PAGE_LENGTH)
    monkeypatch.setattr(settling, "AGAIN_LENGTH", 3 * PAGE_LENGTH)


class World:
    """A daemon, its kernel, and programs that use the file until they are told to stop.

    A third of the pages is ``mapped``, a third ``written`` with write(2), the others are both.
    """

    def __init__(self, seed: int, slowest_read: float = 0.02, slowest_eviction: float = 0.004) -> None:
        self.random = Random(seed)
        self.daemon = Daemon(self.random, PAGE_COUNT, slowest_read)
        self.kernel = Kernel(self.random, self.daemon, slowest_eviction)
        self.stopped = False
        numbers = list(range(PAGE_COUNT))
        self.random.shuffle(numbers)
        third = PAGE_COUNT // 3
        self.only_mapped, self.only_written = numbers[:third], numbers[third : 2 * third]
        self.mapped = list(cells_of(numbers[:third] + numbers[2 * third :]))
        self.written = sorted(numbers[third:])

    async def settle(self) -> None:
        """Settle, with a look at the promise in the middle."""
        async with self.daemon.page_cache.settled(["pc.ram"]):
            self._assert_at_rest()
            stores = [self.kernel.stores.get(number) for number in self.only_mapped]
            cells = [self.daemon.cells[cell] for cell in cells_of(self.only_mapped)]
            await trio.sleep(self.random.uniform(0, 0.2))
            # whoever must ask for a page waits, however long it takes
            assert [self.kernel.stores.get(number) for number in self.only_mapped] == stores
            assert [self.daemon.cells[cell] for cell in cells_of(self.only_mapped)] == cells

    def _assert_at_rest(self) -> None:
        """The daemon holds all that anybody can have seen."""
        for cell, version in enumerate(self.daemon.cells):
            seen, sent = self.kernel.seen[cell], self.kernel.sent.get(cell, 0)
            assert version == seen or version == sent > seen, f"cell {cell}"

    # --- programs -------------------------------------------------------------------------------------

    async def pause(self) -> None:
        await trio.sleep(self.random.choice([0, self.random.uniform(0, 0.03)]))

    async def store_through_mmap(self) -> None:
        while not self.stopped:
            await self.kernel.store(self.random.choice(self.mapped))
            await self.pause()

    async def load_through_mmap(self) -> None:
        """What was seen once is never unseen."""
        seen: dict[int, int] = {}
        while not self.stopped:
            cell = self.random.choice(self.mapped)
            version = await self.kernel.load(cell)
            assert version >= seen.get(cell, 0)
            seen[cell] = version
            await self.pause()

    def _written_cells(self) -> tuple[int, int]:
        """Where a write(2) begins and ends: anywhere, in up to eight pages that follow one another."""
        first = last = self.random.choice(self.written)
        while last + 1 in self.written and last < first + 8:
            last += 1
        start = self.random.randrange(first * CELLS, (last + 1) * CELLS)
        whole = self.random.random() < 0.5
        if whole:
            return start // CELLS * CELLS, (last + 1) * CELLS
        return start, self.random.randrange(start, (last + 1) * CELLS) + 1

    async def write(self) -> None:
        while not self.stopped:
            await self.kernel.write(*self._written_cells())
            await self.pause()

    async def write_a_cell_at_a_time(self) -> None:
        """From one page to the next, as `writer` of a stream does."""
        while not self.stopped:
            for cell in cells_of(self.written):
                if self.stopped:
                    break
                await self.kernel.write(cell, cell + 1)

    async def copy(self) -> None:
        while not self.stopped:
            start, stop = self._written_cells()
            source = self.random.randrange(PAGE_COUNT * CELLS - (stop - start) + 1)
            await self.kernel.copy(source, start, stop - start)
            await self.pause()

    async def go_direct(self) -> None:
        """O_DIRECT, where nobody stores through mmap: with both, the kernel promises nothing."""
        while not self.stopped:
            start = self.random.choice(self.only_written) * CELLS
            await self.kernel.read_direct(start + 1, start + CELLS)
            await self.kernel.write_direct(start, start + CELLS)
            await self.pause()

    async def look_directly(self) -> None:
        """O_DIRECT, anywhere: the page cache is asked for nothing."""
        while not self.stopped:
            cell = self.random.randrange(PAGE_COUNT * CELLS - CELLS)
            await self.kernel.read_direct(cell, cell + self.random.randint(1, CELLS))
            await self.pause()

    async def flush(self) -> None:
        while not self.stopped:
            await self.kernel.write_back(self.random.randrange(PAGE_COUNT))
            await self.pause()

    @contextlib.asynccontextmanager
    async def alive(self, *programs: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
        """Within this the programs run; afterwards nobody has lost what he stored."""
        async with trio.open_nursery() as threads:
            self.daemon.page_cache = ModelledPageCache(self.kernel, threads)
            async with trio.open_nursery() as nursery:
                for program in programs:
                    nursery.start_soon(program)
                yield
                self.stopped = True
            for cell in range(PAGE_COUNT * CELLS):
                assert await self.kernel.load(cell) == self.kernel.seen[cell]
            await self.daemon.page_cache.forget(["pc.ram"])
            assert self.daemon.cells == self.kernel.seen

    async def run(self, *programs: Callable[[], Coroutine[Any, Any, None]], rounds: int) -> None:
        async with self.alive(*programs):
            await trio.sleep(self.random.uniform(0, 0.2))
            for _ in range(rounds):
                await self.settle()
                await trio.sleep(self.random.uniform(0, 0.1))


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
    others = [world.write, world.write_a_cell_at_a_time, world.copy, world.go_direct, world.flush]
    programs = [world.store_through_mmap] * 3 + [world.load_through_mmap] * 2 + others
    run(seed, lambda: world.run(*programs, rounds=4))
    assert world.kernel.store_count > 30


@pytest.mark.parametrize("seed", range(40))
def test_all_comes_to_rest_among_writes_of_parts_of_pages(seed: int) -> None:
    world = World(seed)
    programs = [world.store_through_mmap] * 2 + [world.write_a_cell_at_a_time] * 2 + [world.load_through_mmap]
    run(seed, lambda: world.run(*programs, rounds=4))


@pytest.mark.parametrize("seed", range(40))
def test_all_comes_to_rest_where_pages_are_written_and_mapped(seed: int) -> None:
    """write(2) shows a page to mappings before its WRITE is answered."""
    world = World(seed)
    programs = [world.store_through_mmap] * 4 + [world.write] * 3 + [world.look_directly] * 3 + [world.flush]
    run(seed, lambda: world.run(*programs, rounds=4))


@pytest.mark.parametrize("seed", range(30))
def test_all_comes_to_rest_while_the_backing_storage_is_slow(seed: int) -> None:
    world = World(seed, slowest_read=1.0)
    programs = [world.store_through_mmap] * 4 + [world.load_through_mmap, world.write, world.copy, world.flush]
    run(seed, lambda: world.run(*programs, rounds=3))


@pytest.mark.parametrize("seed", range(10))
def test_all_comes_to_rest_when_nobody_else_is_there(seed: int) -> None:
    world = World(seed)

    async def main() -> None:
        async with world.alive():
            for cell in world.mapped:
                await world.kernel.store(cell)
            await world.settle()
            assert not world.kernel.pages

    assert run(seed, main) < SETTLE_DEADLINE


@pytest.mark.parametrize("seed", range(20))
def test_it_ends_even_if_evicting_never_outruns_the_writers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "SETTLE_DEADLINE", 1.0)
    world = World(seed, slowest_read=0.001, slowest_eviction=0.1)

    async def settle() -> None:
        begun = trio.current_time()
        with contextlib.suppress(StateError):
            await world.settle()
        assert trio.current_time() - begun < 6

    async def main() -> None:
        async with world.alive(*[world.store_through_mmap] * 6, world.flush):
            for _ in range(3):
                await settle()
                before = world.kernel.store_count
                await trio.sleep(0.5)
                assert world.kernel.store_count > before  # they go on

    run(seed, main)


def test_a_cancelled_attempt_lets_everybody_go_on() -> None:
    world = World(0, slowest_eviction=0.5)

    async def main() -> None:
        async with world.alive(*[world.store_through_mmap] * 3, world.write):
            await trio.sleep(0.1)
            with trio.move_on_after(0.3) as scope:
                await world.settle()
            assert scope.cancelled_caught
            before = world.kernel.store_count
            await trio.sleep(1)
            assert world.kernel.store_count > before
            world.kernel.slowest_eviction = 0.004
            await world.settle()

    run(0, main)


@pytest.mark.parametrize("seed", range(5))
def test_there_is_one_moment_at_a_time(seed: int) -> None:
    """`stop` while RAM is saved."""
    world = World(seed)

    async def main() -> None:
        async with world.alive(*[world.store_through_mmap] * 3, world.write), trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(world.settle)

    run(seed, main)


def test_nothing_is_awaited_between_rest_and_what_is_done_then(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0)
    steps = Steps()

    async def settle(attempt: Settling) -> None:
        await original(attempt)
        trio.lowlevel.add_instrument(steps)

    original = Settling.settle
    monkeypatch.setattr(Settling, "settle", settle)

    async def main() -> None:
        async with world.alive(), world.daemon.page_cache.settled(["pc.ram"]):
            trio.lowlevel.remove_instrument(steps)
            assert not steps.count

    run(0, main)


class SilentKernel(ModelledPageCache):
    """Returns from nothing."""

    async def _in_thread(self, call: object, *args: object) -> None:  # type: ignore[override]
        await trio.sleep_forever()


@pytest.mark.parametrize("writes", [0, 6])
@pytest.mark.parametrize("what", [KernelPageCache.flush, KernelPageCache.forget])
def test_a_kernel_that_writes_nothing_back_is_given_up(what: Callable[..., Awaitable[None]], writes: int) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            page_cache = SilentKernel(World(0).kernel, nursery)

            async def write_at_times() -> None:
                for _ in range(writes):
                    await trio.sleep(10)
                    async with page_cache.written(PAGE):
                        pass

            nursery.start_soon(write_at_times)
            with pytest.raises(StateError, match="has written nothing back"):
                await what(page_cache, ["pc.ram"])
        assert trio.current_time() == pytest.approx(10 * writes + KERNEL_DEADLINE)

    run(0, main)


@pytest.mark.parametrize("what", [KernelPageCache.flush, KernelPageCache.forget])
@pytest.mark.parametrize("gone", [True, False])
@pytest.mark.parametrize("failure", [errno.ENOTCONN, errno.EIO, errno.ENOENT], ids=errno.errorcode.get)
def test_a_mount_that_is_gone_is_named_whatever_failed(
    what: Callable[..., Awaitable[None]], gone: bool, failure: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Files:
        device = 0
        may_be_mapped = True

        def file_of(self, idstr: str) -> tuple[FileRange, str]:
            return PAGE, "/ram/pc.ram"

    def fail(*_: object) -> None:
        raise OSError(failure, "what the kernel says")

    async def main() -> None:
        page_cache = KernelPageCache(Files())  # type: ignore[arg-type]
        monkeypatch.setattr(page_cache, "_fsync", fail)
        monkeypatch.setattr(connection, "evict", fail)
        monkeypatch.setattr(connection, "is_gone", lambda: gone)
        with pytest.raises(OSError, match="taken away by force" if gone else "what the kernel says") as error:
            await what(page_cache, ["pc.ram"])
        assert error.value.errno == (errno.ENOTCONN if gone else failure)

    trio.run(main)


# --- evictions that are no kernel's -------------------------------------------------------------------------

PAGE = FileRange(INODE, 0, PAGE_LENGTH)


async def never(piece: FileRange) -> None:
    await trio.sleep_forever()


def test_writers_that_never_let_go_are_named() -> None:
    """A reader of a page that is evicted just now, again and again, each time too late for the eviction."""

    async def main() -> None:
        async def evict(piece: FileRange) -> None:
            assert attempt.write_comes(PAGE) is None
            await trio.sleep(1)

        attempt = Settling([PAGE], evict, UnderWay())
        with pytest.raises(StateError, match="have kept writing for 20 s") as error:
            await attempt.settle()
        assert error.value.errno == errno.EBUSY
        assert trio.current_time() < 2 * SETTLE_DEADLINE

    run(0, main)


def test_an_eviction_that_never_returns_ends_the_attempt() -> None:
    async def main() -> None:
        attempt = Settling([PAGE], never, UnderWay())
        with pytest.raises(StateError, match="kernel has been busy with the pages of ram/ for 20 s") as error:
            await attempt.settle()
        assert error.value.errno == errno.EBUSY

    run(0, main)


def test_a_write_that_waits_for_the_storage_is_waited_for_until_the_deadline() -> None:
    async def main() -> None:
        async def evict(piece: FileRange) -> None:
            await trio.sleep(0.001)

        under_way = UnderWay()
        under_way.begins("somebody", PAGE, writing=True)
        with pytest.raises(StateError, match="has waited 20 s for the storage"):
            await Settling([PAGE], evict, under_way).settle()

    run(0, main)


@pytest.mark.parametrize("distance", [0, PAGE_LENGTH, 1 << 20, 1 << 30, 1 << 43])
@pytest.mark.parametrize("writing", [True, False])
def test_whatever_is_held_makes_way_for_an_eviction_that_waits_for_it(distance: int, writing: bool) -> None:
    """Nothing depends on knowing which locks the kernel takes for which request."""
    held_at = FileRange(INODE, distance + PAGE_LENGTH, distance + PAGE_LENGTH + 100)

    async def main() -> None:
        answered = trio.Event()

        async def ask() -> None:
            held = attempt.write_comes(held_at) if writing else attempt.read_comes(held_at, for_cache=True)
            assert held is not None
            await held.wait()
            answered.set()

        async def evict(piece: FileRange) -> None:
            if not evicted:
                nursery.start_soon(ask)
                await answered.wait()
            evicted.append(piece)

        evicted: list[FileRange] = []
        attempt = Settling([PAGE], evict, UnderWay())
        async with trio.open_nursery() as nursery:
            await attempt.settle()
        brought_in = [] if writing else [held_at.whole_pages()]
        assert evicted == [PAGE, *brought_in]

    assert run(0, main) < 1


def test_an_eviction_that_fails_lets_everybody_go_on() -> None:
    async def main() -> None:
        async def fail(piece: FileRange) -> None:
            nursery.start_soon(ask)
            await trio.sleep(0.001)
            raise OSError(errno.ENODEV, "the connection is gone")

        async def ask() -> None:
            held = attempt.read_comes(PAGE, for_cache=True)
            assert held is not None
            await held.wait()

        attempt = Settling([PAGE], fail, UnderWay())
        async with trio.open_nursery() as nursery:
            with pytest.raises(OSError, match="the connection is gone"):
                await attempt.settle()
            attempt.release()

    run(0, main)


def test_a_file_of_1_tib_costs_thousands_of_evictions_and_no_million() -> None:
    evicted: list[FileRange] = []

    async def evict(piece: FileRange) -> None:
        evicted.append(piece)
        await trio.lowlevel.checkpoint()

    small, large = FileRange(2, 0, 1 << 21), FileRange(1, 0, 1 << 40)
    run(0, Settling([small, large], evict, UnderWay()).settle)
    assert len(evicted) < 5000
    assert evicted[-1] == small
    starts = [0, *(piece.stop for piece in evicted[:-2])]
    assert [piece.start for piece in evicted[:-1]] == starts
    assert evicted[-2].stop == large.stop


def test_nobody_waits_once_it_is_over() -> None:
    attempt = Settling([PAGE], never, UnderWay())
    attempt.release()
    assert attempt.read_comes(PAGE, for_cache=True) is None
    assert attempt.write_comes(PAGE) is None


# --- ranges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_ranges_are_sets_of_bytes(seed: int) -> None:
    random = Random(seed)

    def any_range() -> FileRange:
        start, stop = sorted(random.sample(range(5 * PAGE_LENGTH), 2))
        return FileRange(random.randint(1, 2), start, stop)

    def content(part: FileRange) -> set[int]:
        return set(range(part.start, part.stop))

    one, other = any_range(), any_range()
    same_file = one.inode == other.inode
    assert one.overlaps(other) == (same_file and bool(content(one) & content(other)))
    assert one.contains(other) == (same_file and content(one) >= content(other))
    touched = {at // PAGE_LENGTH for at in content(one)}
    assert {at // PAGE_LENGTH for at in content(one.whole_pages())} == touched
    assert len(content(one.whole_pages())) == len(touched) * PAGE_LENGTH
    left = [content(part) for part in one.without(other)]
    assert set().union(*left) == (content(one) - content(other) if same_file else content(one))
    filled = [n for n in touched if content(one) >= set(range(n * PAGE_LENGTH, (n + 1) * PAGE_LENGTH))]
    assert len(content(one.filled_pages())) == len(filled) * PAGE_LENGTH
    assert content(one.filled_pages()) <= content(one)


def test_a_range_is_taken_piece_by_piece() -> None:
    ranges = [PAGE, FileRange(INODE, 4 * PAGE_LENGTH, 6 * PAGE_LENGTH + 1)]
    taken = [settling._take(ranges, 2 * PAGE_LENGTH) for _ in range(3)]
    assert [(piece.start, piece.stop) for piece in taken] == [
        (4 * PAGE_LENGTH, 6 * PAGE_LENGTH),
        (6 * PAGE_LENGTH, 6 * PAGE_LENGTH + 1),
        (0, PAGE_LENGTH),
    ]
    assert not ranges
