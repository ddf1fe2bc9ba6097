"""Capability validate-uuid, both ways with stock QEMU."""

from pathlib import Path
from uuid import UUID

import pytest

from ckptfs.channels.backing_file import FileSource
from ckptfs.mapped_ram.checkpoint import Checkpoint, read_checkpoint
from ckptfs.mapped_ram.precopy import read_precopy
from tests.mount.conftest import Mount
from tests.mount.harness import run_mount
from tests.qemu.guest import Guest
from tests.qemu.machine import Qemu
from tests.qemu.stock_checkpoint import StockCheckpoints

OURS = UUID("11111111-2222-3333-4444-555555555555")
OTHER = UUID("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")


def read(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        return read_checkpoint(FileSource(file.fileno()))[0]


def described(checkpoint: Checkpoint) -> list[str]:
    """The configuration's subsections in the vmdesc."""
    assert checkpoint.vmdesc is not None
    return [entry["vmsd_name"] for entry in checkpoint.vmdesc["configuration"]["subsections"]]


async def test_the_uuid_of_a_stock_checkpoint(
    stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    stock = stock_checkpoint()
    path = tmp_path / "stock"
    async with stock.qemu("-uuid", str(OURS)) as vm:
        await vm.load(stock.path)
        await vm.qmp("migrate-set-capabilities", capabilities=[{"capability": "validate-uuid", "state": True}])
        await vm.migrate_to(path)
    assert read(path).uuid == OURS

    directory = tmp_path / "refused"
    directory.mkdir()
    result = run_mount(path, directory, f"uuid={OTHER},validate_uuid=on")
    assert result.returncode == 32
    assert f"{path}: at byte 0x0: UUID received is {OURS} and local is {OTHER}" in result.stderr

    mount(path, f"uuid={OTHER}")  # the capability decides
    mounted = mount(path, f"uuid={OURS},validate_uuid=on")
    kept, dropped = tmp_path / "kept", tmp_path / "dropped"
    mounted.ctl(f"save {kept}")
    mounted.ctl("migrate_set_capability validate-uuid off")
    mounted.ctl(f"save {dropped}")
    mounted.umount()
    assert (read(kept).uuid, read(dropped).uuid) == (OURS, None)
    assert described(read(kept)) == ["configuration/capabilities", "configuration/uuid"]
    assert described(read(dropped)) == ["configuration/capabilities"]
    assert read(kept).vmdesc == read(path).vmdesc

    async with stock.qemu("-uuid", str(OURS)) as vm:
        await vm.load(kept)
        await vm.cont()
        assert await vm.tick() > stock.last_tick
    async with stock.qemu("-uuid", str(OTHER)) as vm:
        await vm.load(dropped)
    with pytest.raises(EOFError) as error:
        async with stock.qemu("-uuid", str(OTHER)) as vm:
            await vm.load(kept)
    assert f"UUID received is {OURS} and local is {OTHER}" in "\n".join(error.value.__notes__)


@pytest.mark.parametrize("options", ["mapped_ram=on", "multifd=off,mapped_ram=off"])
def test_a_new_guest_has_the_uuid_of_its_mount(options: str, mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    mounted = mount(path, f"ram=pc.ram:1M,uuid={OURS},validate_uuid=on,{options}")
    mounted.ctl("save")
    mounted.umount()
    with path.open("rb") as file:
        source = FileSource(file.fileno())
        checkpoint = read_precopy(source).checkpoint if "off" in options else read_checkpoint(source)[0]
    assert checkpoint.uuid == OURS
    assert "configuration/uuid" in described(checkpoint)


@pytest.mark.parametrize("local", [OURS, OTHER])
async def test_a_live_checkpoint_has_the_uuid_of_its_machine(
    local: UUID, guest_files: Guest, mount: Mount, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    mounted = mount(path, f"ram=pc.ram:128M,uuid={local},validate_uuid=on")
    backend = f"memory-backend-file,id=pc.ram,size=128M,mem-path={mounted.ram}/pc.ram,share=on"
    machine = "pc,memory-backend=pc.ram"
    async with Qemu(guest_files, "-object", backend, "-uuid", str(OURS), machine=machine) as vm:
        await vm.tick()
        mounted.ctl(f"qmp {vm.qmp_path}")
        if local == OURS:
            mounted.ctl("save")
            assert read(path).uuid == OURS
        else:
            with pytest.raises(OSError, match=f"UUID received is {OURS} and local is {OTHER}"):
                mounted.ctl("save")
            assert not path.exists()
        mounted.ctl("migrate_set_capability validate-uuid off")
        mounted.ctl("save")
        assert read(path).uuid is None
        await vm.tick()
