"""A checkpoint of a running guest loads in stock QEMU; any checkpoint is started from at once."""

from pathlib import Path
from typing import Any

import pytest

from tests.live.machines import NUMA, PC, Q35, LiveCheckpoint, LiveCheckpoints, Machine, assert_holds, goes_on
from tests.mount.conftest import Mount

MACHINES = [PC, Q35, NUMA]
LOADS: list[dict[str, Any]] = [{}, {"multifd": 2}, {"multifd": 4, "direct_io": True}]


async def assert_stock_qemu_runs(checkpoint: LiveCheckpoint, **load: Any) -> None:
    """Ordinary QEMU, with anonymous RAM, goes on from it by itself."""
    async with checkpoint.machine.anonymous(checkpoint.guest) as vm:
        await vm.load(checkpoint.path, **load)
        assert await vm.run_state() == "running"
        assert await vm.tick() > checkpoint.last_tick
        await goes_on(vm)


@pytest.mark.parametrize("load", LOADS, ids=str)
@pytest.mark.parametrize("machine", MACHINES, ids=str)
async def test_a_live_checkpoint_loads_in_stock_qemu(
    machine: Machine, load: dict[str, Any], checkpoints: LiveCheckpoints
) -> None:
    await assert_stock_qemu_runs(checkpoints.live(machine), **load)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
async def test_a_guest_starts_on_what_qemu_saved_alone_and_is_saved_live(
    machine: Machine, checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    checkpoint = checkpoints.stock(machine)
    mounted = mount(checkpoint.path)
    incoming = f"file:{mounted.path}/vmstate"
    async with machine.on(mounted.ram, checkpoint.guest, incoming=incoming) as vm:
        await vm.cont()
        tick = await vm.tick()
        assert tick > checkpoint.last_tick
        assert mounted.status()["checkpoint-pages"] > 0, "it should come as it is touched"
        mounted.ctl(f"qmp {vm.qmp_path}")
        last_tick = vm.ticks()[-1]
        mounted.ctl(f"save {tmp_path / 'again'}")
        assert await goes_on(vm) > tick
    mounted.umount()
    await assert_stock_qemu_runs(LiveCheckpoint(tmp_path / "again", machine, checkpoint.guest, last_tick))


@pytest.mark.parametrize(
    ("machine", "share"),
    [(PC, "share=off"), (NUMA, "share=off"), (Q35, "share=off,readonly=on,rom=off")],
    ids=str,
)
async def test_two_guests_with_private_ram_start_on_one_mount(
    machine: Machine, share: str, checkpoints: LiveCheckpoints, mount: Mount
) -> None:
    checkpoint = checkpoints.live(machine)
    mounted = mount(checkpoint.path, *(["ro"] if "readonly" in share else []))
    incoming = f"file:{mounted.path}/vmstate"
    async with (
        machine.on(mounted.ram, checkpoint.guest, share=share, incoming=incoming) as one,
        machine.on(mounted.ram, checkpoint.guest, share=share, incoming=incoming) as other,
    ):
        for vm in (one, other):
            assert await vm.tick() > checkpoint.last_tick
            await goes_on(vm)
    assert mounted.status()["written-pages"] == 0
    assert_holds(mounted.ram, checkpoint.path)
