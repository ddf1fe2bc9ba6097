"""Readers, writers and saves at the same time."""

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from ckptfs.errors import StateError, StorageError
from ckptfs.guest.base import BadPagesError
from ckptfs.guest.guest import Guest
from ckptfs.guest.layer import Layer
from ckptfs.guest.saving import save
from tests.doubles.checkpoints import fill, open_base, ram_in, ram_of, save_request
from tests.doubles.held_save import held_save

PAGE = 4096
PAGE_COUNT = 600
RUNS = [(0, 100), (200, 300), (590, 600)]
PAGES = {page: bytes([page % 251 + 1]) * PAGE for run in RUNS for page in range(*run)}
GOLDEN = fill(PAGE_COUNT, PAGES)


class GatedReads:
    """`os.preadv` that waits at a gate while it is shut; ``offsets`` are those of all reads so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offsets: list[int] = []
        self._is_open = True
        self._passing: set[int] = set()
        self._changed = threading.Condition()
        self._arrived = threading.Semaphore(0)
        plain_preadv = os.preadv

        def preadv(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
            self.offsets.append(offset)
            if not self._may_pass(offset):
                self._arrived.release()
                with self._changed:
                    self._changed.wait_for(lambda: self._may_pass(offset))
            return plain_preadv(fd, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", preadv)

    def _may_pass(self, offset: int) -> bool:
        return self._is_open or offset in self._passing

    def shut(self) -> None:
        self._is_open = False

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def let_pass(self, *offsets: int) -> None:
        """Let reads at these offsets pass though it is shut."""
        with self._changed:
            self._passing.update(offsets)
            self._changed.notify_all()

    async def wait_for_reader(self) -> None:
        """Return when one more read waits at the gate."""
        await trio.to_thread.run_sync(self._arrived.acquire)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> GatedReads:
    return GatedReads(monkeypatch)


@pytest.fixture
def guest(golden: Path, reads: GatedReads, nothing_stays_open: None) -> Iterator[Guest]:
    guest = Guest.incoming(open_base(golden, channel_count=2))
    guest.settings.set_capability("multifd", True)
    yield guest
    reads.open()
    guest.close()


def in_background(nursery: trio.Nursery, guest: Guest, block_offset: int, length: int) -> dict[str, bytes]:
    """Start a read; its outcome appears in what is returned."""
    outcome = {}

    async def read() -> None:
        outcome["data"] = bytes(await guest.read(guest.blocks["pc.ram"], block_offset, length))

    nursery.start_soon(read)
    return outcome


# --- readers ----------------------------------------------------------------------------------------------


async def test_readers_of_the_same_pages_share_one_read(guest: Guest, reads: GatedReads) -> None:
    assert guest.base is not None
    reads.shut()
    async with trio.open_nursery() as nursery:
        whole = in_background(nursery, guest, 0, 100 * PAGE)
        await reads.wait_for_reader()
        inside = [in_background(nursery, guest, page * PAGE + 7, 5000) for page in (0, 13, 98)]
        await wait_all_tasks_blocked()
        reads.open()
    assert whole["data"] == GOLDEN[: 100 * PAGE]
    assert [outcome["data"] for outcome in inside] == [
        GOLDEN[page * PAGE + 7 : page * PAGE + 5007] for page in (0, 13, 98)
    ]
    assert guest.base.read_count == 1
    assert guest.base.bytes_read == 100 * PAGE


async def test_a_read_in_the_background_is_urgent_once_a_reader_waits_for_it(
    guest: Guest, reads: GatedReads
) -> None:
    base = guest.base
    assert base is not None
    pages_offset = base.checkpoint.blocks[0].pages_offset
    assert pages_offset is not None
    offsets = {page: pages_offset + page * PAGE for page in (1, 2, 50, 200, 590)}
    reads.shut()
    async with trio.open_nursery() as stuck:
        for page in (1, 2):  # both channels
            in_background(stuck, guest, page * PAGE, PAGE)
            await reads.wait_for_reader()
        async with trio.open_nursery() as nursery:
            for start, stop in ((590, 600), (200, 300)):  # as a save reads
                nursery.start_soon(partial(base.fetch, "pc.ram", start, stop, PAGE, urgent=False))
                await wait_all_tasks_blocked()
            in_background(nursery, guest, 50 * PAGE, PAGE)
            await wait_all_tasks_blocked()
            joined = in_background(nursery, guest, 250 * PAGE, PAGE)
            await wait_all_tasks_blocked()
            reads.offsets.clear()
            reads.let_pass(*(offset for page, offset in offsets.items() if page != 2))
        assert reads.offsets == [offsets[page] for page in (200, 50, 590)]
        assert joined["data"] == PAGES[250]
        reads.open()


async def test_a_run_of_pages_is_one_read_and_holes_are_none(guest: Guest, reads: GatedReads) -> None:
    block = guest.blocks["pc.ram"]
    assert guest.base is not None
    reads.offsets.clear()
    assert await guest.read(block, 90 * PAGE, 120 * PAGE) == GOLDEN[90 * PAGE : 210 * PAGE]
    assert len(reads.offsets) == guest.base.read_count == 2
    assert await guest.read(block, 300 * PAGE, 256 * PAGE) == bytes(256 * PAGE)
    assert guest.base.read_count == 2


async def test_a_reader_does_not_suffer_when_the_one_before_is_cancelled(guest: Guest, reads: GatedReads) -> None:
    reads.shut()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            in_background(nursery, guest, 0, 100 * PAGE)
            await reads.wait_for_reader()
            async with trio.open_nursery() as second:
                second.cancel_scope.shield = True
                outcome = in_background(second, guest, 5 * PAGE, PAGE)
                await wait_all_tasks_blocked()
                scope.cancel()
                await wait_all_tasks_blocked()
                reads.open()
    assert outcome["data"] == GOLDEN[5 * PAGE : 6 * PAGE]


async def test_a_reader_does_not_suffer_from_bad_pages_that_are_not_his(
    guest: Guest, reads: GatedReads, golden: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log(r"pc\.ram: page\(s\) .*299\] can't be read from the checkpoint")
    os.truncate(golden, pages_offset_of(guest) + 250 * PAGE + 100)
    reads.shut()
    async with trio.open_nursery() as nursery:

        async def read(start: int, stop: int) -> None:
            with pytest.raises(BadPagesError) as error:
                await guest.read(guest.blocks["pc.ram"], start * PAGE, (stop - start) * PAGE)
            assert error.value.pages == list(range(250, stop))

        nursery.start_soon(read, 200, 300)
        await reads.wait_for_reader()
        outcome = in_background(nursery, guest, 210 * PAGE, 10 * PAGE)
        nursery.start_soon(read, 249, 251)  # one of the two is
        await wait_all_tasks_blocked()
        reads.open()
    assert outcome["data"] == GOLDEN[210 * PAGE : 220 * PAGE]
    assert {page for _, page in guest.readers.bad_pages} == set(range(250, 300))


def pages_offset_of(guest: Guest) -> int:
    assert guest.base is not None
    (block,) = guest.base.checkpoint.blocks
    assert block.pages_offset is not None
    return block.pages_offset


async def test_a_read_that_is_overtaken_by_a_write_is_the_written(guest: Guest, reads: GatedReads) -> None:
    block = guest.blocks["pc.ram"]
    reads.shut()
    async with trio.open_nursery() as nursery:
        outcome = in_background(nursery, guest, 10 * PAGE, 3 * PAGE)
        await reads.wait_for_reader()
        await guest.write(block, 11 * PAGE, b"w" * PAGE)
        reads.open()
    assert outcome["data"] == GOLDEN[10 * PAGE : 11 * PAGE] + b"w" * PAGE + GOLDEN[12 * PAGE : 13 * PAGE]
    # nobody else got the written page as the base's
    await guest.reset()
    assert await guest.read(block, 10 * PAGE, 3 * PAGE) == GOLDEN[10 * PAGE : 13 * PAGE]


async def test_writers_of_one_page_all_count(guest: Guest, reads: GatedReads) -> None:
    block = guest.blocks["pc.ram"]
    reads.shut()
    async with trio.open_nursery() as nursery:
        for byte in range(16):
            nursery.start_soon(guest.write, block, 7 * PAGE + 256 * byte, bytes([byte]) * 100)
        await reads.wait_for_reader()
        await wait_all_tasks_blocked()
        reads.open()
    expected = bytearray(GOLDEN[7 * PAGE : 8 * PAGE])
    for byte in range(16):
        expected[256 * byte : 256 * byte + 100] = bytes([byte]) * 100
    assert await guest.read(block, 7 * PAGE, PAGE) == expected


# --- saves ------------------------------------------------------------------------------------------------


async def test_a_save_is_ram_at_one_moment_whatever_is_written_meanwhile(guest: Guest, tmp_path: Path) -> None:
    block, random = guest.blocks["pc.ram"], Random(3)
    ram = bytearray(GOLDEN)

    async def write_something() -> None:
        block_offset = random.randrange(len(ram) - 1)
        data = random.randbytes(min(random.choice([1, 100, PAGE, 20 * PAGE]), len(ram) - block_offset))
        await guest.write(block, block_offset, data)
        ram[block_offset : block_offset + len(data)] = data

    for number in range(5):
        for _ in range(20):
            await write_something()
        path = tmp_path / str(number)
        at_the_moment = bytes(ram)
        async with held_save(guest, save_request(path)) as held:
            held.go_on()
            while held.outcome is None:
                assert held.error is None
                await write_something()
                await trio.lowlevel.checkpoint()
        assert ram_in(path)["pc.ram"] == at_the_moment
        assert (await ram_of(guest))["pc.ram"] == ram


async def test_a_failed_save_moves_back_what_is_being_written(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptfs.guest.layer._MOVE_LENGTH", 8 * PAGE)  # in many steps
    block, random = guest.blocks["pc.ram"], Random(4)
    ram = bytearray(GOLDEN)
    written: set[int] = set()

    async def write(page: int) -> None:
        data = random.randbytes(PAGE)
        await guest.write(block, page * PAGE, data)
        ram[page * PAGE : (page + 1) * PAGE] = data
        written.add(page)

    for page in range(0, 600, 7):
        await write(page)
    async with held_save(guest, save_request(tmp_path / "checkpoint")) as held:
        for page in range(0, 600, 3):
            await write(page)
        held.fails = True
        held.go_on()
        while held.error is None:
            await write(random.randrange(600))
            await trio.lowlevel.checkpoint()
    assert len(block.stack.written) == 1
    assert (await ram_of(guest))["pc.ram"] == ram
    assert {page for page in range(600) if block.written.test(page)} == written


async def test_a_page_that_is_filled_while_an_epoch_begins_is_in_both(
    guest: Guest, reads: GatedReads, tmp_path: Path
) -> None:
    """The fill of a page that is written in part was begun below the epoch, and ends above it."""
    block = guest.blocks["pc.ram"]
    reads.shut()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.write, block, 5 * PAGE + 10, b"in part")
        await reads.wait_for_reader()
        async with held_save(guest, save_request(tmp_path / "checkpoint")) as held:
            reads.open()
            while not block.written.test(5):
                await trio.lowlevel.checkpoint()
    assert held.error is None
    expected = bytearray(GOLDEN)
    assert ram_in(tmp_path / "checkpoint")["pc.ram"] == expected
    expected[5 * PAGE + 10 : 5 * PAGE + 17] = b"in part"
    assert (await ram_of(guest))["pc.ram"] == expected


async def test_the_newer_of_two_writes_of_a_page_comes_last(guest: Guest, reads: GatedReads) -> None:
    """The older one waits for the rest of its page, which is in the base."""
    block = guest.blocks["pc.ram"]
    reads.shut()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.write, block, 5 * PAGE + 10, b"older " * 4)
        await reads.wait_for_reader()
        nursery.start_soon(guest.write, block, 5 * PAGE + 16, b"newer")
        await wait_all_tasks_blocked()
        nursery.start_soon(guest.write, block, 5 * PAGE + 18, b"NEWEST")
        await wait_all_tasks_blocked()
        reads.open()
    assert bytes(await guest.read(block, 5 * PAGE + 10, 24)) == b"older neNEWEST" + (b"older " * 4)[14:]


async def test_the_pages_that_a_write_fills_do_not_wait_for_its_edge(
    guest: Guest, reads: GatedReads, tmp_path: Path
) -> None:
    """Whoever has them mapped sees them in the kernel's cache before the write comes here."""
    block = guest.blocks["pc.ram"]
    reads.shut()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.write, block, 4 * PAGE, b"w" * (PAGE + 1))
        await reads.wait_for_reader()
        epoch = guest.freeze(guest.blocks)
        assert bytes(epoch.stacks["pc.ram"].written[0].view(4, 5)) == b"w" * PAGE
        reads.open()
    await guest.thaw()
    assert bytes(await guest.read(block, 4 * PAGE, PAGE + 1)) == b"w" * (PAGE + 1)


