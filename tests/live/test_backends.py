"""A QEMU whose RAM is not all on the mount, or not shared.

It is refused before its guest is stopped, and told how to start.
"""

import errno
import os
from pathlib import Path

import pytest

from ckptfs.channels.backing_file import FileSource
from ckptfs.mapped_ram.checkpoint import read_checkpoint
from tests.live.machines import SMALL, goes_on, was_stopped
from tests.mount.conftest import Mount
from tests.mount.harness import Mounted
from tests.qemu.guest import Guest
from tests.qemu.machine import Qemu

LENGTH = 128 << 20
ON_PC_RAM = ("-machine", "pc,memory-backend=pc.ram")
ON_RAM0 = ("-machine", "pc,memory-backend=ram0")
DIMM = ("-m", "128M,slots=2,maxmem=512M", "-object", "memory-backend-ram,id=dimm0,size=64M")
DIMM += ("-device", "pc-dimm,memdev=dimm0")


def wanted(mounted: Mounted) -> str:
    """How QEMU has to be started."""
    return f"-object memory-backend-file,id=pc.ram,size={LENGTH},mem-path={mounted.ram}/pc.ram,share=on"


def backend(kind: str) -> tuple[str, str]:
    return "-object", f"memory-backend-{kind},size=128M"


async def assert_refused_at_once(vm: Qemu, mounted: Mounted, words: str, target: Path) -> None:
    mounted.ctl(f"qmp {vm.qmp_path}")
    with pytest.raises(OSError, match="QEMU") as caught:
        mounted.ctl(f"save {target}")
    assert caught.value.errno == errno.EINVAL
    assert words in str(caught.value)
    assert await vm.run_state() == "running"
    assert not await was_stopped(vm)
    assert list(target.parent.glob(f"*{target.name}*")) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "QEMU's RAM 'pc.ram' is a memory-backend-ram, not a file of this mount: start QEMU with {wanted}"),
        (
            (*backend("memfd,id=pc.ram,share=on"), *ON_PC_RAM),
            "QEMU's RAM 'pc.ram' is a memory-backend-memfd, not a file of this mount: start QEMU with {wanted}",
        ),
        (
            (*backend("file,id=pc.ram,share=off,mem-path={ram}/pc.ram"), *ON_PC_RAM),
            "QEMU's RAM 'pc.ram' is share=off, so what it writes stays private: start QEMU with {wanted}",
        ),
        (
            (*backend("file,id=pc.ram,share=on,mem-path={elsewhere}"), *ON_PC_RAM),
            "QEMU's RAM 'pc.ram' lies in {elsewhere}, which is no file in this mount's ram/: start QEMU with "
            "{wanted}",
        ),
        (
            (*backend("file,id=ram0,share=on,mem-path={ram}/pc.ram"), *ON_RAM0),
            "QEMU's RAM 'ram0' lies in the file of block 'pc.ram': start QEMU with {wanted}",
        ),
        (
            (*DIMM, *backend("file,id=pc.ram,share=on,mem-path={ram}/pc.ram"), *ON_PC_RAM),
            "QEMU's RAM 'dimm0' is a memory-backend-ram, not a file of this mount: make the block with "
            "`truncate -s 67108864 {ram}/dimm0`, and start QEMU with "
            "-object memory-backend-file,id=dimm0,size=67108864,mem-path={ram}/dimm0,share=on",
        ),
    ],
    ids=["none", "memfd", "share=off", "elsewhere", "other-id", "dimm"],
)
async def test_ram_that_does_not_fit(
    arguments: tuple[str, ...], words: str, guest_files: Guest, mount: Mount, tmp_path: Path
) -> None:
    mounted = mount(tmp_path / "vm", SMALL.ram_option)
    names = {"ram": mounted.ram, "elsewhere": tmp_path / "elsewhere", "wanted": wanted(mounted)}
    (tmp_path / "elsewhere").touch()
    async with Qemu(guest_files, *(argument.format(**names) for argument in arguments)) as vm:
        await assert_refused_at_once(vm, mounted, words.format(**names), tmp_path / "checkpoint")


async def test_a_backend_that_nothing_uses_does_not_matter(
    guest_files: Guest, mount: Mount, tmp_path: Path
) -> None:
    mounted = mount(tmp_path / "vm", SMALL.ram_option)
    async with SMALL.on(mounted.ram, guest_files, "-object", "memory-backend-ram,id=spare,size=64M") as vm:
        mounted.ctl(f"qmp {vm.qmp_path}")
        mounted.ctl("save")
        assert await vm.run_state() == "running"


async def test_a_block_of_another_size(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "vm", "ram=pc.ram:256M")
    async with SMALL.on(mounted.ram, guest_files) as vm:
        mounted.ctl(f"qmp {vm.qmp_path}")
        with pytest.raises(OSError, match=r"QEMU's RAM 'pc\.ram' has 134217728 bytes, the mount's block 268435456"):
            mounted.ctl("save")
        assert await vm.run_state() == "running"
    assert not (tmp_path / "vm").exists()


async def test_main_memory_that_qemu_does_not_have(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "vm", "ram=pc.ram:128M,ram=m0:128M")
    arguments = [
        argument.format(ram=mounted.ram) for argument in (*backend("file,id=m0,share=on,mem-path={ram}/m0"),)
    ]
    async with Qemu(guest_files, *arguments, "-numa", "node,memdev=m0") as vm:
        mounted.ctl(f"qmp {vm.qmp_path}")
        with pytest.raises(OSError, match=r"the block 'pc\.ram' of this mount is no RAM of this QEMU"):
            mounted.ctl("save")
        assert await vm.run_state() == "running"


async def test_memory_that_is_plugged_and_unplugged(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    """A block for later is no part of a checkpoint until a device has it."""
    mounted = mount(tmp_path / "vm", "ram=pc.ram:128M,ram=dimm0:64M")
    arguments = ["-m", "128M,slots=2,maxmem=1G"]
    async with SMALL.on(mounted.ram, guest_files, *arguments) as vm:
        await vm.tick()
        mounted.ctl(f"qmp {vm.qmp_path}")
        assert "dimm0 is no RAM of this QEMU now, and left out" in mounted.ctl("save")
        assert "dimm0" not in blocks_of(tmp_path / "vm")
        await plug(vm, mounted, "dimm0")
        assert "left out" not in mounted.ctl("save")
        assert blocks_of(tmp_path / "vm")["dimm0"] == 64 << 20
        (mounted.ram / "dimm1").touch()  # after the first save, too
        os.truncate(mounted.ram / "dimm1", 64 << 20)
        assert "dimm1 is no RAM of this QEMU now" in mounted.ctl("save")
        await plug(vm, mounted, "dimm1")
        mounted.ctl("save")
        assert {"pc.ram", "dimm0", "dimm1"} < set(blocks_of(tmp_path / "vm"))
        await goes_on(vm)


async def plug(vm: Qemu, mounted: Mounted, name: str) -> None:
    """Hot-plug a DIMM whose memory is a block of the mount."""
    path = str(mounted.ram / name)
    backend = {"qom-type": "memory-backend-file", "id": name, "size": 64 << 20, "mem-path": path, "share": True}
    await vm.qmp("object-add", **backend)
    await vm.qmp("device_add", driver="pc-dimm", id=f"d-{name}", memdev=name)


def blocks_of(path: Path) -> dict[str, int]:
    """The RAM blocks in a file, and their bytes."""
    with path.open("rb") as file:
        checkpoint, _ = read_checkpoint(FileSource(file.fileno()))
    return {block.idstr: block.used_length for block in checkpoint.blocks}
