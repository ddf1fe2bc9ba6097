"""Machines whose blocks are easily taken for something else: old types, DIMMs, TPMs, plain names of devices."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptfs.qemu.memory import MachineMemory, memory_of, naming_property
from tests.live.machines import goes_on
from tests.mount.conftest import Mount
from tests.mount.harness import BIN, Mounted
from tests.qemu.guest import Guest
from tests.qemu.machine import Qemu


def qemu_args(mounted: Mounted, *options: str) -> list[str]:
    """What `ckptfs qemu-args` prints."""
    done = subprocess.run(
        [BIN / "ckptfs", "qemu-args", mounted.path, *options], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


async def taken_over(guest: Guest, mount: Mount, directory: Path, *arguments: str, machine: str = "pc") -> Mounted:
    """A machine that stock QEMU saves goes on from a mount, as `qemu-args` says and with the same `arguments`."""
    path = directory / "migfile"
    async with Qemu(guest, *arguments, machine=machine, memory="128M") as vm:
        tick = await vm.tick()
        await vm.migrate_to(path)
    mounted = mount(path)
    async with Qemu(guest, *arguments, *qemu_args(mounted), machine=machine, memory="128M") as vm:
        assert await vm.tick() > tick
        await goes_on(vm)
        mounted.ctl(f"qmp {vm.qmp_path}")
        mounted.ctl(f"save {directory / 'again'}")
        await goes_on(vm)
    return mounted


async def test_an_old_machine_type(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    """Types up to 4.0 call a file backend's block /objects/ID, and plain RAM by its name."""
    mounted = await taken_over(guest_files, mount, tmp_path, machine="pc-i440fx-3.1")
    assert any(
        word.endswith(",x-use-canonical-path-for-ramblock-id=off") for word in qemu_args(mount(tmp_path / "again"))
    )
    assert "pc.ram" in os.listdir(mounted.ram)


async def test_a_new_guest_of_an_old_type_is_told(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "new", "ram=pc.ram:128M")
    async with Qemu(guest_files, *qemu_args(mounted), machine="pc-i440fx-3.1,memory-backend=pc.ram") as vm:
        mounted.ctl(f"qmp {vm.qmp_path}")
        with pytest.raises(OSError, match=r"which this machine type calls otherwise: .*ramblock-id=off"):
            mounted.ctl("save")
        assert await vm.run_state() == "running"


