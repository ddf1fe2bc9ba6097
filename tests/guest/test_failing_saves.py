"""Each call of a save fails in its turn: the former checkpoint is whole, RAM goes on, nothing is left over."""

import errno
import gc
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from random import Random

import pytest
import trio

from ckptfs.errors import StateError, StorageError
from ckptfs.guest import saving
from ckptfs.guest.block import PageStack, PageState
from ckptfs.guest.guest import Guest
from ckptfs.guest.layer import Layer
from ckptfs.guest.outgoing import Epoch
from ckptfs.guest.saving import SaveRequest, save
from ckptfs.mapped_ram.layout import Image, empty_image
from tests.doubles.checkpoints import open_base, ram_in, ram_of, save_request
from tests.doubles.held_save import held_save
from tests.doubles.storage import FailingCall, ShortTransfers, open_descriptors

PAGE = 4096
PAGE_COUNT = 300
"""Two windows of 1 MiB: two payloads."""

RUNS = [(0, 20), (40, 41), (100, 110), (250, 262), (299, 300)]
PAGES = {page: Random(page).randbytes(PAGE) for run in RUNS for page in range(*run)}


async def fresh(golden: Path) -> Guest:
    del golden
    return Guest.fresh([("pc.ram", PAGE_COUNT * PAGE)])


async def incoming(golden: Path) -> Guest:
    return Guest.incoming(open_base(golden))


async def restored(golden: Path) -> Guest:
    guest = await incoming(golden)
    await guest.restore()
    return guest


Maker = Callable[[Path], Awaitable[Guest]]


class World:
    """A guest, the file that it is saved to, and what RAM should hold."""

    def __init__(self, guest: Guest, directory: Path) -> None:
        self.guest = guest
        guest.settings.set_capability("multifd", True)
        self.path = directory / "checkpoint"
        self._random = Random(1)
        self.ram = b""

    async def write(self) -> None:
        """Write into some pages, in whole and in part."""
        block = self.guest.blocks["pc.ram"]
        for length in (PAGE, 5, 30 * PAGE):
            block_offset = self._random.randrange(PAGE_COUNT * PAGE - length)
            await self.guest.write(block, block_offset, self._random.randbytes(length))
        self.ram = (await ram_of(self.guest))["pc.ram"]

    async def save(self) -> None:
        await save(self.guest, save_request(self.path))
        assert ram_in(self.path)["pc.ram"] == self.ram

    def layers(self) -> int:
        return len(self.guest.blocks["pc.ram"].stack.layers)


MakeWorld = Callable[[Maker], Awaitable[World]]


@pytest.fixture
def make_world(directory: Path, golden: Path, nothing_stays_open: None) -> Iterator[MakeWorld]:
    """`await make_world(incoming)`; in the end nothing stays open."""
    worlds = []

    async def make_world(make: Maker) -> World:
        worlds.append(World(await make(golden), directory))
        await worlds[-1].write()
        return worlds[-1]

    yield make_world
    for world in worlds:
        world.guest.close()


async def wait_until_so_many_are_open(number: int) -> None:
    """The same for descriptors that get other numbers."""
    with trio.fail_after(60):
        while len(open_descriptors()) != number:
            gc.collect()
            await trio.lowlevel.checkpoint()


CALLS = [
    (("pwritev",), errno.ENOSPC),
    (("pwritev",), errno.EINTR),
    (("pwrite",), errno.ENOSPC),
    (("preadv", "pread"), errno.EIO),
    (("fdatasync",), errno.EIO),
    (("rename",), errno.EACCES),
    (("open",), errno.EMFILE),
    (("dup",), errno.EMFILE),
    (("memfd_create", "ftruncate"), errno.ENOMEM),
    (("stat", "fstat", "listdir"), errno.EIO),
]


@pytest.mark.parametrize("make", [fresh, incoming, restored])
@pytest.mark.parametrize(
    ("calls", "error"), CALLS, ids=["-".join((*calls, errno.errorcode[e])) for calls, e in CALLS]
)
async def test_each_call_of_a_save_fails(
    directory: Path,
    make_world: MakeWorld,
    make: Maker,
    calls: tuple[str, ...],
    error: int,
    request: pytest.FixtureRequest,
) -> None:
    if "preadv" in calls and make is not restored:
        request.getfixturevalue("expect_log")(r"page\(s\) .* can't be read from the checkpoint")
    if "pwrite" in calls and make is restored:
        request.getfixturevalue("expect_log")("RAM is no longer all in memory: No space left on device")
    world = await make_world(make)
    await world.save()
    open_before, layers_before = len(open_descriptors()), world.layers()
    for number in count(1):
        await world.write()
        former = world.path.read_bytes()
        noticed = None
        with FailingCall(calls, number, error).installed() as failing:
            try:
                await save(world.guest, save_request(world.path))
            except StorageError as problem:
                noticed = problem.errno
        if noticed is None:
            assert ram_in(world.path)["pc.ram"] == world.ram
        else:
            assert noticed in (error, errno.EIO)
            assert world.path.read_bytes() == former
        assert os.listdir(directory) == ["checkpoint"]
        assert (await ram_of(world.guest))["pc.ram"] == world.ram
        if make is restored and not world.guest.restored:
            await world.guest.restore()  # there was no memory to keep it all
        await wait_until_so_many_are_open(open_before)
        assert world.layers() == layers_before
        await world.save()
        await wait_until_so_many_are_open(open_before)
        assert world.layers() == layers_before
        if failing.failed is None:
            break


