"""Page tables that a guest has forged: no end, no RAM, too many."""

import struct

import pytest

from ckptfs.errors import CheckpointError
from ckptfs.physical.elf_core import LoadedRange
from ckptfs.physical.memory_map import MemoryMap, Region
from ckptfs.physical.page_tables import LA57, TABLE_LENGTH, kernel_ranges
from ckptfs.physical.registers import Registers, Segment

PRESENT, LARGE = 1, 1 << 7
MiB = 1 << 20
MEMORY = MemoryMap((Region(0, 64 * MiB, "pc.ram", 0),), "")
TOP = 0xFFFF800000000000


def walked(
    tables: dict[int, dict[int, int]], cr4: int = 0, memory: MemoryMap = MEMORY, cr3: int = 0x1000, cs: int = 0x10
) -> tuple[list[LoadedRange], int]:
    """The ranges of a guest with these tables (address: index: entry) and CR3 0x1000; how many were read."""
    registers = Registers({}, 0, 0, {"cs": Segment(cs, 0, 0, 0)}, (0, 0, 0, cr3, cr4), 0, 0)
    walk = kernel_ranges(registers, memory)
    count = 0
    try:
        address = next(walk)
        while True:
            count += 1
            entries = tables.get(address, {})
            address = walk.send(b"".join(struct.pack("<Q", entries.get(index, 0)) for index in range(512)))
    except StopIteration as end:
        return end.value, count
    raise AssertionError


def test_pages_of_every_size_and_neighbours() -> None:
    tables = {
        0x1000: {256: 0x2000 | PRESENT, 511: 0x5000 | PRESENT, 3: 0x2000 | PRESENT},
        0x2000: {1: 0x3000 | PRESENT},
        0x3000: {0: 0x4000 | PRESENT, 5: 32 * MiB | PRESENT | LARGE, 6: 34 * MiB | PRESENT | LARGE},
        0x4000: {9: 0x10000 | PRESENT, 10: 0x11000 | PRESENT, 11: 0x13000 | PRESENT, 12: 0x14000},
        0x5000: {510: 0x0 | PRESENT | LARGE},
    }
    found, count = walked(tables)
    start = TOP + (1 << 30)
    assert found == [
        LoadedRange(start + 9 * 4096, 0x10000, 0x2000),
        LoadedRange(start + 11 * 4096, 0x13000, 0x1000),
        LoadedRange(start + 10 * MiB, 32 * MiB, 4 * MiB),
        LoadedRange(0xFFFFFFFF80000000, 0, 64 * MiB),  # what is in RAM of 1 GiB
    ]
    assert count == 5


def test_five_levels() -> None:
    tables = {
        0x1000: {511: 0x2000 | PRESENT},
        0x2000: {511: 0x3000 | PRESENT},
        0x3000: {511: 0x4000 | PRESENT},
        0x4000: {0: 0x200000 | PRESENT | LARGE},
    }
    assert walked(tables, LA57)[0] == [LoadedRange(0xFFFFFFFFC0000000, 0x200000, 0x200000)]


def test_a_program_that_is_isolated_from_the_kernel() -> None:
    """Its tables have the way into the kernel, and no more: the kernel's are the page before."""
    tables = {
        0x9000: {511: 0x3000 | PRESENT},
        0x8000: {511: 0x2000 | PRESENT},
        0x3000: {511: 0x4000 | PRESENT},
        0x4000: {0: 0x200000 | PRESENT | LARGE},
        0x2000: {510: 0x0 | PRESENT | LARGE},
    }
    entry = LoadedRange(0xFFFFFFFFC0000000, 0x200000, 0x200000)
    kernel = LoadedRange(0xFFFFFFFF80000000, 0, 64 * MiB)
    assert walked(tables, cr3=0x9000, cs=0x33)[0] == [kernel]
    assert walked(tables, cr3=0x9000, cs=0x10)[0] == [entry]  # a kernel may have any page
    assert walked(tables, cr3=0x8000, cs=0x33)[0] == [kernel]
    forged = {**tables, 0x8000: dict.fromkeys(range(512), 0x8000 | PRESENT)}
    assert walked(forged, cr3=0x9000, cs=0x33)[0] == [entry]


def test_a_table_that_is_its_own_entry_has_an_end() -> None:
    every = dict.fromkeys(range(512), 0x1000 | PRESENT)
    with pytest.raises(CheckpointError, match="the page tables of the guest map more than 65534 ranges"):
        walked({0x1000: every})


def test_tables_without_end() -> None:
    tables = {at: dict.fromkeys(range(512), (at + 0x1000) | PRESENT) for at in (0x1000, 0x2000, 0x3000)}
    with pytest.raises(CheckpointError, match="the page tables of the guest are more than 16384"):
        walked(tables)


def test_ranges_without_end() -> None:
    scattered = {index: (0x100000 + (index % 2) * 0x2000) | PRESENT for index in range(512)}
    tables = {
        0x1000: {511: 0x2000 | PRESENT},
        0x2000: dict.fromkeys(range(512), 0x3000 | PRESENT),
        0x3000: dict.fromkeys(range(512), 0x4000 | PRESENT),
        0x4000: scattered,
    }
    with pytest.raises(CheckpointError, match="map more than 65534 ranges"):
        walked(tables)


def test_what_is_outside_of_ram_is_passed_over() -> None:
    tables = {
        0x1000: {511: 0x2000 | PRESENT, 510: (1 << 40) | PRESENT},
        0x2000: {0: 0x3000 | PRESENT, 1: (64 * MiB - 4095) | PRESENT},
        0x3000: {0: (1 << 30) | PRESENT | LARGE, 1: (62 * MiB) | PRESENT | LARGE, 2: 64 * MiB | PRESENT | LARGE},
    }
    found, _ = walked(tables)
    assert found == [LoadedRange(0xFFFFFF8000200000, 62 * MiB, 2 * MiB)]
    assert walked({}, memory=MemoryMap((), ""))[0] == []


def test_ranges_end_with_a_region() -> None:
    memory = MemoryMap((Region(0, 0x201000, "a", 0), Region(0x201000, 4 * MiB, "b", 0)), "")
    tables = {
        0x1000: {511: 0x2000 | PRESENT},
        0x2000: {0: 0x3000 | PRESENT},
        0x3000: {0: 0x200000 | PRESENT | LARGE},
    }
    assert walked(tables, memory=memory)[0] == [
        LoadedRange(0xFFFFFF8000000000, 0x200000, 0x1000),
        LoadedRange(0xFFFFFF8000001000, 0x201000, 0x1FF000),
    ]
    assert TABLE_LENGTH == 4096
