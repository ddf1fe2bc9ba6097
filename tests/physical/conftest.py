"""Checkpoints of stopped guests that stock QEMU wrote, each with its own dump of the same memory."""

import os
import shutil
import struct
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from ckptfs.channels.backing_file import FileSource
from ckptfs.mapped_ram.checkpoint import Checkpoint, read_checkpoint
from ckptfs.physical.devices import find_device, read_device
from ckptfs.physical.memory_map import MemoryMap, cmos_of, pc_map
from ckptfs.physical.registers import Registers
from tests.mount.conftest import _adopt_orphans, mount, public
from tests.physical.elf import Elf, read_elf
from tests.qemu.guest import Guest
from tests.qemu.machine import DEADLINE, Qemu
from tests.qemu.qmp import QmpError

__all__ = ["_adopt_orphans", "mount", "public"]

PROBES = (0xFFFFFFFF81000000, 0xFFFFFFFF82000000, 0xFFFF888000000000, 0xFFFF888004000000)
"""Virtual addresses of a Linux kernel without KASLR: its text and data, and the direct map."""


def numa(*sizes: str) -> tuple[str, ...]:
    """QEMU's arguments for nodes of these sizes: m0, m1 ..."""
    nodes = [
        ("-object", f"memory-backend-ram,id=m{node},size={size}", "-numa", f"node,memdev=m{node}")
        for node, size in enumerate(sizes)
    ]
    return tuple(word for node in nodes for word in node)


MiB = 1 << 20
GiB = 1 << 30


@dataclass(frozen=True)
class Large:
    """A guest of 5 GiB whose memory goes up to address `hole`, and on at 4 GiB."""

    arguments: tuple[str, ...]
    append: str
    hole: int

    @property
    def samples(self) -> list[tuple[int, int]]:
        """Physical memory that is compared, begin and length: at the ends of all regions, and where nodes meet."""
        stop = 9 * GiB - self.hole
        return [(0, 16 * MiB), *((at - 16 * MiB, 32 * MiB) for at in {2 * GiB, self.hole, 4 * GiB, stop})]


LARGE = {
    "pc": Large(numa("2G", "3G"), "", 3 * GiB),
    "q35": Large(("-device", "vmcoreinfo"), "vmcoreinfo=1", 2 * GiB),
}


@dataclass(frozen=True)
class Saved:
    """What stock QEMU wrote of a stopped guest, and what it says of it."""

    path: Path
    checkpoint: Checkpoint
    source: FileSource
    dump: Elf | None
    """Of a Linux only."""
    mtree: str
    physical: dict[int, int | None]
    """What QEMU translates `PROBES` to."""
    samples: tuple[Elf, ...] = ()
    """Of a large Linux: dumps of some of its memory; in `dump` there is no more than headers and notes."""

    def memory(self, *main: str) -> MemoryMap:
        """Where ckptfs says that RAM is."""
        clock = find_device(self.source, self.checkpoint, "mc146818rtc")
        assert clock is not None
        blocks = {block.idstr: block for block in self.checkpoint.blocks}
        has_vga = any(idstr.endswith("vga.vram") for idstr in blocks)
        return pc_map(cmos_of(clock), [blocks[idstr] for idstr in main], has_vga, blocks["pc.bios"])

    def block(self, idstr: str) -> bytes:
        """What is in a small block, all pages of which are in the file."""
        block = next(block for block in self.checkpoint.blocks if block.idstr == idstr)
        assert block.pages_offset is not None
        return self.source.pread(block.pages_offset, block.used_length)

    def registers(self) -> list[Registers]:
        """What ckptfs finds of all vCPUs."""
        sections = [section for section in self.checkpoint.sections if section.idstr == "cpu"]
        return [Registers.of(read_device(self.source, self.checkpoint, section)) for section in sections]