async def test_nothing_waits_for_the_kernel_to_write_back_what_stop_holds(guest: Guest) -> None:
    await guest.hold_writers()
    with pytest.raises(StateError, match=r"are held back \(stop\)"):
        await guest.flush(["pc.ram"])
    guest.let_writers_go()
    await guest.flush(["pc.ram"])


@pytest.mark.parametrize("attempt", range(8))  # trio wakes tasks in random order
async def test_writes_that_were_held_go_on_in_their_order(guest: Guest, attempt: int) -> None:
    block = guest.blocks["pc.ram"]
    await guest.hold_writers()
    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(guest.write, block, 5 * PAGE + 100 * number, bytes([number + 1]) * PAGE)
            await wait_all_tasks_blocked()
        guest.let_writers_go()
    content = bytes(await guest.read(block, 5 * PAGE, PAGE + 500))
    assert content == b"".join(bytes([n]) * 100 for n in range(1, 6)) + bytes([6]) * PAGE


async def test_a_read_during_a_whole_save_is_not_the_former_base(
    guest: Guest, reads: GatedReads, tmp_path: Path
) -> None:
    """A page that was in a layer when the read began is in the new base alone when it ends."""
    block = guest.blocks["pc.ram"]
    for start, stop in [(0, 5), (6, 100), *RUNS[1:]]:
        await guest.write(block, start * PAGE, b"w" * (stop - start) * PAGE)
    reads.shut()
    async with trio.open_nursery() as nursery:
        outcome = in_background(nursery, guest, 4 * PAGE, 3 * PAGE)
        await reads.wait_for_reader()
        await guest.write(block, 5 * PAGE, b"v" * PAGE)
        await save(guest, save_request(tmp_path / "checkpoint"))
        reads.open()
    assert outcome["data"] == b"w" * PAGE + b"v" * PAGE + b"w" * PAGE


