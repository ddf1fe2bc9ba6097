import pytest

from ckptfs.errors import CheckpointError, CommandError
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.physical.acpi import in_node_order
from ckptfs.physical.memory_map import GiB4, MemoryMap, Region, cmos_sizes, fixed_map, parse_map, pc_map

MiB = 1 << 20


def block(idstr: str, length: int) -> RAMBlock:
    return RAMBlock(idstr, length, 4096, None, None, None, None)


def cmos(below: int, above: int = 0) -> bytes:
    """What pc_cmos_init writes."""
    data = bytearray(128)
    data[0x30:0x32] = min((below - MiB) >> 10, 0xFFFF).to_bytes(2, "little")
    if below > 16 * MiB:
        data[0x34:0x36] = ((below - 16 * MiB) >> 16).to_bytes(2, "little")
    data[0x5B:0x5E] = (above >> 16).to_bytes(3, "little")
    return bytes(data)


@pytest.mark.parametrize(("below", "above"), [(2 * MiB, 0), (16 * MiB, 0), (17 * MiB, 0), (3 << 30, 13 << 30)])
def test_sizes_of_the_cmos(below: int, above: int) -> None:
    assert cmos_sizes(cmos(below, above)) == (below, above)


def test_memory_is_cut_at_the_holes() -> None:
    found = pc_map(cmos(3 << 30, 1 << 30), [block("a", 2 << 30), block("b", 2 << 30)], True, block("pc.bios", MiB))
    assert found.regions == (
        Region(0, 0xA0000, "a", 0),
        Region(0xC0000, (2 << 30) - 0xC0000, "a", 0xC0000),
        Region(2 << 30, 1 << 30, "b", 0),
        Region(GiB4 - MiB, MiB, "pc.bios", 0),
        Region(GiB4, 1 << 30, "b", 1 << 30),
    )
    assert found.stop == 5 << 30


def test_sizes_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"the CMOS tells of 0x2000000 bytes of RAM, and a has 0x4000000"):
        pc_map(cmos(32 * MiB), [block("a", 64 * MiB)], False, None)


def test_all_in_one_place() -> None:
    found = fixed_map(0x40000000, [block("a", MiB), block("b", MiB)], "virt-10.0")
    assert found.regions == (Region(0x40000000, MiB, "a", 0), Region(0x40100000, MiB, "b", 0))


LENGTHS = {"pc.ram": 64 * MiB, "d0": MiB, "/a@b": MiB}


def test_a_map_by_hand() -> None:
    found = parse_map(["d0@4G", "pc.ram@0+16M", "pc.ram@1G+1M:0x1000000", "/a@b@5G"], LENGTHS)
    assert found.regions == (
        Region(0, 16 * MiB, "pc.ram", 0),
        Region(1 << 30, MiB, "pc.ram", 16 * MiB),
        Region(4 << 30, MiB, "d0", 0),
        Region(5 << 30, MiB, "/a@b", 0),
    )
    assert found.text().splitlines()[:2] == ["# known from map=", "0x0 0x1000000 pc.ram 0x0"]


def test_a_map_as_text() -> None:
    found = MemoryMap((Region(0, MiB, "a b", 0), Region(MiB, MiB, "\x85\udcff", MiB)), "map=")
    assert MemoryMap.of_text(found.text() + "KERNELOFFSET=1000\n") == found
    with pytest.raises(CheckpointError, match="is no line"):
        MemoryMap.of_text("0x0 0x1000\n")
    with pytest.raises(CheckpointError, match=r"RAM block 'a\\n0x0 0x1000 b 0x0' can't be in a line"):
        MemoryMap((Region(0, MiB, "a\n0x0 0x1000 b 0x0", 0),), "map=").text()


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("pc.ram", "is not ID@ADDRESS"),
        ("pc.ram@", "is not ID@ADDRESS"),
        ("nosuch@0", "no RAM block 'nosuch'"),
        ("pc.ram@x", "bad number 'x'"),
        ("pc.ram@0+1G", "outside of the block, which has 0x4000000 bytes"),
        ("pc.ram@0:64M", "outside of the block"),
        ("pc.ram@0+0", "outside of the block"),
        ("pc.ram@4E", "where none is"),
    ],
)
def test_bad_entries_are_named(entry: str, problem: str) -> None:
    with pytest.raises(CommandError, match=problem):
        parse_map([entry], LENGTHS)


def test_blocks_can_not_overlap() -> None:
    with pytest.raises(CommandError, match=r"pc\.ram and d0 would both be at address 0x1000000"):
        parse_map(["pc.ram@0", "d0@16M"], LENGTHS)


def test_pieces() -> None:
    one, two = Region(0x1000, 0x1000, "a", 0), Region(0x2000, 0x2000, "b", 0x5000)
    memory = MemoryMap((one, two, Region(0x8000, 0x1000, "c", 0)), "")
    assert list(memory.pieces(0, 0x9800)) == [
        (0x1000, None),
        (0x1000, one),
        (0x2000, two),
        (0x4000, None),
        (0x1000, Region(0x8000, 0x1000, "c", 0)),
        (0x800, None),
    ]
    assert list(memory.pieces(0x2800, 0x10)) == [(0x10, Region(0x2800, 0x10, "b", 0x5800))]
    assert list(memory.pieces(0x8FFF, 1)) == [(1, Region(0x8FFF, 1, "c", 0xFFF))]
    assert list(memory.pieces(0x9000, 5)) == [(5, None)]
    assert list(MemoryMap((), "").pieces(7, 5)) == [(5, None)]


GiB = 1 << 30


@pytest.mark.parametrize(
    ("lengths", "sizes", "first", "order"),
    [
        ({"a": GiB, "b": 2 * GiB}, {0: 2 * GiB - 0x60000, 1: GiB}, (), ["b", "a"]),
        ({"a": GiB, "b": GiB}, {0: GiB - 0x60000, 1: GiB}, ("b",), ["b", "a"]),
        ({"a": GiB, "b": GiB}, {0: GiB - 0x60000, 1: GiB}, (), None),
        ({"a": GiB, "b": GiB}, {0: GiB - 0x60000, 1: GiB}, ("a", "b"), None),
        ({"a": GiB, "b": GiB, "c": GiB}, {0: GiB, 1: GiB, 2: GiB}, ("a",), None),
        ({"a": GiB, "b": GiB}, {0: GiB}, ("a",), None),
        ({"a": GiB}, {0: 2 * GiB}, ("a",), None),
    ],
)
def test_nodes_are_told_apart_or_not_at_all(
    lengths: dict[str, int], sizes: dict[int, int], first: tuple[str, ...], order: list[str] | None
) -> None:
    assert in_node_order(lengths, sizes, first) == order
