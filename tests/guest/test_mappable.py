"""Pages whose bit is clear must read as zeros where somebody maps the file."""

import os
from pathlib import Path

import pytest

from ckptfs.channels.backing_file import FileSource
from ckptfs.errors import StateError
from ckptfs.guest.mappable import stale_page
from ckptfs.guest.resume import check_mappable
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.checkpoint import read_checkpoint
from ckptfs.mapped_ram.ramblock import RAMBlock
from tests.doubles.migration_file import Block, MigrationFile

PAGE = 4096
OFFSET = 1 << 20


def block(page_count: int) -> RAMBlock:
    return RAMBlock("pc.ram", page_count * PAGE, PAGE, OFFSET, 0, None, 0)


def bitmap(page_count: int, *pages: int) -> PagesBitmap:
    found = PagesBitmap(page_count)
    for page in pages:
        found.set(page, page + 1)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sparse file with room for 4096 pages at OFFSET, and bytes on both sides of them."""
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, OFFSET + 4096 * PAGE)
    write(path, -1)
    with path.open("r+b") as opened:
        opened.seek(0, os.SEEK_END)
        opened.write(b"devices")
    return path


def write(path: Path, page: int, at: int = 0, data: bytes = b"x") -> None:
    with path.open("r+b") as opened:
        opened.seek(OFFSET + page * PAGE + at)
        opened.write(data)


def stale(path: Path, *set_pages: int) -> int | None:
    with path.open("rb") as opened:
        return stale_page(opened.fileno(), block(4096), bitmap(4096, *set_pages))


def test_holes_and_pages_with_their_bit_are_fine(file: Path) -> None:
    for page in (0, 7, 4095):
        write(file, page)
    assert stale(file, 0, 7, 4095) is None


def test_zeros_that_are_stored_are_fine(file: Path) -> None:
    write(file, 100, 0, bytes(64 * PAGE))
    assert stale(file) is None


@pytest.mark.parametrize("page", [0, 1, 8, 1023, 1024, 4095])
@pytest.mark.parametrize("at", [0, 1, PAGE - 1])
def test_one_stale_byte_is_found(file: Path, page: int, at: int) -> None:
    write(file, page, at)
    write(file, (page + 2) % 4096)
    assert stale(file, (page + 2) % 4096) == page


def test_a_stale_page_inside_a_large_stretch(file: Path) -> None:
    write(file, 0, 0, bytes(3000 * PAGE))
    write(file, 2999, 5)
    assert stale(file, 2998) == 2999


def test_the_words_name_the_page_and_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    MigrationFile(blocks=[Block("pc.ram", 16, {3: b"\1"}, stale={5: b"!"})]).write(path)
    with path.open("rb") as opened:
        checkpoint, bitmaps = read_checkpoint(FileSource(opened.fileno()))
        with pytest.raises(StateError, match=r"page 5 of pc\.ram is zeros.*`ckptfs export FILE OUT"):
            check_mappable(opened.fileno(), checkpoint.blocks, bitmaps)