async def test_a_reader_in_line_when_a_save_ends_is_served_from_the_new_base(
    guest: Guest, reads: GatedReads, tmp_path: Path
) -> None:
    block = guest.blocks["pc.ram"]
    reads.shut()
    async with trio.open_nursery() as nursery:
        first = [in_background(nursery, guest, page * PAGE, PAGE) for page in (1, 2)]  # both channels
        await reads.wait_for_reader()
        await reads.wait_for_reader()
        waiting = in_background(nursery, guest, 3 * PAGE, PAGE)
        await wait_all_tasks_blocked()
        for start, stop in RUNS:
            await guest.write(block, start * PAGE, GOLDEN[start * PAGE : stop * PAGE])
        await save(guest, save_request(tmp_path / "checkpoint"))
        reads.open()
    assert [outcome["data"] for outcome in [*first, waiting]] == [PAGES[page] for page in (1, 2, 3)]


async def test_a_cancelled_save_leaves_everything_as_it_was(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptfs.guest.layer._MOVE_LENGTH", 8 * PAGE)  # in many steps
    path = tmp_path / "checkpoint"
    block = guest.blocks["pc.ram"]
    await save(guest, save_request(path))
    former = path.read_bytes()
    await guest.write(block, 50 * PAGE, b"written")
    async with held_save(guest, save_request(path)) as held:
        await guest.write(block, 60 * PAGE, b"meanwhile" * 20 * PAGE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.migrations.cancel)
            await wait_all_tasks_blocked()
            held.go_on()
    assert isinstance(held.error, StateError)
    assert "the save was cancelled" in str(held.error)
    assert path.read_bytes() == former
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "golden"]
    assert len(block.stack.written) == 1
    expected = bytearray(GOLDEN)
    expected[50 * PAGE : 50 * PAGE + 7] = b"written"
    expected[60 * PAGE : 240 * PAGE] = b"meanwhile" * 20 * PAGE
    assert (await ram_of(guest))["pc.ram"] == expected
    await save(guest, save_request(path))
    assert ram_in(path)["pc.ram"] == expected


