"""QEMU's own dump-guest-memory of the same stopped guest is the judge: every note, and where memory is."""

import re

import numpy as np
import numpy.typing as npt
import pytest

from ckptfs.physical.acpi import BLOCK, in_node_order, node_sizes
from ckptfs.physical.elf_core import EM_X86_64, build, machine_notes, physical_ranges
from ckptfs.physical.memory_map import MemoryMap
from ckptfs.physical.page_tables import TABLE_LENGTH, kernel_ranges
from tests.mount.decode import decode
from tests.physical.conftest import SavedGuests, numa
from tests.physical.elf import parse_notes, read_elf

MACHINES = {
    "pc": ("pc", "64M"),
    "pc-5G": ("pc", "5G"),
    "pc-vga": ("pc", "64M", "-vga", "std"),
    "small-hole": ("pc,max-ram-below-4g=1G", "3G"),
    "q35-5G": ("q35", "5G"),
}


def flat_view(mtree: str) -> list[tuple[int, int, str, int]]:
    """(start, stop, region, offset) of RAM and ROM in the machine's memory, neighbours joined."""
    view = next(view for view in mtree.split("FlatView #") if 'AS "memory"' in view)
    line = re.compile(r"^ *(\w{16})-(\w{16}) \(prio -?\d+, (?:ram|rom)\): (\S+)(?: @(\w{16}))?", re.MULTILINE)
    joined: list[tuple[int, int, str, int]] = []
    for start, last, region, offset in line.findall(view):
        found = int(start, 16), int(last, 16) + 1, region, int(offset or "0", 16)
        if (
            joined
            and joined[-1][1:3] == (found[0], region)
            and joined[-1][3] - joined[-1][0] == found[3] - found[0]
        ):
            joined[-1] = (joined[-1][0], found[1], region, joined[-1][3])
        else:
            joined.append(found)
    return joined


def as_view(memory: MemoryMap) -> list[tuple[int, int, str, int]]:
    return [(x.start, x.stop, x.idstr, x.block_offset) for x in memory.regions]


def read_physical(blocks: dict[str, npt.NDArray[np.uint8]], memory: MemoryMap, address: int, length: int) -> bytes:
    parts = []
    for piece, region in memory.pieces(address, length):
        assert region is not None
        parts.append(blocks[region.idstr][region.block_offset : region.block_offset + piece].tobytes())
    return b"".join(parts)


@pytest.mark.parametrize("name", MACHINES)
def test_the_map_of_a_pc_is_that_of_qemu(saved: SavedGuests, name: str) -> None:
    machine, size, *arguments = MACHINES[name]
    one = saved.firmware(name, machine, size, *arguments)
    expected = [entry for entry in flat_view(one.mtree) if entry[2] in ("pc.ram", "pc.bios")]
    assert as_view(one.memory("pc.ram")) == expected


def test_two_nodes_one_behind_the_other(saved: SavedGuests) -> None:
    one = saved.firmware("numa", "q35", "6G", *numa("4G", "2G"))
    expected = [entry for entry in flat_view(one.mtree) if entry[2] in ("m0", "m1", "pc.bios")]
    assert as_view(one.memory("m0", "m1")) == expected
    lengths = {block.idstr: block.used_length for block in one.checkpoint.blocks if block.idstr in ("m0", "m1")}
    sizes = node_sizes(one.block(BLOCK))
    assert in_node_order(lengths, sizes, ()) == ["m0", "m1"]


def test_every_note_is_that_of_qemu(saved: SavedGuests) -> None:
    linux = saved.linux()
    assert linux.dump is not None
    notes = machine_notes(linux.registers(), b"")
    assert parse_notes(notes) == linux.dump.notes
    assert [note.name for note in linux.dump.notes] == [b"CORE", b"CORE", b"QEMU", b"QEMU"]


def test_the_core_has_all_memory_at_its_place(saved: SavedGuests) -> None:
    linux = saved.linux()
    assert linux.dump is not None
    memory = linux.memory("pc.ram")
    core = build(EM_X86_64, machine_notes(linux.registers(), b""), physical_ranges(memory), memory)
    blocks = decode(linux.path).blocks
    path = linux.path.with_name("core")
    with path.open("wb") as file:
        file.write(core.head)
        for segment, region in zip(core.segments, memory.regions, strict=True):
            file.seek(segment.file_offset)
            file.write(blocks[region.idstr][region.block_offset : region.block_offset + region.length])
    elf = read_elf(path)
    assert path.stat().st_size == core.length
    assert elf.machine == linux.dump.machine
    assert elf.notes == linux.dump.notes
    for load in linux.dump.loads:
        theirs = np.frombuffer(linux.dump.read(load.physical, load.length), np.uint8)
        ours = np.frombuffer(elf.read(load.physical, load.length), np.uint8)
        assert np.array_equal(ours, theirs), hex(load.physical)


def test_the_kernels_addresses(saved: SavedGuests) -> None:
    linux = saved.linux()
    memory, blocks = linux.memory("pc.ram"), decode(linux.path).blocks
    walk = kernel_ranges(linux.registers()[0], memory)
    tables = 0
    try:
        address = next(walk)
        while True:
            tables += 1
            address = walk.send(read_physical(blocks, memory, address, TABLE_LENGTH))
    except StopIteration as end:
        ranges = end.value
    assert 50 < tables < 400
    assert len(ranges) < 1000
    for virtual, physical in linux.physical.items():
        found = [x.physical + virtual - x.virtual for x in ranges if x.virtual <= virtual < x.virtual + x.length]
        assert found == ([] if physical is None else [physical]), hex(virtual)
