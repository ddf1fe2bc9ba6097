"""Where RAM blocks lie in the guest's physical memory.

A checkpoint has blocks and devices, and no addresses. Those of a PC are in the CMOS of its clock, where firmware
reads how much RAM there is (hw/i386/pc.c, pc_cmos_init, 10.0): right for pc, q35 and microvm, whatever the size
of the hole below 4 GiB. Machines without such a clock have their RAM at an address that the machine type fixes.
What the user knows better comes first, as ``ID@ADDRESS[+LENGTH][:OFFSET]``.
"""

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from ckptfs.errors import CheckpointError, CkptfsError, CommandError
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.migration.size import parse_size
from ckptfs.physical.devices import DeviceState

GiB4 = 4 << 30
ADDRESS_MAX = 1 << 52
_LEGACY_VGA = range(0xA0000, 0xC0000)
_ENTRY = re.compile(r"(?P<idstr>.+)@(?P<address>[^@+:]+)(\+(?P<length>[^@+:]+))?(:(?P<offset>[^@+:]+))?")

_FIXED_STARTS = {("virt", "env.xregs"): 0x40000000, ("virt", "env.gpr"): 0x80000000}
"""First byte of RAM, by machine type and a field that vCPUs of its architecture have (hw/arm/virt.c,
hw/riscv/virt.c, 10.0)."""


class UnknownMapError(CheckpointError):
    """Where RAM lies is not known: who asks may say it (`parse_map`)."""


def words_of(error: Exception, option: str) -> str:
    """What an error says; where a map would help, with the option that takes one (``-o map=``)."""
    return f"{error}: say it, {option}ID@ADDRESS" if isinstance(error, UnknownMapError) else str(error)


class Region(NamedTuple):
    """``length`` bytes of a block, from ``block_offset`` on, at guest-physical address ``start``."""

    start: int
    length: int
    idstr: str
    block_offset: int

    @property
    def stop(self) -> int:
        """The first address behind it."""
        return self.start + self.length


@dataclass(frozen=True)
class MemoryMap:
    """Regions in ascending order, none of which overlap; ``source`` says where that is known from."""

    regions: tuple[Region, ...]
    source: str
    left_out: tuple[str, ...] = ()
    """The blocks (idstrs) that are memory, too, but of which nothing tells the address."""

    @property
    def stop(self) -> int:
        """The first address behind all RAM."""
        return self.regions[-1].stop if self.regions else 0

    def pieces(self, address: int, length: int) -> Iterator[tuple[int, Region | None]]:
        """Cut ``length`` bytes from ``address`` on: each piece's length, and its place in a block, or None."""
        stop = address + length
        index = bisect_right(self.regions, address, key=lambda region: region.start) - 1
        index = max(index, 0)
        while address < stop:
            region = self.regions[index] if index < len(self.regions) else None
            if region is None or stop <= region.start:
                yield stop - address, None
                return
            if region.stop <= address:
                index += 1
                continue
            if address < region.start:
                yield region.start - address, None
                address = region.start
            end = min(stop, region.stop)
            skip = address - region.start
            yield end - address, Region(address, end - address, region.idstr, region.block_offset + skip)
            address = end

    def text(self) -> str:
        """The map as a file: a line ``START LENGTH BLOCK OFFSET`` for each region.

        Raises CheckpointError for a block whose name is no part of a line.
        """
        names = *self.left_out, *(region.idstr for region in self.regions)
        if strange := [idstr for idstr in names if "\n" in idstr]:
            raise CheckpointError(f"the name of RAM block {strange[0]!r} can't be in a line")
        lines = [f"# known from {self.source}"]
        lines += [f"# left out, as nothing tells its address: {idstr}" for idstr in self.left_out]
        lines += [
            f"{region.start:#x} {region.length:#x} {region.idstr} {region.block_offset:#x}"
            for region in self.regions
        ]
        return "".join(line + "\n" for line in lines)

    @classmethod
    def of_text(cls, text: str) -> "MemoryMap":
        """The map that such a file tells, whatever else is in it. Raises CheckpointError for a bad line."""
        lines = [line for line in text.split("\n") if line.startswith("0x")]
        try:
            regions = []
            for line in lines:
                start, length, rest = line.split(" ", 2)
                idstr, offset = rest.rsplit(" ", 1)
                regions.append(Region(int(start, 16), int(length, 16), idstr, int(offset, 16)))
        except ValueError:
            raise CheckpointError(f"{line!r} is no line of a memory map") from None
        return cls(tuple(regions), text.partition("\n")[0].removeprefix("# known from "))


def parse_entry(entry: str) -> tuple[str, int, int | None, int]:
    """idstr, address, length and offset (bytes) of ``ID@ADDR[+LEN][:OFFSET]``; CommandError for anything else."""
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise CommandError(f"map: {entry!r} is not ID@ADDRESS[+LENGTH][:OFFSET], as in pc.ram@0x100000000+1G:3G")
    length = _number(entry, match["length"]) if match["length"] else None
    return match["idstr"], _number(entry, match["address"]), length, _number(entry, match["offset"] or "0")