async def test_a_reader_does_not_suffer_when_the_save_before_is_cancelled(
    guest: Guest, reads: GatedReads, tmp_path: Path
) -> None:
    """The save reads a page for itself, a reader waits for the same read: only the save is cancelled."""
    reads.shut()
    async with trio.open_nursery() as nursery:

        async def cancelled_save() -> None:
            with pytest.raises(StateError, match="cancelled"):
                await save(guest, save_request(tmp_path / "checkpoint"))

        nursery.start_soon(cancelled_save)
        await reads.wait_for_reader()
        outcome = in_background(nursery, guest, 5 * PAGE, PAGE)
        await wait_all_tasks_blocked()
        await guest.migrations.cancel()
        reads.open()
    assert outcome["data"] == GOLDEN[5 * PAGE : 6 * PAGE]


# --- restore ----------------------------------------------------------------------------------------------


async def test_a_reader_goes_before_a_restore(guest: Guest, reads: GatedReads) -> None:
    offsets = {page: pages_offset_of(guest) + page * PAGE for page in (0, 1, 200, 250, 256, 590)}
    reads.shut()
    async with trio.open_nursery() as nursery:
        for page in (1, 2):  # both channels
            in_background(nursery, guest, page * PAGE, PAGE)
            await reads.wait_for_reader()
        nursery.start_soon(guest.restore)
        await wait_all_tasks_blocked()
        reader = in_background(nursery, guest, 250 * PAGE, PAGE)
        await wait_all_tasks_blocked()
        reads.offsets.clear()
        reads.let_pass(*offsets.values())
        while not reader:
            await trio.lowlevel.checkpoint()
        assert reads.offsets[0] == offsets[250]
        reads.open()
    assert reader["data"] == PAGES[250]


