"""Plain streams whose section "ram" has no END, as QEMU writes them with capability background-snapshot."""

from pathlib import Path

from tests.mount.conftest import Mount
from tests.qemu.guest import Guest
from tests.qemu.machine import Qemu
from tests.qemu.stock_checkpoint import assert_ram_equals


async def test_a_snapshot_of_stock_qemu(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    async with Qemu(guest_files) as vm:
        await vm.tick()
        await vm.stop()
        visible = await vm.save_visible_ranges(tmp_path)
        capabilities = [{"capability": name, "state": True} for name in ("background-snapshot", "events")]
        await vm.qmp("migrate-set-capabilities", capabilities=capabilities)
        await vm.qmp("migrate", uri=f"file:{path}")
        await vm.migrated()
    mounted = mount(path)
    assert_ram_equals((mounted.ram / "pc.ram").read_bytes(), visible)
    assert mounted.status()["base-devices"][-1] == "globalstate"
