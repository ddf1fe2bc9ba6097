"""What can be shown of a checkpoint's memory: its map, its registers, a kernel's note, and files made of them.

No I/O happens here. Whatever needs RAM is a generator: it yields the `Place` that it wants, is sent its bytes, and
returns the result (`Look`). Who reads RAM lazily has it `awaited`, who has the file open has it `seen`.

What can't be made raises CheckpointError or CommandError, which says why.
"""

from collections.abc import Awaitable, Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple, TypeVar

from ckptfs.errors import CheckpointError, CkptfsError
from ckptfs.mapped_ram.checkpoint import Checkpoint
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.sections import Section
from ckptfs.mapped_ram.stream import Source
from ckptfs.mapped_ram.trailer import Trailer
from ckptfs.physical import acpi, layouts
from ckptfs.physical.devices import DeviceState, read_device
from ckptfs.physical.elf_core import EM_X86_64, LoadedRange, build, machine_notes, physical_ranges
from ckptfs.physical.layouts import Layout
from ckptfs.physical.memory_map import (
    MemoryMap,
    UnknownMapError,
    cmos_of,
    fixed_map,
    fixed_start,
    parse_map,
    pc_map,
    with_plugged,
)
from ckptfs.physical.page_tables import TABLE_LENGTH, kernel_ranges
from ckptfs.physical.plugged import plugged_in
from ckptfs.physical.registers import Registers
from ckptfs.physical.vmcoreinfo import check_note, kernel_offset, place_of, text_of

_FIRMWARE_AREA = (0xF0000, 0x10000)
"""Where a PC's firmware has copied itself to: start and length."""

T = TypeVar("T")


class Place(NamedTuple):
    """``length`` bytes of block ``idstr``, from ``block_offset`` on; all of them are in the block."""

    idstr: str
    block_offset: int
    length: int


Look = Generator[Place, bytes, T]


async def awaited(look: Look[T], read: Callable[[Place], Awaitable[bytes]]) -> T:
    """The result of a look: ``read`` gives it the bytes that it asks for, or the error that reading them is."""
    try:
        place = next(look)
        while True:
            try:
                data = await read(place)
            except (CkptfsError, OSError) as error:
                place = look.throw(error)
            else:
                place = look.send(data)
    except StopIteration as end:
        result: T = end.value
        return result


def seen(look: Look[T], read: Callable[[Place], bytes]) -> T:
    """The same for whoever can read at once."""

    async def read_at_once(place: Place) -> bytes:
        return read(place)

    try:
        awaited(look, read_at_once).send(None)  # it ends there, as nothing that it awaits has to wait
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError


@dataclass(frozen=True)
class Known:
    """What is known of a checkpoint's memory beside its RAM and sections.

    ``main`` are the idstrs of its main memory, ``plugged`` those of blocks of memory devices; where those lie,
    ``trailer`` may tell (`plugged_in`). ``named`` is the user's map (`parse_map`), and goes before all else.
    """

    main: Collection[str]
    plugged: Collection[str]
    trailer: Trailer
    named: Sequence[str] = ()


