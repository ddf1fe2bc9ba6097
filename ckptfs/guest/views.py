"""A checkpoint's memory in the forms that debuggers open: laid out here, read where RAM is.

What can't be made of a checkpoint is left out, and `Views.missing` says why. All views are of the checkpoint's one
moment: registers belong to RAM as device state does, so once RAM was written nothing is served (`refuse_written`).
"""

import errno
from collections.abc import Awaitable, Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from ckptfs.errors import CheckpointError, CkptfsError, StateError
from ckptfs.guest.base import Base
from ckptfs.guest.guest import Guest
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.sections import Section
from ckptfs.physical import acpi, layouts
from ckptfs.physical.devices import DeviceState, read_device
from ckptfs.physical.elf_core import EM_X86_64, LoadedRange, build, machine_notes, physical_ranges
from ckptfs.physical.layouts import Layout
from ckptfs.physical.memory_map import MemoryMap, cmos_of, fixed_map, fixed_start, parse_map, pc_map
from ckptfs.physical.page_tables import TABLE_LENGTH, kernel_ranges
from ckptfs.physical.registers import Registers
from ckptfs.physical.vmcoreinfo import check_note, kernel_offset, place_of, text_of

_FIRMWARE_AREA = (0xF0000, 0x10000)
"""Where a PC's firmware has copied itself to: start and length."""

_READ_LENGTH = 1 << 20

T = TypeVar("T")


@dataclass
class Views:
    """What there is of one base: layouts by name, and why the others are missing."""

    layouts: dict[str, Layout] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


async def look(guest: Guest, backends: Collection[str], named: Sequence[str] = ()) -> Views:
    """Find out what can be shown of the guest's base.

    ``backends`` are the idstrs of its main memory, ``named`` is the user's memory map (`parse_map`). Reads a few
    pages of RAM: the firmware's tables, and a kernel's note and page tables.
    """
    views = Views()
    if guest.base is None:
        return views
    looker = _Looker(guest, guest.base, backends, named)
    for name, make in MAKERS.items():
        try:
            views.layouts[name] = await make(looker)
        except (CkptfsError, OSError) as error:
            views.missing[name] = str(error)
    return views


def refuse_written(guest: Guest) -> None:
    """Raise StateError (EPERM) where RAM is not the checkpoint's any more."""
    if guest.has_written:
        raise StateError(
            "pages were written since the checkpoint, so its registers do not belong to this RAM: "
            "`reset` drops them, `save` makes a new checkpoint",
            errno.EPERM,
        )


async def read_layout(guest: Guest, layout: Layout, offset: int, length: int) -> bytes:
    """Return up to ``length`` bytes of a view; fewer only at its end. Raises StorageError for a bad page."""
    parts = []
    for size, content in layout.pieces(offset, length):
        if content is None:
            parts.append(bytes(size))
        elif isinstance(content, bytes):
            parts.append(content)
        else:
            parts.append(await _read_block(guest, content.idstr, content.block_offset, size))
    return b"".join(parts)


async def _read_block(guest: Guest, idstr: str, block_offset: int, length: int) -> bytes:
    """Bytes of a block, as many as one likes."""
    stop = block_offset + length
    starts = range(block_offset, stop, _READ_LENGTH)
    return b"".join(
        [bytes(await guest.read(guest.blocks[idstr], start, min(_READ_LENGTH, stop - start))) for start in starts]
    )


