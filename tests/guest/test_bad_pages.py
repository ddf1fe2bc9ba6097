"""Pages that are in the checkpoint and can't be read: EIO for them alone, and never zeros."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptfs.errors import StorageError
from ckptfs.guest.base import BadPagesError
from ckptfs.guest.guest import Guest
from ckptfs.guest.saving import save
from tests.doubles.checkpoints import fill, open_base, ram_in, ram_of, save_request

PAGE = 4096
PAGE_COUNT = 64
PAGES = {page: bytes([page + 1]) * PAGE for page in [*range(10), *range(20, 30), 40]}
GOLDEN = fill(PAGE_COUNT, PAGES)


class BadSectors:
    """`os.preadv` with pages of the block that give EIO; a read that reaches one gives it as a whole."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pages: set[int] = set()
        self.pages_offset = 0
        plain_preadv = os.preadv

        def preadv(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
            start = (offset - self.pages_offset) // PAGE
            stop = -(-(offset - self.pages_offset + sum(map(len, buffers))) // PAGE)
            if self.pages & set(range(start, stop)):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return plain_preadv(fd, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", preadv)


@pytest.fixture
def bad_sectors(monkeypatch: pytest.MonkeyPatch) -> BadSectors:
    return BadSectors(monkeypatch)


@pytest.fixture
def guest(golden: Path, bad_sectors: BadSectors, nothing_stays_open: None) -> Iterator[Guest]:
    guest = Guest.incoming(open_base(golden))
    assert guest.base is not None
    (block,) = guest.base.checkpoint.blocks
    assert block.pages_offset is not None
    bad_sectors.pages_offset = block.pages_offset
    yield guest
    guest.close()


@pytest.fixture(autouse=True)
def _expected(expect_log: Callable[[str], None]) -> None:
    expect_log(r"ERROR ckptfs\.guest\.base: pc\.ram: page\(s\) \[.*\] can't be read from the checkpoint: ")


async def read(guest: Guest, start: int, stop: int) -> bytes:
    return bytes(await guest.read(guest.blocks["pc.ram"], start * PAGE, (stop - start) * PAGE))


async def bad_pages_in(guest: Guest, start: int, stop: int) -> list[int]:
    with pytest.raises(BadPagesError, match=r"pc\.ram: page .* can't be read: ") as error:
        await read(guest, start, stop)
    assert error.value.errno == errno.EIO
    assert error.value.idstr == "pc.ram"
    return error.value.pages


async def test_each_page_is_good_or_bad_by_itself(guest: Guest, bad_sectors: BadSectors) -> None:
    bad_sectors.pages = {3, 7, 21, 40}
    for page in range(64):
        if page in bad_sectors.pages:
            assert await bad_pages_in(guest, page, page + 1) == [page]
        else:
            assert await read(guest, page, page + 1) == GOLDEN[page * PAGE : (page + 1) * PAGE]
    assert set(guest.readers.bad_pages) == {("pc.ram", page) for page in bad_sectors.pages}
    assert guest.readers.bad_pages["pc.ram", 7] == "pc.ram: page 7 can't be read: [Errno 5] Input/output error"


async def test_a_long_read_names_all_that_are_bad(guest: Guest, bad_sectors: BadSectors) -> None:
    bad_sectors.pages = {3, 7, 21, 40}
    assert await bad_pages_in(guest, 0, 64) == [3, 7, 21, 40]
    assert await bad_pages_in(guest, 5, 20) == [7]
    assert await read(guest, 8, 21) == GOLDEN[8 * PAGE : 21 * PAGE]


@pytest.mark.parametrize("inside", [0, 1, 700])
async def test_pages_that_were_cut_off_are_bad_and_not_zero(guest: Guest, golden: Path, inside: int) -> None:
    assert guest.base is not None
    pages_offset = guest.base.checkpoint.blocks[0].pages_offset
    assert pages_offset is not None
    os.truncate(golden, pages_offset + 25 * PAGE + inside)
    assert await bad_pages_in(guest, 0, 64) == [25, 26, 27, 28, 29, 40]
    assert await read(guest, 0, 25) == GOLDEN[: 25 * PAGE]
    assert await read(guest, 30, 40) == bytes(10 * PAGE)


async def test_a_page_that_becomes_good_again_is_read(guest: Guest, bad_sectors: BadSectors) -> None:
    bad_sectors.pages = {5}
    assert await bad_pages_in(guest, 5, 6) == [5]
    bad_sectors.pages = set()
    assert await read(guest, 5, 6) == PAGES[5]


async def test_no_more_bad_pages_are_kept_than_that(guest: Guest, bad_sectors: BadSectors) -> None:
    guest.readers.note_bad_pages(BadPagesError("other", dict.fromkeys(range(62), "")))
    bad_sectors.pages = {1, 2, 3, 4}
    assert await bad_pages_in(guest, 0, 10) == [1, 2, 3, 4]
    assert len(guest.readers.bad_pages) == 64


async def test_a_bad_page_can_be_written_only_as_a_whole(guest: Guest, bad_sectors: BadSectors) -> None:
    block = guest.blocks["pc.ram"]
    bad_sectors.pages = {4}
    with pytest.raises(BadPagesError, match="page 4 can't be read"):
        await guest.write(block, 4 * PAGE + 100, b"in part")
    with pytest.raises(BadPagesError, match="page 4 can't be read"):
        await guest.write(block, 2 * PAGE, bytes(2 * PAGE + 1))
    assert not block.written.any(4, 5)
    assert await read(guest, 2, 4) == bytes(2 * PAGE)  # written as a whole, and seen before the rest has failed
    await guest.write(block, 4 * PAGE, b"w" * PAGE)
    assert await read(guest, 4, 5) == b"w" * PAGE


async def test_a_bad_page_that_was_written_harms_nobody(
    guest: Guest, bad_sectors: BadSectors, tmp_path: Path
) -> None:
    bad_sectors.pages = {4, 21}
    for page in bad_sectors.pages:
        await guest.write(guest.blocks["pc.ram"], page * PAGE, b"w" * PAGE)
    expected = fill(64, {**PAGES, 4: b"w" * PAGE, 21: b"w" * PAGE})
    assert (await ram_of(guest))["pc.ram"] == expected
    assert not guest.readers.bad_pages
    await save(guest, save_request(tmp_path / "checkpoint"))
    assert ram_in(tmp_path / "checkpoint")["pc.ram"] == expected


async def test_a_bad_page_beside_one_that_was_written_is_still_bad(
    guest: Guest, bad_sectors: BadSectors, tmp_path: Path
) -> None:
    bad_sectors.pages = {4, 6}
    await guest.write(guest.blocks["pc.ram"], 4 * PAGE, b"w" * PAGE)
    assert 6 in await bad_pages_in(guest, 0, 10)
    assert ("pc.ram", 6) in guest.readers.bad_pages
    with pytest.raises(BadPagesError, match=r"pc\.ram: page .*6 can't be read"):
        await save(guest, save_request(tmp_path / "checkpoint"))
    assert os.listdir(tmp_path) == ["golden"]
    await guest.write(guest.blocks["pc.ram"], 6 * PAGE, b"w" * PAGE)
    assert await read(guest, 4, 7) == b"w" * PAGE + PAGES[5] + b"w" * PAGE


async def test_bad_pages_can_not_be_saved(guest: Guest, bad_sectors: BadSectors, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    await save(guest, save_request(path))
    former = path.read_bytes()
    assert guest.base is not None
    bad_sectors.pages_offset = guest.base.checkpoint.blocks[0].pages_offset or 0
    bad_sectors.pages = {25}
    await guest.write(guest.blocks["pc.ram"], 0, b"written")
    with pytest.raises(StorageError, match=r"pc\.ram: page 25 can't be read"):
        await save(guest, save_request(path))
    assert path.read_bytes() == former
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "golden"]
    assert await read(guest, 0, 10) == b"written" + GOLDEN[7 : 10 * PAGE]
    bad_sectors.pages = set()
    await save(guest, save_request(path))
    assert ram_in(path)["pc.ram"] == b"written" + GOLDEN[7:]


async def test_bad_pages_can_not_be_restored_but_all_others_serve_on(guest: Guest, bad_sectors: BadSectors) -> None:
    bad_sectors.pages = {25}
    with pytest.raises(StorageError, match=r"pc\.ram: page 25 can't be read"):
        await guest.restore()
    assert not guest.restored
    assert await read(guest, 0, 25) == GOLDEN[: 25 * PAGE]
    assert await bad_pages_in(guest, 24, 27) == [25]
    bad_sectors.pages = set()
    await guest.restore()
    assert (await ram_of(guest))["pc.ram"] == GOLDEN