@pytest.mark.parametrize("make", [fresh, incoming, restored])
async def test_each_layer_of_a_live_save_fails(
    directory: Path, make_world: MakeWorld, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine hands over a block that the mount has, and one that it has not."""
    world = await make_world(make)
    guest = world.guest
    handed_over = {"pc.ram": bytes([1]) * PAGE_COUNT * PAGE, "vga.vram": bytes([2]) * 16 * PAGE}

    async def begin_epoch(guest: Guest, request: SaveRequest) -> tuple[Epoch, Image]:
        del request
        epoch = guest.freeze(idstr for idstr in guest.blocks if idstr not in handed_over)
        stacks = {}
        for idstr, content in handed_over.items():
            layer = Layer(idstr, len(content) // PAGE, PAGE)
            layer.store(0, content)
            stacks[idstr] = PageStack(len(content) // PAGE, (layer,), None, None)
        blocks = [(idstr, len(content)) for idstr, content in (await ram_of(guest) | handed_over).items()]
        return Epoch(epoch.stacks | stacks, guest.base, frozenset(stacks)), empty_image(blocks)

    monkeypatch.setattr(saving, "_begin_epoch", begin_epoch)  # as QEMU would give it
    world.ram = (await ram_of(guest))["pc.ram"]
    for number in count(3):  # the first two are the machine's
        before = await ram_of(guest)
        with FailingCall(("memfd_create",), number, errno.EMFILE).installed() as failing:
            try:
                await save(guest, save_request(world.path))
            except StorageError as error:
                noticed = error.errno
            else:
                noticed = None
        if failing.failed is None:
            break
        assert noticed == errno.EMFILE
        assert os.listdir(directory) == []
        assert await ram_of(guest) == before
    assert number > 3
    state = PageState.READ if make is restored else PageState.IN_CHECKPOINT  # until somebody reads them
    for idstr in handed_over:
        block = guest.blocks[idstr]
        assert set(block.page_states(0, block.page_count)) == {state.value}
    assert await ram_of(guest) == ram_in(world.path) == handed_over
    await guest.write(guest.blocks["vga.vram"], 5, b"written")
    assert bytes(await guest.read(guest.blocks["vga.vram"], 0, 13)) == b"\2" * 5 + b"written" + b"\2"


async def test_a_name_that_may_be_lost_is_an_error(directory: Path, make_world: MakeWorld) -> None:
    """The directory can't be synced after the rename: the new checkpoint is there and whole, but not for sure."""
    world = await make_world(incoming)
    await world.save()
    before = len(open_descriptors())
    await world.write()
    text = f"{world.path}: the new checkpoint is in place"
    with FailingCall(("fsync",), 1, errno.EIO).installed(), pytest.raises(StorageError, match=text):
        await save(world.guest, save_request(world.path))
    assert ram_in(world.path)["pc.ram"] == world.ram
    assert os.listdir(directory) == ["checkpoint"]
    await wait_until_so_many_are_open(before)
    await world.write()
    await world.save()


@pytest.mark.parametrize(("granularity", "direct_io"), [(1, False), (1000, False), (4096, True)])
async def test_short_reads_and_writes_make_the_same_file(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, granularity: int, direct_io: bool
) -> None:
    world = await make_world(incoming)
    world.guest.settings.set_parameter("direct-io", direct_io)
    await world.save()
    faultless = world.path.read_bytes()
    short = ShortTransfers(monkeypatch, granularity)
    await save(world.guest, save_request(world.path))
    assert len(short.counts) > 40
    monkeypatch.undo()
    assert world.path.read_bytes() == faultless


async def test_a_failed_save_of_what_is_written_meanwhile(directory: Path, make_world: MakeWorld) -> None:
    world = await make_world(incoming)
    await world.save()
    for _ in range(3):
        former = world.path.read_bytes()
        async with held_save(world.guest, save_request(world.path)) as held:
            await world.write()
            held.fails = True
        assert isinstance(held.error, StorageError)
        assert held.error.errno == errno.ENOSPC
        assert world.path.read_bytes() == former
        assert os.listdir(directory) == ["checkpoint"]
        assert (await ram_of(world.guest))["pc.ram"] == world.ram
        assert world.layers() == 1
    await world.save()


async def test_a_place_that_is_refused_costs_nothing(directory: Path, make_world: MakeWorld) -> None:
    world = await make_world(incoming)
    before = len(open_descriptors())
    for path in (directory / "missing" / "checkpoint", directory):
        with pytest.raises(Exception, match=str(path)):
            await save(world.guest, save_request(path))
        await wait_until_so_many_are_open(before)
        assert world.layers() == 1
    await world.save()


async def test_what_is_not_permitted_at_the_end_is_not_published(tmp_path: Path) -> None:
    """As when a lease is lost while the save runs."""
    guest = await fresh(tmp_path)
    await save(guest, save_request(tmp_path / "checkpoint"))
    former = (tmp_path / "checkpoint").read_bytes()
    await guest.write(guest.blocks["pc.ram"], 0, b"A" * PAGE)

    def refuse() -> None:
        raise StateError("the lease is lost")

    with pytest.raises(StateError, match="the lease is lost"):
        await save(guest, replace(save_request(tmp_path / "checkpoint"), permit=refuse))
    assert (tmp_path / "checkpoint").read_bytes() == former
    assert os.listdir(tmp_path) == ["checkpoint"]
