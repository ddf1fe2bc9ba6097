"""Checkpoints that stock QEMU wrote, each with what QEMU itself says is in the guest's memory."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import trio

from tests.qemu.guest import Guest
from tests.qemu.machine import VGA_AND_RNG, Qemu, VisibleRange

PREFIX_BYTE = b"\xa5"
"""What fills a file before the checkpoint's offset."""


@dataclass(frozen=True)
class Variant:
    """A machine, and how it is saved: stopped or `live`, and the arguments of Qemu.migrate_to."""

    machine: str = "pc"
    memory: str = "128M"
    devices: tuple[str, ...] = VGA_AND_RNG
    append: str = ""
    live: bool = False
    offset: int = 0
    multifd: int = 0
    direct_io: bool = False


@dataclass(frozen=True)
class StockCheckpoint:
    """A mapped-ram file, and the guest that was saved in it.

    `visible` is the guest's memory as it was saved; `last_tick` the last number that it had printed by then.
    """

    path: Path
    guest: Guest
    variant: Variant
    visible: list[VisibleRange]
    last_tick: int

    @property
    def offset(self) -> int:
        """Where in the file the checkpoint begins."""
        return self.variant.offset

    def qemu(self, *arguments: str, machine_options: str = "", incoming: str = "defer") -> Qemu:
        """The same machine, to load this checkpoint or one made from it.

        `machine_options` are appended to -machine's argument (",memory-backend=pc.ram").
        """
        return _qemu(self.guest, self.variant, *arguments, machine_options=machine_options, incoming=incoming)


class StockCheckpoints:
    """Makes checkpoints of one guest in `directory`, each variant once.

    Only the first of a machine boots; the others are saved by a QEMU that has loaded it.
    """

    def __init__(self, guest: Guest, directory: Path) -> None:
        self._guest = guest
        self._directory = directory
        self._made: dict[Variant, StockCheckpoint] = {}

    def __call__(self, **how: Any) -> StockCheckpoint:
        """The checkpoint saved in the way that Variant's fields in `how` say."""
        return self._checkpoint(Variant(**how))

    def _checkpoint(self, variant: Variant) -> StockCheckpoint:
        if variant not in self._made:
            plain = replace(variant, live=False, offset=0, multifd=0, direct_io=False)
            base = self._checkpoint(plain) if variant != plain else None
            with ThreadPoolExecutor(1) as thread:  # tests that are inside trio.run can't run another in theirs
                self._made[variant] = thread.submit(trio.run, self._save, variant, base).result()
        return self._made[variant]

    async def _save(self, variant: Variant, base: StockCheckpoint | None) -> StockCheckpoint:
        directory = self._directory / f"{len(self._made)}"
        directory.mkdir()
        path = directory / "migfile"
        path.write_bytes(PREFIX_BYTE * variant.offset)
        async with _qemu(self._guest, variant, incoming="defer" if base else None) as vm:
            if base:
                await vm.load(base.path)
            else:
                await vm.tick()
            if variant.live:
                await vm.cont()
                await vm.tick()
            else:
                await vm.stop()
            await vm.migrate_to(path, offset=variant.offset, multifd=variant.multifd, direct_io=variant.direct_io)
            visible = await vm.save_visible_ranges(directory)
            last_tick = max(vm.ticks(), default=base.last_tick if base else 0)
        return StockCheckpoint(path, self._guest, variant, visible, last_tick)


def assert_ram_equals(
    ram: bytes | bytearray | memoryview, visible: list[VisibleRange], region: str = "pc.ram"
) -> None:
    """Compare a block's bytes with what QEMU showed of it.

    What physical memory does not show of a block (Qemu.save_visible_ranges) can't be compared and isn't.
    """
    ranges = [visible_range for visible_range in visible if visible_range.region == region]
    assert ranges, f"QEMU showed nothing of {region}"
    block = np.frombuffer(ram, np.uint8)
    for visible_range in ranges:
        start, length = visible_range.block_offset, visible_range.length
        shown = np.fromfile(visible_range.data, np.uint8)
        different = np.flatnonzero(block[start : start + length] != shown)
        assert not different.size, (
            f"{region}: {different.size} bytes differ, the first at block_offset {start + different[0]:#x}"
        )


def _qemu(guest: Guest, variant: Variant, *arguments: str, machine_options: str = "", incoming: str | None) -> Qemu:
    return Qemu(
        guest,
        *variant.devices,
        *arguments,
        machine=variant.machine + machine_options,
        memory=variant.memory,
        append=variant.append,
        incoming=incoming,
    )