class _Looker:
    """Makes the views of one base; each method is a view, and raises CkptfsError where it can't be made."""

    def __init__(self, guest: Guest, base: Base, backends: Collection[str], named: Sequence[str]) -> None:
        self._guest: Final = guest
        self._base: Final = base
        self._backends: Final = backends
        self._named: Final = named
        self._memory: MemoryMap | None = None

    async def map(self) -> Layout:
        """The memory map as a text, and by how much the kernel is moved, if it tells."""
        text = (await self._memory_map()).text()
        try:
            offset = kernel_offset(await self._note())
        except CkptfsError:
            offset = None
        return layouts.text((text + ("" if offset is None else f"KERNELOFFSET={offset:x}\n")).encode())

    async def phys(self) -> Layout:
        """Memory by its physical address."""
        return layouts.flat(await self._memory_map())

    async def vmcoreinfo(self) -> Layout:
        """What the kernel tells debuggers."""
        return layouts.text(text_of(await self._note()).encode())

    async def vmcore(self) -> Layout:
        """An ELF core by physical address; without register notes where there are no registers."""
        memory = await self._memory_map()
        return await self._core(memory, physical_ranges(memory), await self._registers_or_none())

    async def kcore(self) -> Layout:
        """An ELF core by the kernel's virtual addresses."""
        memory, registers = await self._memory_map(), self._registers()
        ranges = await self._translated(memory, registers[0])
        return await self._core(memory, ranges, registers)

    async def _core(
        self, memory: MemoryMap, ranges: Sequence[LoadedRange], registers: Sequence[Registers]
    ) -> Layout:
        if not self._is_x86():
            raise CheckpointError("cores are made of x86-64 machines only")
        try:
            note = await self._note()
        except CkptfsError:
            note = b""
        return layouts.core(build(EM_X86_64, machine_notes(registers, note), ranges, memory), memory)

    # ---- what they stand on ------------------------------------------------------------------------

    async def _memory_map(self) -> MemoryMap:
        if self._memory is None:
            self._memory = await self._find_memory_map()
        return self._memory

    async def _find_memory_map(self) -> MemoryMap:
        checkpoint = self._base.checkpoint
        blocks = {block.idstr: block for block in checkpoint.blocks}
        if self._named:
            return parse_map(self._named, blocks)
        main = await self._in_node_order([blocks[idstr] for idstr in blocks if idstr in self._backends])
        if not main:
            raise CheckpointError("no RAM block is known to be main memory: -o map=ID@ADDRESS names their places")
        if (clock := self._device("mc146818rtc")) is not None:
            has_vga = any(idstr.endswith("vga.vram") for idstr in blocks)
            return pc_map(cmos_of(clock), main, has_vga, blocks.get("pc.bios"))
        start = fixed_start(checkpoint.machine, self._cpu_fields())
        if start is None:
            raise CheckpointError(
                f"where machine {checkpoint.machine!r} has its RAM is not known: -o map=ID@ADDRESS tells it"
            )
        return fixed_map(start, main, checkpoint.machine)

    async def _in_node_order(self, blocks: list[RAMBlock]) -> list[RAMBlock]:
        if len(blocks) < 2:
            return blocks
        lengths = {block.idstr: block.used_length for block in blocks}
        order = None
        if acpi.BLOCK in self._guest.blocks:
            tables = self._guest.blocks[acpi.BLOCK]
            sizes = acpi.node_sizes(await _read_block(self._guest, acpi.BLOCK, 0, tables.used_length))
            first = [idstr for idstr in lengths if await self._has_firmware(idstr)]
            order = acpi.in_node_order(lengths, sizes, first)
        if order is None:
            raise CheckpointError(
                f"which NUMA node each of {', '.join(lengths)} is can't be told: -o map=ID@ADDRESS tells it"
            )
        return sorted(blocks, key=lambda block: order.index(block.idstr))

    async def _has_firmware(self, idstr: str) -> bool:
        return any(await _read_block(self._guest, idstr, *_FIRMWARE_AREA))

    def _is_x86(self) -> bool:
        return "env.eip" in self._cpu_fields()

    def _cpu_fields(self) -> Collection[str]:
        cpu = self._device("cpu")
        return () if cpu is None else cpu.fields

    def _registers(self) -> tuple[Registers, ...]:
        """Those of all vCPUs, in QEMU's order."""
        cpus = sorted(self._sections("cpu"), key=lambda section: section.instance_id)
        registers = tuple(Registers.of(self._read(section)) for section in cpus)
        if not registers:
            raise CheckpointError("the checkpoint holds no vCPU")
        if not all(one.is_long for one in registers):
            raise CheckpointError("a vCPU is not in long mode yet: no kernel runs that has 64-bit addresses")
        return registers

    async def _registers_or_none(self) -> tuple[Registers, ...]:
        try:
            return self._registers()
        except CkptfsError:
            return ()

    async def _note(self) -> bytes:
        device = self._device("vmcoreinfo")
        place = None if device is None else place_of(device)
        if place is None:
            why = "the machine has no device vmcoreinfo" if device is None else "the guest has not told of it"
            raise CheckpointError(f"VMCOREINFO: {why}")
        return check_note(await self._physical(await self._memory_map(), place.address, place.length))

    async def _translated(self, memory: MemoryMap, registers: Registers) -> list[LoadedRange]:
        return await self._driven(kernel_ranges(registers, memory), memory)

    async def _driven(self, walk: Generator[int, bytes, T], memory: MemoryMap) -> T:
        """Give a walk the tables that it asks for."""
        try:
            address = next(walk)
            while True:
                address = walk.send(await self._physical(memory, address, TABLE_LENGTH))
        except StopIteration as end:
            result: T = end.value
            return result

    async def _physical(self, memory: MemoryMap, address: int, length: int) -> bytes:
        parts = []
        for size, region in memory.pieces(address, length):
            if region is None:
                raise CheckpointError(f"there is no RAM at {address:#x}")
            parts.append(await _read_block(self._guest, region.idstr, region.block_offset, size))
        return b"".join(parts)

    # ---- device sections, which the base holds in memory -------------------------------------------

    def _sections(self, idstr: str) -> list[Section]:
        return [section for section in self._base.checkpoint.sections if section.idstr == idstr]

    def _device(self, idstr: str) -> DeviceState | None:
        sections = self._sections(idstr)
        return self._read(sections[0]) if sections else None

    def _read(self, section: Section) -> DeviceState:
        return read_device(_DeviceState(self._base), self._base.checkpoint, section)


class _DeviceState:
    """The device state of a base as a source: bytes by their offset in the file."""

    def __init__(self, base: Base) -> None:
        self._data = base.device_state
        self._start = base.checkpoint.device_state_offset
        self.length = self._start + len(self._data)

    def pread(self, file_offset: int, length: int) -> bytes:
        """Bytes of the device state."""
        return self._data[file_offset - self._start : file_offset - self._start + length]


MAKERS: Final[dict[str, Callable[[_Looker], Awaitable[Layout]]]] = {
    "map": _Looker.map,
    "phys": _Looker.phys,
    "vmcoreinfo": _Looker.vmcoreinfo,
    "vmcore": _Looker.vmcore,
    "kcore": _Looker.kcore,
}
"""All views by name, in the order in which they are listed."""
