"""Checksums of what was saved: whatever is damaged afterwards is found, by `verify` and by reading with verify."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptfs.channels.backing_file import DirectIO, OpenedFile
from ckptfs.channels.opened import open_file
from ckptfs.channels.verifying import Finding, Verified, verify
from ckptfs.errors import CheckpointError
from ckptfs.guest.base import BadPagesError, Base, BaseOptions
from ckptfs.guest.guest import Guest
from ckptfs.guest.saving import save
from tests.doubles.checkpoints import open_base, ram_in, ram_of, save_request, unsummed, verified

PAGE = 4096
PAGE_COUNT = 1000
"""The last window is no whole one."""

WIDTH = 16


def open_verified(path: Path) -> Base:
    file = OpenedFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), os.O_RDONLY)
    return Base(str(path), file, 0, BaseOptions(DirectIO(False), 2, verify=True))


def flip(path: Path, file_offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(file_offset)
        (byte,) = file.read(1)
        file.seek(file_offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Runs of pages, single ones, pages of zeros between them, and a block of one page."""
    with ThreadPoolExecutor(1) as thread:  # tests that are inside trio.run can't run another in theirs
        thread.submit(trio.run, make, tmp_path / "saved").result()
    return tmp_path / "saved"


async def make(path: Path) -> None:
    guest = Guest.fresh([("pc.ram", PAGE_COUNT * PAGE), ("tiny", PAGE)])
    rng = np.random.default_rng(1)
    for start, stop in ((0, 40), (100, 101), (103, 104), (300, 700), (990, 1000)):
        await guest.write(guest.blocks["pc.ram"], start * PAGE, rng.bytes((stop - start) * PAGE))
    await guest.write(guest.blocks["pc.ram"], 350 * PAGE, bytes(20 * PAGE))
    await guest.write(guest.blocks["tiny"], 0, b"tiny")
    await save(guest, save_request(path))
    guest.close()


def places(path: Path) -> dict[int, int]:
    """File offset of each page of pc.ram with data."""
    with open_file(str(path)) as opened:
        block = opened.checkpoint.blocks[0]
        assert block.pages_offset is not None
        runs = opened.file_bmaps["pc.ram"].runs()
        return {page: block.pages_offset + page * PAGE for run in runs for page in range(*run)}


def test_what_was_saved_is_sound(saved: Path) -> None:
    result = verified(saved)
    assert result.findings == []
    assert result.unknown == 0
    assert result.windows == 3 + 1 + 25 + 2 + 1
    assert result.done == result.total > 0
    assert unsummed(saved) == 0


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_is_found_in_its_window(
    saved: Path, expect_log: Callable[[str], None], data: st.DataObject
) -> None:
    """By `verify`; and a read with verify gives an error there, and nowhere else."""
    expect_log(r"ERROR ckptfs\.guest\.base: pc\.ram: the checksum of pages \d+ to \d+ is wrong")
    pages = places(saved)
    page = data.draw(st.sampled_from(sorted(pages)))
    offset = pages[page] + data.draw(st.integers(0, PAGE - 1))
    window = page // WIDTH * WIDTH
    flip(saved, offset)
    try:
        found = verified(saved).findings
        assert trio.run(refused, saved) == [window for window in range(window, window + WIDTH) if window in pages]
    finally:
        flip(saved, offset)
    assert found == [Finding("pc.ram", window, min(window + WIDTH, PAGE_COUNT), "the checksum is wrong")]
    assert verified(saved).findings == []


async def refused(path: Path) -> list[int]:
    """The pages of pc.ram that can't be read."""
    guest = Guest.incoming(open_verified(path))
    block = guest.blocks["pc.ram"]
    pages = []
    for page in range(PAGE_COUNT):
        try:
            await guest.read(block, page * PAGE, PAGE)
        except BadPagesError:
            pages.append(page)
    guest.close()
    return pages


async def test_a_read_of_a_wrong_window_fails_and_no_other(saved: Path, expect_log: Callable[[str], None]) -> None:
    expect_log(r"ERROR ckptfs\.guest\.base: pc\.ram: the checksum of pages 304 to 319 is wrong")
    expected = ram_in(saved)["pc.ram"]
    flip(saved, places(saved)[310] + 77)
    guest = Guest.incoming(open_verified(saved))
    block = guest.blocks["pc.ram"]
    for page in (*range(303, 321), 999):
        if 304 <= page < 320:
            with pytest.raises(BadPagesError, match="the checksum of pages 304 to 319 is wrong"):
                await guest.read(block, page * PAGE, PAGE)
        else:
            assert await guest.read(block, page * PAGE, PAGE) == expected[page * PAGE : (page + 1) * PAGE]
    assert bytes(await guest.read(block, 304 * PAGE - 1, 1)) == expected[304 * PAGE - 1 : 304 * PAGE]
    with pytest.raises(BadPagesError):
        await guest.read(block, 64 * PAGE, 256 * PAGE)
    with pytest.raises(BadPagesError):
        await guest.restore()
    await guest.write(block, 304 * PAGE, bytes(16 * PAGE))  # what is written anew needs no checksum
    assert await guest.read(block, 304 * PAGE, 16 * PAGE) == bytes(16 * PAGE)
    guest.close()