@contextmanager
def tpm(directory: Path) -> Iterator[list[str]]:
    """QEMU's arguments for a TPM, which swtpm emulates."""
    (directory / "tpm").mkdir(exist_ok=True)
    socket = directory / "swtpm"
    process = subprocess.Popen(
        [
            "swtpm",
            "socket",
            "--tpm2",
            "--tpmstate",
            f"dir={directory / 'tpm'}",
            "--ctrl",
            f"type=unixio,path={socket}",
        ]
    )
    try:
        while not socket.exists():
            assert process.poll() is None
        yield ["-chardev", f"socket,id=tpm,path={socket}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("device", ["tpm-crb", "tpm-tis"])
async def test_a_tpm(guest_files: Guest, mount: Mount, device: str, public: Path) -> None:
    """Its blocks, tpm-ppi and tpm-crb-cmd, have names that look like a backend's."""
    path = public / "migfile"
    with tpm(public) as arguments:
        async with Qemu(guest_files, *arguments, "-device", f"{device},tpmdev=tpm0") as vm:
            tick = await vm.tick()
            await vm.migrate_to(path)
    mounted = mount(path)
    assert "tpm-ppi" in os.listdir(mounted.ram)
    found = qemu_args(mounted)
    assert [word for word in found if "memory-backend-file" in word][1:] == []
    shutil.rmtree(public / "tpm")
    with tpm(public) as arguments:
        async with Qemu(guest_files, *arguments, "-device", f"{device},tpmdev=tpm0", *found) as vm:
            assert await vm.tick() > tick
            await goes_on(vm)


async def test_vmware_svga(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    await taken_over(guest_files, mount, tmp_path, "-vga", "vmware")


async def test_a_dimm(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    path, slots = tmp_path / "migfile", ("-m", "128M,slots=2,maxmem=1G")
    dimm = ("-object", "memory-backend-ram,id=mem1,size=128M", "-device", "pc-dimm,memdev=mem1")
    async with Qemu(guest_files, *slots, *dimm) as vm:
        tick = await vm.tick()
        await (
            vm.stop()
        )  # QEMU 10.0 fails an assertion (tlb_reset_dirty_range_all) while it saves a DIMM that is used
        await vm.migrate_to(path)
    mounted = mount(path)
    found = qemu_args(mounted)
    assert found[:2] == ["-m", "128M"]
    assert [word.partition(",size")[0] for word in found if "memory-backend-file" in word] == [
        "memory-backend-file,id=pc.ram",
        "memory-backend-file,id=mem1",
    ]
    assert "-numa" not in found
    async with Qemu(guest_files, *found, *slots, "-device", "pc-dimm,memdev=mem1") as vm:
        await vm.cont()
        assert await vm.tick() > tick
        await goes_on(vm)
    mounted.umount()
    mounted = mount(path)  # the DIMM's memory need not be of the mount: it comes inside of the stream then
    found = qemu_args(mounted)
    at = next(index for index, word in enumerate(found) if "id=mem1" in word)
    async with Qemu(guest_files, *found[: at - 1], *found[at + 1 :], *slots, *dimm) as vm:
        await vm.cont()
        assert await vm.tick() > tick
        await goes_on(vm)


@pytest.mark.parametrize(
    ("blocks", "memory"),
    [
        ("pc.ram 0000:00:02.0/vga.vram /rom@etc/acpi/tables pc.bios pc.rom", "pc.ram"),
        ("pc.ram tpm-ppi tpm-crb-cmd vmsvga.fifo vga.vram", "pc.ram"),
        ("/objects/pc.ram pc.bios", "/objects/pc.ram"),
        (
            "virt.flash0 virt.flash1 mach-virt.ram virt.secure-ram mach-virt.tag mach-virt.secure-tag",
            "mach-virt.ram",
        ),
        ("riscv_virt_board.ram virt.flash0 virt.flash1 riscv_virt_board.mrom", "riscv_virt_board.ram"),
        ("riscv.sifive.u.flash0 riscv.sifive.u.ram riscv.sifive.u.l2lim riscv.sifive.u.mrom", "riscv.sifive.u.ram"),
        ("sbsa-ref.secure-ram sbsa.flash0 sbsa-ref.ram 0000:00:01.0/bochs-display-vram", "sbsa-ref.ram"),
        ("vexpress.highmem vexpress.flash0 vexpress.sram vexpress.a15sram vexpress.vram", "vexpress.highmem"),
        ("s390.ram", "s390.ram"),
        ("m0 m1 vga.vram pc.bios tpm-ppi", "m0 m1"),
    ],
)
def test_the_memory_among_the_blocks_of_a_machine(blocks: str, memory: str) -> None:
    found = memory_of(blocks.split())
    assert (found.main, found.plugged) == (tuple(memory.split()), ())


def test_what_else_has_a_users_name_may_be_plugged() -> None:
    assert memory_of(["pc.ram", "mem1", "vga.vram"]) == MachineMemory(("pc.ram",), ("mem1",))
    assert memory_of(["pc.ram", "mem1", "odd"], ["pc.ram", "mem1"]) == MachineMemory(("pc.ram",), ("mem1",))
    assert memory_of(["m0", "m1", "odd"], ["m1", "m0"]) == MachineMemory(("m0", "m1"))
    assert memory_of(["m0", "odd"]) == MachineMemory(("m0", "odd"), by_name=True)


@pytest.mark.parametrize(
    ("idstr", "machine", "needed"),
    [
        ("pc.ram", "pc-i440fx-3.1", True),
        ("pc.ram", "pc-q35-4.0", True),
        ("pc.ram", "pc-q35-4.1", False),
        ("pc.ram", "pc-q35-4.0.1", True),
        ("pc.ram", "pc-i440fx-10.0", False),
        ("/objects/pc.ram", "pc-i440fx-3.1", False),
        ("pc.ram", "none", False),
        ("pc.ram", None, False),
    ],
)
def test_when_a_name_takes_a_property(idstr: str, machine: str | None, needed: bool) -> None:
    assert bool(naming_property(idstr, machine)) == needed