class Looker:
    """Looks at one checkpoint. ``source`` has the payloads of its sections."""

    def __init__(self, checkpoint: Checkpoint, source: Source, known: Known) -> None:
        self._checkpoint: Final = checkpoint
        self._source: Final = source
        self._known: Final = known
        self._memory: MemoryMap | None = None

    # ---- files made of memory ----------------------------------------------------------------------

    def map(self) -> Look[Layout]:
        """The memory map as a text, and by how much the kernel is moved, if it tells."""
        text = (yield from self.memory_map()).text()
        try:
            offset = kernel_offset((yield from self.note()))
        except CkptfsError:
            offset = None
        return layouts.text(text + ("" if offset is None else f"KERNELOFFSET={offset:x}\n"))

    def phys(self) -> Look[Layout]:
        """Memory by its physical address."""
        return layouts.flat((yield from self.memory_map()))

    def vmcoreinfo(self) -> Look[Layout]:
        """What the kernel tells debuggers."""
        return layouts.text(text_of((yield from self.note())))

    def vmcore(self) -> Look[Layout]:
        """An ELF core by physical address; without register notes where there are no registers."""
        memory = yield from self.memory_map()
        return (yield from self._core(memory, physical_ranges(memory), self._registers_or_none()))

    def kcore(self) -> Look[Layout]:
        """An ELF core by the kernel's virtual addresses."""
        memory, registers = (yield from self.memory_map()), self.registers()
        ranges = yield from self._translated(memory, registers[0])
        return (yield from self._core(memory, ranges, registers))

    def _core(
        self, memory: MemoryMap, ranges: Sequence[LoadedRange], registers: Sequence[Registers]
    ) -> Look[Layout]:
        if not self._is_x86():
            raise CheckpointError("ELF cores can be made only of x86-64 machines")
        try:
            note = yield from self.note()
        except CkptfsError:
            note = b""
        return layouts.core(build(EM_X86_64, machine_notes(registers, note), ranges, memory), memory)

    # ---- what they stand on ------------------------------------------------------------------------

    def memory_map(self) -> Look[MemoryMap]:
        """Where RAM lies in physical memory."""
        if self._memory is None:
            self._memory = yield from self._find_memory_map()
        return self._memory

    def _find_memory_map(self) -> Look[MemoryMap]:
        lengths = {idstr: block.used_length for idstr, block in self._blocks.items()}
        if self._known.named:
            return parse_map(self._known.named, lengths)
        plugged = plugged_in(self._known.trailer, lengths)
        memory = yield from self._main_memory(set(self._known.main) - {region.idstr for region in plugged})
        return with_plugged(memory, plugged, self._known.plugged)

    def _main_memory(self, idstrs: Collection[str]) -> Look[MemoryMap]:
        main = yield from self._in_node_order([block for block in self._blocks.values() if block.idstr in idstrs])
        if not main:
            raise UnknownMapError("no RAM block is known to be main memory")
        if (clock := self.device("mc146818rtc")) is not None:
            has_vga = any(idstr.endswith("vga.vram") for idstr in self._blocks)
            return pc_map(cmos_of(clock), main, has_vga, self._blocks.get("pc.bios"))
        machine = self._checkpoint.machine
        start = fixed_start(machine, self._cpu_fields())
        if start is None:
            raise UnknownMapError(f"where machine {machine!r} has its RAM is not known")
        return fixed_map(start, main, machine)

    def _in_node_order(self, blocks: list[RAMBlock]) -> Look[list[RAMBlock]]:
        if len(blocks) < 2:
            return blocks
        lengths = {block.idstr: block.used_length for block in blocks}
        order = None
        if (tables := self._blocks.get(acpi.BLOCK)) is not None:
            sizes = acpi.node_sizes((yield Place(acpi.BLOCK, 0, tables.used_length)))
            first = []
            for idstr, length in lengths.items():
                if length >= sum(_FIRMWARE_AREA) and any((yield Place(idstr, *_FIRMWARE_AREA))):
                    first.append(idstr)
            order = acpi.in_node_order(lengths, sizes, first)
        if order is None:
            raise UnknownMapError(f"which NUMA node each of {', '.join(lengths)} is is not known")
        return sorted(blocks, key=lambda block: order.index(block.idstr))

    def _is_x86(self) -> bool:
        return "env.eip" in self._cpu_fields()

    def _cpu_fields(self) -> Collection[str]:
        cpu = self.device("cpu")
        return () if cpu is None else cpu.fields

    def registers(self) -> tuple[Registers, ...]:
        """Those of all vCPUs, in QEMU's order."""
        cpus = sorted(self._sections("cpu"), key=lambda section: section.instance_id)
        registers = tuple(Registers.of(self._read(section)) for section in cpus)
        if not registers:
            raise CheckpointError("the checkpoint has no vCPU")
        if not all(one.is_long for one in registers):
            raise CheckpointError("a vCPU is not in long mode: no 64-bit kernel is running")
        return registers

    def _registers_or_none(self) -> tuple[Registers, ...]:
        try:
            return self.registers()
        except CkptfsError:
            return ()

    def note(self) -> Look[bytes]:
        """The kernel's note VMCOREINFO, as it lies in RAM."""
        device = self.device("vmcoreinfo")
        place = None if device is None else place_of(device)
        if place is None:
            why = "the machine has no device vmcoreinfo" if device is None else "the guest has not told of it"
            raise CheckpointError(f"VMCOREINFO: {why}")
        memory = yield from self.memory_map()
        return check_note((yield from physical(memory, place.address, place.length)))

    def _translated(self, memory: MemoryMap, registers: Registers) -> Look[list[LoadedRange]]:
        """Give the walk of the page tables what it asks for."""
        walk = kernel_ranges(registers, memory)
        try:
            address = next(walk)
            while True:
                address = walk.send((yield from physical(memory, address, TABLE_LENGTH)))
        except StopIteration as end:
            ranges: list[LoadedRange] = end.value
            return ranges

    # ---- devices -----------------------------------------------------------------------------------

    @cached_property
    def _blocks(self) -> dict[str, RAMBlock]:
        return {block.idstr: block for block in self._checkpoint.blocks}

    def device(self, idstr: str) -> DeviceState | None:
        """The first section of that name; None if there is none."""
        sections = self._sections(idstr)
        return self._read(sections[0]) if sections else None

    def _sections(self, idstr: str) -> list[Section]:
        return [section for section in self._checkpoint.sections if section.idstr == idstr]

    def _read(self, section: Section) -> DeviceState:
        return read_device(self._source, self._checkpoint, section)


def physical(memory: MemoryMap, address: int, length: int) -> Look[bytes]:
    """Bytes of physical memory. Raises CheckpointError where there is no RAM."""
    parts = []
    for size, region in memory.pieces(address, length):
        if region is None:
            raise CheckpointError(f"there is no RAM at {address:#x}")
        parts.append((yield Place(region.idstr, region.block_offset, size)))
        address += size
    return b"".join(parts)


MAKERS: Final[dict[str, Callable[[Looker], Look[Layout]]]] = {
    "map": Looker.map,
    "phys": Looker.phys,
    "vmcoreinfo": Looker.vmcoreinfo,
    "vmcore": Looker.vmcore,
    "kcore": Looker.kcore,
}
"""All files by name, in the order in which they are listed."""