class SavedGuests:
    """Makes them in `directory`."""

    def __init__(self, guest: Guest, directory: Path, resources: ExitStack) -> None:
        self._guest = guest
        self._directory = directory
        self._resources = resources
        self._linux: Saved | None = None
        self._told: Saved | None = None
        self._large: dict[str, Saved] = {}

    def linux(self) -> Saved:
        """A Linux with two vCPUs, without KASLR."""
        if self._linux is None:
            vm = Qemu(self._guest, "-smp", "2", append="nokaslr")
            self._linux = self._save("linux", vm, Qemu.tick, dump=True)
        return self._linux

    def told(self) -> Saved:
        """A Linux with KASLR that has told QEMU of its VMCOREINFO, on a q35 of two NUMA nodes."""
        if self._told is None:
            arguments = ("-smp", "2", "-device", "vmcoreinfo", *numa("128M", "64M"))
            vm = Qemu(self._guest, *arguments, machine="q35", memory="192M", append="vmcoreinfo=1")
            self._told = self._save("told", vm, Qemu.tick, dump=True)
        return self._told

    def large(self, machine: str) -> Saved:
        """A Linux with memory above 4 GiB: a pc of two NUMA nodes, or a q35 that has told of its VMCOREINFO."""
        if machine not in self._large:
            one = LARGE[machine]
            vm = Qemu(self._guest, "-smp", "2", *one.arguments, machine=machine, memory="5G", append=one.append)
            self._large[machine] = self._save(f"large-{machine}", vm, Qemu.tick, dump=True, samples=one.samples)
        return self._large[machine]

    def firmware(self, name: str, machine: str, memory: str, *arguments: str) -> Saved:
        """A machine whose firmware has come to its end."""
        vm = Qemu(self._guest, *arguments, machine=machine, memory=memory, append="panic=0")
        return self._save(name, vm, _firmware_has_run, dump=False)

    def _save(
        self,
        name: str,
        vm: Qemu,
        ready: Callable[[Qemu], Awaitable[object]],
        *,
        dump: bool,
        samples: Sequence[tuple[int, int]] = (),
    ) -> Saved:
        directory = self._directory / name
        directory.mkdir()

        async def save() -> tuple[str, dict[int, int | None]]:
            async with vm:
                await ready(vm)
                await vm.stop()
                await vm.migrate_to(directory / "migfile")
                if samples:
                    await _dump_head(vm, directory / "dump")
                elif dump:
                    await vm.qmp("dump-guest-memory", paging=False, protocol=f"file:{directory / 'dump'}")
                for begin, length in samples:
                    path = directory / f"{begin:x}"
                    await vm.qmp(
                        "dump-guest-memory", paging=False, protocol=f"file:{path}", begin=begin, length=length
                    )
                physical = {virtual: _address(await vm.hmp(f"gva2gpa {virtual:#x}")) for virtual in PROBES}
                return await vm.hmp("info mtree -f"), physical

        with ThreadPoolExecutor(1) as thread:  # tests that are inside trio.run can't run another in theirs
            mtree, physical = thread.submit(trio.run, save).result()
        fd = os.open(directory / "migfile", os.O_RDONLY)
        self._resources.callback(os.close, fd)
        source = FileSource(fd)
        elf = read_elf(directory / "dump") if dump else None
        parts = tuple(read_elf(directory / f"{begin:x}") for begin, _ in samples)
        return Saved(directory / "migfile", read_checkpoint(source)[0], source, elf, mtree, physical, parts)


async def _firmware_has_run(vm: Qemu) -> None:
    """Wait until the firmware has copied itself into RAM below 1 MiB, and locked that."""
    with trio.fail_after(DEADLINE):
        while "00000000000f0000-00000000000fffff (prio 0, rom)" not in await vm.hmp("info mtree -f"):
            await trio.lowlevel.checkpoint()


async def _dump_head(vm: Qemu, path: Path) -> None:
    """Have QEMU write all headers and notes of a dump, and stop it when the memory comes."""
    fifo = path.with_suffix(".fifo")
    os.mkfifo(fifo)

    def take() -> None:
        with fifo.open("rb") as pipe:
            head = pipe.read(1 << 16)
        offset, (size, count) = struct.unpack_from("<Q", head, 32)[0], struct.unpack_from("<HH", head, 54)
        headers = [struct.unpack_from("<IIQ", head, offset + size * index) for index in range(count)]
        path.write_bytes(head[: min(start for kind, _, start in headers if kind == 1)])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, take)
        with pytest.raises(QmpError, match="Broken pipe"):
            await vm.qmp("dump-guest-memory", paging=False, protocol=f"file:{fifo}")


def _address(answer: str) -> int | None:
    """What gva2gpa says."""
    head, _, number = answer.strip().partition(": ")
    return int(number, 16) if head == "gpa" else None


@pytest.fixture(scope="session")
def saved(guest_files: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SavedGuests]:
    """`saved.linux()`, `saved.firmware(NAME, MACHINE, MEMORY)`."""
    directory = tmp_path_factory.mktemp("saved")
    with ExitStack() as resources:
        yield SavedGuests(guest_files, directory, resources)
    shutil.rmtree(directory)