def parse_map(entries: Sequence[str], lengths: Mapping[str, int]) -> MemoryMap:
    """The map that a user gave: ``ID@ADDR[+LEN][:OFFSET]`` each. Raises CommandError, naming the entry.

    ``lengths`` are bytes of each block, by idstr.
    """
    regions = []
    for entry in entries:
        idstr, address, length, offset = parse_entry(entry)
        if idstr not in lengths:
            raise CommandError(f"map: there is no RAM block {idstr!r}")
        length = lengths[idstr] - offset if length is None else length
        if length <= 0 or offset + length > lengths[idstr]:
            raise CommandError(f"map: {entry!r} is outside of the block, which has {lengths[idstr]:#x} bytes")
        regions.append(Region(address, length, idstr, offset))
    return _checked(regions, "map=", CommandError)


def with_plugged(memory: MemoryMap, plugged: Sequence[Region], others: Collection[str]) -> MemoryMap:
    """The same with memory devices; of ``others``, the blocks (idstrs) that may be theirs, some may be left out.

    Raises CheckpointError where one would be at the place of another block.
    """
    left_out = tuple(idstr for idstr in others if all(region.idstr != idstr for region in plugged))
    source = memory.source + (", memory devices from the machine's monitor" if plugged else "")
    return replace(_checked([*memory.regions, *plugged], source, CheckpointError), left_out=left_out)


def pc_map(cmos: bytes, main: Sequence[RAMBlock], has_vga: bool, bios: RAMBlock | None) -> MemoryMap:
    """The map of a PC; ``main`` are its memory blocks in the order of its NUMA nodes, ``cmos`` is its clock's.

    Raises CheckpointError where the sizes do not add up.
    """
    below, above = cmos_sizes(cmos)
    total = sum(block.used_length for block in main)
    if below + above != total:
        raise CheckpointError(
            f"the CMOS tells of {below + above:#x} bytes of RAM, and {', '.join(block.idstr for block in main)} "
            f"{'has' if len(main) == 1 else 'have'} {total:#x}"
        )
    hole = [_LEGACY_VGA] if has_vga else []
    regions = [
        region
        for start, offset, length in ((0, 0, below), (GiB4, below, above))
        for region in _placed(main, start, offset, length)
        for region in _without(region, hole)
    ]
    if bios is not None:
        regions.append(Region(GiB4 - bios.used_length, bios.used_length, bios.idstr, 0))
    return _checked(regions, "the CMOS of the machine's clock", CheckpointError)


def cmos_sizes(cmos: bytes) -> tuple[int, int]:
    """Bytes of RAM below and above 4 GiB."""
    below = int.from_bytes(cmos[0x34:0x36], "little") << 16
    below = below + (16 << 20) if below else (1 << 20) + (int.from_bytes(cmos[0x30:0x32], "little") << 10)
    return below, int.from_bytes(cmos[0x5B:0x5E], "little") << 16


def fixed_start(machine: str, cpu_fields: Collection[str]) -> int | None:
    """The first byte of RAM, where the machine type alone tells it; ``cpu_fields`` are the names of a vCPU's."""
    for (kind, field), start in _FIXED_STARTS.items():
        if machine.partition("-")[0] == kind and field in cpu_fields:
            return start
    return None


def fixed_map(start: int, main: Sequence[RAMBlock], machine: str) -> MemoryMap:
    """The map of a machine that has all its RAM in one place."""
    total = sum(block.used_length for block in main)
    return _checked(list(_placed(main, start, 0, total)), f"the machine type {machine}", CheckpointError)


def cmos_of(clock: DeviceState) -> bytes:
    """The bytes of a clock's memory (hw/rtc/mc146818rtc.c)."""
    cmos = clock.data("cmos_data")
    if len(cmos) != 128:
        raise CheckpointError(f"the CMOS has {len(cmos)} bytes, not 128")
    return cmos


def _placed(main: Sequence[RAMBlock], start: int, offset: int, length: int) -> Iterator[Region]:
    """Bytes [offset, offset + length) of all blocks one after another, from address ``start`` on."""
    position = 0
    for block in main:
        first = max(offset, position)
        last = min(offset + length, position + block.used_length)
        if first < last:
            yield Region(start + first - offset, last - first, block.idstr, first - position)
        position += block.used_length


def _without(region: Region, holes: Sequence[range]) -> Iterator[Region]:
    start = region.start
    for hole in holes:
        if start < hole.start < region.stop:
            yield _part(region, start, hole.start)
        if start < hole.stop and hole.start < region.stop:
            start = hole.stop
    if start < region.stop:
        yield _part(region, start, region.stop)


def _part(region: Region, start: int, stop: int) -> Region:
    return Region(start, stop - start, region.idstr, region.block_offset + start - region.start)


def _checked(regions: list[Region], source: str, wrong: type[CkptfsError]) -> MemoryMap:
    """The map of regions; raises ``wrong`` where they can't be as they are."""
    regions.sort()
    for former, region in pairwise(regions):
        if region.start < former.stop:
            raise wrong(f"{former.idstr} and {region.idstr} would both be at address {region.start:#x}")
    if regions and regions[-1].stop > ADDRESS_MAX:
        raise wrong(f"{regions[-1].idstr} would end at address {regions[-1].stop:#x}, where none is")
    return MemoryMap(tuple(regions), source)


def _number(entry: str, text: str) -> int:
    try:
        return parse_size(text)
    except CommandError as error:
        raise CommandError(f"map: {entry!r}: bad number {text!r}: {error}") from None