async def test_a_reader_in_line_when_a_restore_ends_is_served_from_memory(guest: Guest, reads: GatedReads) -> None:
    guest.settings.set_parameter("multifd-channels", 1)
    first = pages_offset_of(guest)
    reads.shut()
    reads.let_pass(first, first + 200 * PAGE, first + 256 * PAGE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.restore)
        await reads.wait_for_reader()  # it is at the last window
        outcomes = [in_background(nursery, guest, page * PAGE, PAGE) for page in range(591, 597)]
        await wait_all_tasks_blocked()
        reads.let_pass(first + 590 * PAGE)
        while not guest.restored:
            await trio.lowlevel.checkpoint()
        reads.open()
    assert [outcome["data"] for outcome in outcomes] == [PAGES[page] for page in range(591, 597)]


async def test_a_restored_guest_needs_no_file(guest: Guest, golden: Path) -> None:
    await guest.restore()
    os.unlink(golden)
    block = guest.blocks["pc.ram"]
    assert (await ram_of(guest))["pc.ram"] == GOLDEN
    await guest.write(block, 150 * PAGE + 1, b"into a hole")
    expected = bytearray(GOLDEN)
    expected[150 * PAGE + 1 : 150 * PAGE + 12] = b"into a hole"
    assert (await ram_of(guest))["pc.ram"] == expected