async def test_all_of_it_read_and_restored_with_verify(saved: Path) -> None:
    guest = Guest.incoming(open_verified(saved))
    assert await ram_of(guest) == ram_in(saved)
    assert guest.base is not None
    assert guest.base.verified_windows == (64, 64)
    await guest.restore()
    assert await ram_of(guest) == ram_in(saved)
    guest.close()


async def test_windows_that_are_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a guest of TiBs has them: a read of 1 MiB may need all of two windows."""
    monkeypatch.setattr("ckptfs.mapped_ram.checksums._MAX_WINDOWS", 1)
    await make(tmp_path / "saved")
    assert unsummed(tmp_path / "saved") == 0
    assert verified(tmp_path / "saved").windows == 4 + 1
    guest = Guest.incoming(open_verified(tmp_path / "saved"))
    expected = ram_in(tmp_path / "saved")["pc.ram"]
    assert await guest.read(guest.blocks["pc.ram"], 128 * PAGE, 256 * PAGE) == expected[128 * PAGE : 384 * PAGE]
    assert await ram_of(guest) == ram_in(tmp_path / "saved")
    await guest.restore()
    assert await ram_of(guest) == ram_in(tmp_path / "saved")
    guest.close()


async def test_a_copy_does_not_make_it_right(saved: Path, tmp_path: Path) -> None:
    flip(saved, places(saved)[310] + 77)
    guest = Guest.incoming(open_base(saved))
    await guest.write(guest.blocks["pc.ram"], 0, b"changed")
    await save(guest, save_request(tmp_path / "copy"))
    guest.close()
    assert verified(tmp_path / "copy").findings == [Finding("pc.ram", 304, 320, "the checksum is wrong")]


@pytest.mark.parametrize("what", ["header", "bitmap", "devices"])
def test_damage_beside_the_pages(saved: Path, what: str) -> None:
    with open_file(str(saved)) as opened:
        block, end = opened.checkpoint.blocks[0], opened.checkpoint.end_offset
    assert block.bitmap_offset is not None
    # a page that becomes zeros, one letter of the machine's name, one of the vmdesc
    flip(saved, {"header": 13, "bitmap": block.bitmap_offset + 60, "devices": end - 20}[what])
    found = [finding for finding in verified(saved).findings if finding.idstr is None]
    assert len(found) == 1
    assert "the checksum is wrong" in found[0].problem
    with pytest.raises(CheckpointError, match="verify=off"):
        open_verified(saved)
    open_base(saved).close()


def test_a_window_that_has_lost_its_data(saved: Path) -> None:
    with open_file(str(saved)) as opened:
        offset = opened.checkpoint.blocks[0].bitmap_offset
    assert offset is not None
    with saved.open("r+b") as file:
        file.seek(offset + 96 // 8)
        file.write(bytes(2))
    assert verified(saved).findings[1:] == [
        Finding("pc.ram", 96, 112, "hold no data, and held some when they were saved")
    ]


async def test_a_plain_stream_has_the_same_checksums(
    saved: Path, tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log(r"ERROR ckptfs\.guest\.base: tiny: the checksum of pages 0 to 0 is wrong")
    guest = Guest.incoming(open_base(saved))
    for name in ("multifd", "mapped-ram"):
        guest.settings.set_capability(name, False)
    await save(guest, save_request(tmp_path / "plain"))
    guest.close()
    assert verified(tmp_path / "plain").findings == []
    with open_file(str(saved)) as mapped, open_file(f"{tmp_path}/plain") as plain:
        assert plain.trailer.get("checksums") == mapped.trailer.get("checksums")
    data = (tmp_path / "plain").read_bytes()
    flip(tmp_path / "plain", data.index(b"tiny".ljust(PAGE, b"\0")) + 2000)
    assert verified(tmp_path / "plain").findings == [Finding("tiny", 0, 1, "the checksum is wrong")]
    guest = Guest.incoming(open_verified(tmp_path / "plain"))
    with pytest.raises(BadPagesError):
        await guest.read(guest.blocks["tiny"], 0, PAGE)
    guest.close()


def test_a_file_that_has_become_shorter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = places(saved)[310]
    with open_file(str(saved)) as opened:
        os.truncate(saved, place + 100)
        result = Verified()
        verify(opened, result)
    bad = [finding for finding in result.findings if finding.idstr == "pc.ram"]
    assert bad[0][:3] == ("pc.ram", 310, 311)
    assert bad[-1][:3] == ("pc.ram", 999, 1000)
    assert all("can't be read" in finding.problem for finding in bad)
