"""An ELF core of a machine, as gdb, crash, drgn and makedumpfile read it.

The layout is that of QEMU's dump-guest-memory (dump/dump.c, target/i386/arch_dump.c, 10.0), but for the program
headers: they stand at byte 64, right behind the ELF header, and there are no section headers: makedumpfile wants it
so.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckptfs.errors import CheckpointError
from ckptfs.physical.memory_map import MemoryMap, Region
from ckptfs.physical.registers import Registers

EM_X86_64, EM_AARCH64, EM_RISCV = 62, 183, 243
PT_LOAD, PT_NOTE = 1, 4
NT_PRSTATUS = 1
DATA_ALIGNMENT = 1 << 20
MAX_SEGMENTS = 65534

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_IDENT = b"\x7fELF\x02\x01\x01" + bytes(9)
_ET_CORE = 4


class LoadedRange(NamedTuple):
    """``length`` bytes of physical memory from ``physical`` on, seen at ``virtual``."""

    virtual: int
    physical: int
    length: int


class CoreSegment(NamedTuple):
    """Where in a core the bytes of a range are."""

    file_offset: int
    physical: int
    length: int


@dataclass(frozen=True)
class Core:
    """A core: all before its data, and where its data is. ``length`` is that of the file."""

    head: bytes
    segments: tuple[CoreSegment, ...]
    length: int


def build(machine: int, notes: bytes, ranges: Sequence[LoadedRange], memory: MemoryMap) -> Core:
    """Lay out a core of ``ranges``; the data is the memory of ``memory``, once, by physical address.

    ``machine`` is the ELF machine. Raises CheckpointError for more ranges than an ELF header can count.
    """
    if len(ranges) > MAX_SEGMENTS:
        raise CheckpointError(f"{len(ranges)} ranges of memory are more than an ELF core can have")
    count = len(ranges) + 1
    notes_offset = _EHDR.size + _PHDR.size * count
    data_offset = -(-(notes_offset + len(notes)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
    segments, places = [], {}
    for region in memory.regions:
        places[region] = data_offset
        segments.append(CoreSegment(data_offset, region.start, region.length))
        data_offset += region.length
    header = _EHDR.pack(_IDENT, _ET_CORE, machine, 1, 0, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, count, 0, 0, 0)
    headers = [_PHDR.pack(PT_NOTE, 0, notes_offset, 0, 0, len(notes), len(notes), 0)]
    for loaded in ranges:
        offset = _file_offset(loaded, memory, places)
        headers.append(
            _PHDR.pack(PT_LOAD, 0, offset, loaded.virtual, loaded.physical, loaded.length, loaded.length, 0)
        )
    head = header + b"".join(headers) + notes
    return Core(head, tuple(segments), data_offset)


def physical_ranges(memory: MemoryMap) -> list[LoadedRange]:
    """All of memory by its physical address."""
    return [LoadedRange(region.start, region.start, region.length) for region in memory.regions]


def prstatus_note(cpu_index: int, registers: Registers) -> bytes:
    """NT_PRSTATUS of a vCPU (x86_64_elf_prstatus)."""
    general, segments = registers.general, registers.segments
    order = ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi")
    user_regs = [general[name] for name in order]
    user_regs += [
        0,
        registers.rip,
        segments["cs"].selector,
        registers.rflags,
        general["rsp"],
        segments["ss"].selector,
    ]
    user_regs += [segments["fs"].base, segments["gs"].base]
    user_regs += [segments[name].selector for name in ("ds", "es", "fs", "gs")]
    return _note(b"CORE", NT_PRSTATUS, struct.pack("<32xI76x27Q8x", cpu_index + 1, *user_regs))


def qemu_note(registers: Registers) -> bytes:
    """QEMU's own note of a vCPU (QEMUCPUState, version 1)."""
    general, segments = registers.general, registers.segments
    order = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{number}" for number in range(8, 16)))
    names = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt")
    state = struct.pack("<18Q", *(general[name] for name in order), registers.rip, registers.rflags)
    state += b"".join(segments[name].note() for name in names)
    state += struct.pack("<6Q", *registers.cr, registers.kernel_gs_base)
    return _note(b"QEMU", 0, struct.pack("<II", 1, 8 + len(state)) + state)


def machine_notes(registers: Sequence[Registers], vmcoreinfo: bytes) -> bytes:
    """The notes of all vCPUs in QEMU's order, and the guest's own behind them."""
    prstatus = [prstatus_note(index, one) for index, one in enumerate(registers)]
    return b"".join([*prstatus, *map(qemu_note, registers), vmcoreinfo])


def _note(name: bytes, kind: int, description: bytes) -> bytes:
    name += b"\0"
    return struct.pack("<III", len(name), len(description), kind) + _padded(name) + _padded(description)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _file_offset(loaded: LoadedRange, memory: MemoryMap, places: dict[Region, int]) -> int:
    """Where the data of a range, all of which is in one region, begins in the file."""
    for region in memory.regions:
        if region.start <= loaded.physical and loaded.physical + loaded.length <= region.stop:
            return places[region] + loaded.physical - region.start
    raise CheckpointError(f"memory at {loaded.physical:#x} is in no RAM block")
