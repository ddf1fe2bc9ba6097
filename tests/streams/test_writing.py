"""Plain streams that a guest saves: of any mixture of memory, under faults, at limited bandwidth, cancelled."""

import contextlib
import errno
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
import pytest
import trio

from ckptfs.errors import StateError, StorageError
from ckptfs.guest.guest import Guest
from ckptfs.guest.saving import save
from ckptfs.migration.parameters import ZeroPageDetection
from tests.doubles.checkpoints import open_base, ram_of, save_request
from tests.doubles.migration_file import Block, MigrationFile
from tests.doubles.storage import FailingCall, ShortTransfers
from tests.streams.decode import PAGE, decode

PAGE_COUNT = 700
GOLDEN = MigrationFile(
    [
        Block("pc.ram", PAGE_COUNT, {page: b"golden %d" % page for page in range(0, PAGE_COUNT, 3)}),
        Block("vga.vram", 3),
    ]
)


@pytest.fixture
def guest(tmp_path: Path, nothing_stays_open: None) -> Iterator[Guest]:
    """A guest out of a golden checkpoint, to be saved as a plain stream."""
    GOLDEN.write(tmp_path / "golden")
    guest = Guest.incoming(open_base(tmp_path / "golden"))
    guest.settings.set_capability("multifd", False)
    guest.settings.set_capability("mapped-ram", False)
    guest.settings.set_parameter("max-bandwidth", 0)
    yield guest
    guest.close()


async def write_some(guest: Guest, random: Random) -> None:
    """Write pages of all kinds: whole and in part, of zeros too."""
    block = guest.blocks["pc.ram"]
    for _ in range(40):
        length = random.choice([1, PAGE - 1, PAGE, 5 * PAGE])
        data = random.randbytes(length) if random.random() < 0.7 else bytes(length)
        await guest.write(block, random.randrange(block.used_length - length), data)


async def assert_saved(guest: Guest, path: Path, offset: int = 0) -> None:
    """See that a stream has the guest's RAM, each page once."""
    ram = await ram_of(guest)
    for idstr, block in decode(path, offset).blocks.items():
        assert block.ram.tobytes() == ram[idstr]
        assert block.records == dict.fromkeys(range(block.used_length // PAGE), 1)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("detection", ZeroPageDetection)
async def test_any_mixture_of_memory(
    detection: ZeroPageDetection, restored: bool, guest: Guest, tmp_path: Path
) -> None:
    guest.settings.set_parameter("zero-page-detection", detection)
    random = Random(7)
    if restored:
        await guest.restore()
    path = tmp_path / "plain"
    for _ in range(3):
        await write_some(guest, random)
        before = await ram_of(guest)
        await save(guest, save_request(path))
        assert await ram_of(guest) == before
        await assert_saved(guest, path)
    assert guest.migrations.newest.progress.remaining_pages == 0


@pytest.mark.parametrize(("names", "step"), [(("pwritev",), 1), (("pread",), 7)])
async def test_each_call_fails_in_turn(
    names: tuple[str, ...], step: int, guest: Guest, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if names == ("pread",):
        request.getfixturevalue("expect_log")(r"page\(s\) .* can't be read from the checkpoint")
    path, random = tmp_path / "plain", Random(8)
    await save(guest, save_request(path))
    for number in count(1, step):
        await write_some(guest, random)
        former, ram = path.read_bytes(), await ram_of(guest)
        failing = FailingCall(names, number, errno.ENOSPC)
        saved = False
        with failing.installed(), contextlib.suppress(StorageError):
            await save(guest, save_request(path))
            saved = True
        if saved:  # a bad page does not matter where a newer one lies on top of it
            await assert_saved(guest, path)
        else:
            assert path.read_bytes() == former
        assert sorted(os.listdir(tmp_path)) == ["golden", "plain"]
        assert await ram_of(guest) == ram
        await save(guest, save_request(path))
        await assert_saved(guest, path)
        if failing.failed is None:
            break
    assert number > 3


async def test_short_transfers_make_the_same_file(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write_some(guest, Random(9))
    await save(guest, save_request(tmp_path / "plain"))  # which pages are zero is known from here on
    await save(guest, save_request(tmp_path / "faultless"))
    short = ShortTransfers(monkeypatch)
    await save(guest, save_request(tmp_path / "plain"))
    assert len(short.counts) > 20
    monkeypatch.undo()
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "faultless").read_bytes()


async def test_the_bytes_before_the_stream_are_kept(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "plain"
    for _ in range(2):
        await write_some(guest, Random(10))
        await save(guest, save_request(path, 0x1001))
        await assert_saved(guest, path, 0x1001)


async def test_max_bandwidth_is_a_limit(guest: Guest, tmp_path: Path) -> None:
    """Of 5.6 MB at 8 MB/s; a slow machine may take longer."""
    limit = 8_000_000
    await guest.write(guest.blocks["pc.ram"], 0, np.ones(PAGE_COUNT * PAGE, np.uint8).tobytes())
    guest.settings.set_parameter("max-bandwidth", limit)
    await save(guest, save_request(tmp_path / "plain"))
    migration = guest.migrations.newest
    assert migration.active is not None
    assert migration.ended is not None
    length = migration.progress.transferred
    assert length > PAGE_COUNT * PAGE
    # one window of time is free, and what exceeds the credit is owed by whoever comes next: here, nobody
    assert migration.ended - migration.active > (length - (1 << 20)) / limit - 0.1


async def test_a_save_that_is_cancelled_leaves_nothing(guest: Guest, tmp_path: Path) -> None:
    path, before = tmp_path / "plain", await ram_of(guest)
    guest.settings.set_parameter("max-bandwidth", 1)
    refused: list[StateError] = []

    async def cancelled_save() -> None:
        with pytest.raises(StateError) as error:
            await save(guest, save_request(path))
        refused.append(error.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancelled_save)
        while not guest.migrations.newest.progress.transferred:
            await trio.lowlevel.checkpoint()
        assert await guest.migrations.cancel() == "save cancelled"
    assert refused[0].errno == errno.ECANCELED
    assert os.listdir(tmp_path) == ["golden"]
    guest.settings.set_parameter("max-bandwidth", 0)
    await save(guest, save_request(path))
    await assert_saved(guest, path)
    assert await ram_of(guest) == before
