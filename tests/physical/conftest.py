"""Checkpoints of stopped guests that stock QEMU wrote, each with its own dump of the same memory."""

import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
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

__all__ = ["_adopt_orphans", "mount", "public"]

PROBES = (0xFFFFFFFF81000000, 0xFFFFFFFF82000000, 0xFFFF888000000000, 0xFFFF888004000000)
"""Virtual addresses of a Linux kernel without KASLR: its text and data, and the direct map."""


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

    def linux(self) -> Saved:
        """A Linux with two vCPUs, without KASLR."""
        if self._linux is None:
            vm = Qemu(self._guest, "-smp", "2", append="nokaslr")
            self._linux = self._save("linux", vm, Qemu.tick, dump=True)
        return self._linux

    def told(self) -> Saved:
        """A Linux with KASLR that has told QEMU of its VMCOREINFO, on a q35 of two NUMA nodes."""
        if self._told is None:
            nodes = [
                word
                for node, size in (("m0", "128M"), ("m1", "64M"))
                for word in ("-object", f"memory-backend-ram,id={node},size={size}", "-numa", f"node,memdev={node}")
            ]
            arguments = ("-smp", "2", "-device", "vmcoreinfo", *nodes)
            vm = Qemu(self._guest, *arguments, machine="q35", memory="192M", append="vmcoreinfo=1")
            self._told = self._save("told", vm, Qemu.tick, dump=True)
        return self._told

    def firmware(self, name: str, machine: str, memory: str, *arguments: str) -> Saved:
        """A machine whose firmware has come to its end."""
        vm = Qemu(self._guest, *arguments, machine=machine, memory=memory, append="panic=0")
        return self._save(name, vm, _firmware_has_run, dump=False)

    def _save(self, name: str, vm: Qemu, ready: Callable[[Qemu], Awaitable[object]], *, dump: bool) -> Saved:
        directory = self._directory / name
        directory.mkdir()

        async def save() -> tuple[str, dict[int, int | None]]:
            async with vm:
                await ready(vm)
                await vm.stop()
                await vm.migrate_to(directory / "migfile")
                if dump:
                    await vm.qmp("dump-guest-memory", paging=False, protocol=f"file:{directory / 'dump'}")
                physical = {virtual: _address(await vm.hmp(f"gva2gpa {virtual:#x}")) for virtual in PROBES}
                return await vm.hmp("info mtree -f"), physical

        with ThreadPoolExecutor(1) as thread:  # tests that are inside trio.run can't run another in theirs
            mtree, physical = thread.submit(trio.run, save).result()
        fd = os.open(directory / "migfile", os.O_RDONLY)
        self._resources.callback(os.close, fd)
        source = FileSource(fd)
        elf = read_elf(directory / "dump") if dump else None
        return Saved(directory / "migfile", read_checkpoint(source)[0], source, elf, mtree, physical)


async def _firmware_has_run(vm: Qemu) -> None:
    """Wait until the firmware has copied itself into RAM below 1 MiB, and locked that."""
    with trio.fail_after(DEADLINE):
        while "00000000000f0000-00000000000fffff (prio 0, rom)" not in await vm.hmp("info mtree -f"):
            await trio.lowlevel.checkpoint()


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
