"""A plain stream that comes in pieces of any size: its pages are those of the whole, all else is left over."""

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.checkpoint import read_device_state
from ckptfs.mapped_ram.page_stream import PageStream
from ckptfs.mapped_ram.precopy import read_precopy
from tests.doubles.migration_file import Block, BytesSource, Device, MigrationFile

PLAIN = MigrationFile(
    blocks=[
        Block("pc.ram", 700, {page: bytes([page % 251 + 1]) * 4096 for page in range(700) if page % 90 < 60}),
        Block("vga.vram", 3, {1: b"x"}),
    ],
    capabilities=[],
    part_count=3,
)


def take(stream: bytes, lengths: Iterable[int]) -> tuple[PageStream, dict[str, dict[int, bytes]]]:
    """Feed the stream in pieces; return the newest content of each page that came."""
    pages: dict[str, dict[int, bytes]] = {}
    reader, position = PageStream(), 0
    for length in lengths:
        for batch in reader.feed(stream[position : position + length]):
            found = pages.setdefault(batch.idstr, {})
            for number, page in enumerate(batch.pages.tolist()):
                found[page] = bytes(4096) if batch.content is None else batch.content[number].tobytes()
        position += length
        if position >= len(stream):
            break
    return reader, pages


def expected(file: MigrationFile) -> dict[str, dict[int, bytes]]:
    return {
        block.idstr: {page: block.pages.get(page, b"").ljust(4096, b"\0") for page in range(block.page_count)}
        for block in file.blocks
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"footers": False},
        {"vmdesc": False},
        {"uuid": bytes(16)},
        {"setup_devices": [Device("early", b"e")]},
    ],
)
@pytest.mark.parametrize("lengths", [[1 << 30], itertools.repeat(4096), "random"])
def test_every_kind_of_stream(changes: dict[str, object], lengths: Iterable[int] | str) -> None:
    file = replace(PLAIN, **changes)
    chance = random.Random(1)
    stream = file.data()
    if lengths == "random":
        lengths = (chance.choice([1, 2, 7, 100, 4104, 50_000]) for _ in itertools.count())
    reader, pages = take(stream, lengths)
    assert pages == expected(file)
    assert reader.head is not None
    assert [block.idstr for block in reader.head.blocks] == ["pc.ram", "vga.vram"]
    source = BytesSource(bytes(reader.rest))
    checkpoint = read_precopy(source).checkpoint
    assert [section.idstr for section in checkpoint.sections] == ["timer", "globalstate"]
    whole = BytesSource(stream)
    assert read_device_state(source, checkpoint) == read_device_state(whole, read_precopy(whole).checkpoint)


def test_byte_by_byte() -> None:
    file = replace(PLAIN, blocks=[Block("pc.ram", 5, {1: b"x" * 4096})])
    assert take(file.data(), itertools.repeat(1))[1] == expected(file)


def test_a_stream_that_is_cut_anywhere_is_no_checkpoint() -> None:
    stream = replace(PLAIN, blocks=[Block("pc.ram", 3, {1: b"x" * 4096})], vmdesc=False).data()
    for length in [*range(1, 300, 7), len(stream) - 1]:
        reader, _ = take(stream[:length], [1 << 20])
        with pytest.raises(CheckpointError):
            read_precopy(BytesSource(bytes(reader.rest)))


@pytest.mark.parametrize(
    ("mark", "value", "words"),
    [
        ("pc.ram.record.1", (1 << 62 | 0x28).to_bytes(8), "a page is outside of RAM block 'pc.ram'"),
        ("pc.ram.record.1", (1 << 63 | 0x28).to_bytes(8), "a page is outside of RAM block 'pc.ram'"),
        ("pc.ram.record.1", (4096 | 0x21).to_bytes(8), "Unexpected RAM flags 0x21"),
        ("pc.ram.record.0", (0x28).to_bytes(8), "the first record of a RAM page names no block"),
        ("vga.vram.record.0", (0x02).to_bytes(8) + b"\4none", "RAM block 'none', which is not in the list"),
        ("pc.ram.page.2", b"\1", "a page of zeros has another value"),
        ("part.0", b"\2\0\0\0\7", "another iterable section"),
    ],
)
def test_broken_streams(mark: str, value: bytes, words: str) -> None:
    data, marks = replace(PLAIN, blocks=[Block("pc.ram", 3, {1: b"x" * 4096}), Block("vga.vram", 1)]).build()
    broken = data[: marks[mark]] + value + data[marks[mark] + len(value) :]
    with pytest.raises(CheckpointError, match=words):
        take(broken, [1 << 20])
