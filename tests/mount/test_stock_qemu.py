"""Checkpoints that stock QEMU wrote, mounted; and what the mount saves, loaded by stock QEMU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptfs.namespace.names import encode_name
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.qemu.stock_checkpoint import StockCheckpoint, StockCheckpoints, assert_ram_equals

VARIANTS: list[dict[str, Any]] = [
    {},
    {"multifd": 2},
    {"multifd": 4, "direct_io": True},
    {"offset": 0x1001},
    {"machine": "q35", "live": True},
]
LOADS: list[dict[str, Any]] = [{}, {"multifd": 2}, {"multifd": 4, "direct_io": True}]


def spec_of(checkpoint: StockCheckpoint) -> str:
    offset = f",offset={checkpoint.offset:#x}" if checkpoint.offset else ""
    return f"file:{checkpoint.path}{offset}"


@pytest.mark.parametrize("how", VARIANTS, ids=str)
def test_every_block_is_what_qemu_says(
    how: dict[str, Any], stock_checkpoint: StockCheckpoints, mount: Mount
) -> None:
    checkpoint = stock_checkpoint(**how)
    mounted = mount(spec_of(checkpoint))
    decoded = decode(checkpoint.path, checkpoint.offset)
    names = {encode_name(idstr).decode(): idstr for idstr in decoded.blocks}
    assert {file.name for file in mounted.ram.iterdir()} == set(names)
    assert {"pc.ram", "%2From@etc%2Facpi%2Ftables"} < set(names)
    shown = {visible.region for visible in checkpoint.visible}
    assert {"pc.ram", "vga.vram", "pc.bios"} <= shown
    for name, idstr in names.items():
        ram = (mounted.ram / name).read_bytes()
        assert np.array_equal(np.frombuffer(ram, np.uint8), decoded.blocks[idstr]), idstr
        region = idstr.rpartition("/")[2] if idstr.endswith("vga.vram") else idstr
        if region in shown:
            assert_ram_equals(ram, checkpoint.visible, region)
            shown.remove(region)
    assert not shown, "QEMU has RAM that the mount has not"


@pytest.mark.parametrize("how", [{}, {"multifd": 4, "direct_io": True}, {"offset": 0x1001}], ids=str)
async def test_a_mount_saved_again_runs_on_in_stock_qemu(
    how: dict[str, Any], stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    checkpoint = stock_checkpoint(**how)
    mounted = mount(spec_of(checkpoint))
    again = tmp_path / "again"
    mounted.ctl(f"save {again}")
    mounted.umount()
    source, saved = decode(checkpoint.path, checkpoint.offset), decode(again)
    assert saved.device_sections == source.device_sections
    assert list(saved.blocks) == list(source.blocks)
    assert all(np.array_equal(saved.blocks[idstr], ram) for idstr, ram in source.blocks.items())
    for load in LOADS if not how else LOADS[-1:]:
        async with checkpoint.qemu() as vm:
            await vm.load(again, **load)
            await vm.cont()
            tick = await vm.tick()
            assert tick > checkpoint.last_tick
            assert await vm.tick() == tick + 1