# --- what is not needed any more --------------------------------------------------------------------------


@pytest.fixture
def closers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that closed layers with pages in them."""
    closers = []
    close = Layer.close

    def noted(layer: Layer) -> None:
        if layer.present.any(0, layer.present.page_count):
            closers.append(threading.current_thread().name)
        close(layer)

    monkeypatch.setattr(Layer, "close", noted)
    return closers


@pytest.mark.parametrize("restored", [False, True])
async def test_memory_is_given_back_in_worker_threads(
    restored: bool, guest: Guest, tmp_path: Path, closers: list[str]
) -> None:
    # Gigabytes take a second, and nobody could read a page meanwhile.
    if restored:
        await guest.restore()
    for give_back in (partial(save, guest, save_request(tmp_path / "checkpoint")), guest.reset):
        await guest.write(guest.blocks["pc.ram"], 0, bytes(300 * PAGE))
        closers.clear()
        await give_back()
        assert closers or restored, give_back
        assert threading.main_thread().name not in closers, give_back


# --- one migration at a time ------------------------------------------------------------------------------


async def test_a_second_migration_is_refused(guest: Guest, tmp_path: Path) -> None:
    async with held_save(guest, save_request(tmp_path / "checkpoint")) as held:
        for migration in (save(guest, save_request(tmp_path / "other")), guest.restore()):
            with pytest.raises(StateError, match="a save is running: wait for it, or cancel it"):
                await migration
        with pytest.raises(StateError, match="a save is running"):
            await guest.reset()
    assert held.error is None
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "golden"]


async def test_writers_that_are_held_wait_and_readers_do_not(guest: Guest, tmp_path: Path) -> None:
    block = guest.blocks["pc.ram"]
    await guest.hold_writers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.write, block, 100, b"later")  # the rest of the page is not to be lost
        await wait_all_tasks_blocked()
        assert await guest.read(block, 0, PAGE) == GOLDEN[:PAGE]
        await save(guest, save_request(tmp_path / "checkpoint"))
        guest.let_writers_go()
    assert ram_in(tmp_path / "checkpoint")["pc.ram"] == GOLDEN
    assert (await ram_of(guest))["pc.ram"] == GOLDEN[:100] + b"later" + GOLDEN[105:]


async def test_a_backing_storage_that_gives_no_answer_is_an_error_for_all_who_wait(
    golden: Path, reads: GatedReads, expect_log: Callable[[str], None], nothing_stays_open: None
) -> None:
    expect_log(r"ERROR ckptfs\.channels\.channels: .*/golden: the storage has not answered for 0.05 s")
    expect_log(r"ERROR ckptfs\.guest\.base: pc\.ram: pages 0 to 0 can't be read from the checkpoint: .* no answer")
    guest = Guest.incoming(open_base(golden, channel_count=2, deadline=0.05))
    reads.shut()
    errors = []
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(StorageError, match="no answer") as error:
                await guest.read(guest.blocks["pc.ram"], 0, PAGE)
            errors.append(error.value)

        nursery.start_soon(read)
        nursery.start_soon(read)
    assert len(errors) == 2
    assert len(reads.offsets) == 1
    reads.open()
    guest.close()
