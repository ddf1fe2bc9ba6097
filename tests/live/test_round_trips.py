"""Restored, run and checkpointed again, in a circle; and all that comes along beside the main memory."""

import os
import re
import secrets
import shutil
from pathlib import Path

import trio

from tests.live.machines import SMALL, LiveCheckpoints, goes_on
from tests.mount.conftest import Mount
from tests.mount.harness import Mounted
from tests.qemu.guest import Guest
from tests.qemu.machine import Qemu
from tests.qemu.stock_checkpoint import assert_ram_equals


def on(mounted: Mounted, guest: Guest, *arguments: str) -> Qemu:
    """The machine, started from the mount's vmstate."""
    return SMALL.on(mounted.ram, guest, *arguments, incoming=f"file:{mounted.path}/vmstate")


async def save(mounted: Mounted, vm: Qemu, target: Path | str = "") -> int:
    """Checkpoint a machine that is not bound yet; return the last tick before that."""
    mounted.ctl(f"qmp {vm.qmp_path}")
    last_tick = vm.ticks()[-1]
    mounted.ctl(f"save {target}")
    await goes_on(vm)
    return last_tick


async def test_round_and_round(checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path) -> None:
    live = checkpoints.live(SMALL)
    spec, last_tick = tmp_path / "vm", live.last_tick
    shutil.copy(live.path, spec)
    for round_ in range(3):
        mounted = mount(spec)
        async with on(mounted, live.guest) as vm:
            assert await vm.tick() > last_tick
            await goes_on(vm)
            same = await save(mounted, vm)
            last_tick = await save(mounted, vm, tmp_path / f"other{round_}")
            assert last_tick > same
            assert mounted.status()["base"] == str(tmp_path / f"other{round_}")
        mounted.umount()
        mounted = mount(spec)
        async with on(mounted, live.guest) as vm:
            assert same < await vm.tick() <= last_tick
        mounted.umount()
        spec = tmp_path / f"other{round_}"


async def test_what_qemu_saved_of_a_running_guest(checkpoints: LiveCheckpoints, mount: Mount) -> None:
    """Pages that became zero meanwhile have only their bit cleared: stale bytes lie below it."""
    checkpoint = checkpoints.stock(SMALL, stopped=False)
    mounted = mount(checkpoint.path)
    async with on(mounted, checkpoint.guest) as vm:
        assert await vm.tick() > checkpoint.last_tick
        await goes_on(vm)


async def test_after_restore_no_file_is_needed(checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path) -> None:
    live = checkpoints.live(SMALL)
    spec = tmp_path / "vm"
    shutil.copy(live.path, spec)
    mounted = mount(spec)
    mounted.ctl("restore")
    spec.unlink()
    async with on(mounted, live.guest) as vm:
        assert await vm.tick() > live.last_tick
        await save(mounted, vm, tmp_path / "other")
        last_tick = await save(mounted, vm, "force")  # as there is none any more
        assert mounted.status()["restored"] is True
    mounted.umount()
    async with SMALL.anonymous(live.guest) as vm:
        await vm.load(spec)
        assert await vm.tick() > last_tick


async def test_a_mount_of_nothing_is_filled_and_started_from(
    checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    live = checkpoints.live(SMALL)
    mounted = mount("none")
    mounted.ctl(f"migrate_incoming file:{live.path}")
    async with on(mounted, live.guest) as vm:
        assert await vm.tick() > live.last_tick
        await save(mounted, vm, tmp_path / "saved")


async def test_every_block_is_what_qemu_says(checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path) -> None:
    live = checkpoints.live(SMALL)
    mounted = mount(live.path)
    async with on(mounted, live.guest) as vm:
        await vm.tick()
        await vm.stop()
        mounted.ctl(f"qmp {vm.qmp_path}")
        mounted.ctl(f"save {tmp_path / 'saved'}")
        visible = await vm.save_visible_ranges(tmp_path)
    for region, name in (("pc.ram", "pc.ram"), ("pc.bios", "pc.bios"), ("vga.vram", vga_memory(mounted))):
        assert_ram_equals((mounted.ram / name).read_bytes(), visible, region)


def vga_memory(mounted: Mounted) -> str:
    (file,) = mounted.ram.glob("*vga.vram")
    return file.name


async def test_the_screen_comes_along(checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path) -> None:
    live = checkpoints.live(SMALL)
    mounted = mount(live.path)
    file = (mounted.ram / vga_memory(mounted)).open("rb")
    with file:
        async with on(mounted, live.guest, "-gdb", f"unix:{tmp_path}/gdb,server=on,wait=off") as vm:
            await vm.tick()
            match = re.search(r"(\w{16})-\w{16} \(prio \d+, ram\): vga.vram", await vm.hmp("info mtree -f"))
            assert match
            address = int(match[1], 16) + 0x12345
            for _ in range(2):
                pixels = secrets.token_bytes(64)
                await poke(tmp_path / "gdb", address, pixels)
                await save(mounted, vm, tmp_path / "saved")
                assert os.pread(file.fileno(), 64, 0x12345) == pixels
    mounted.umount()
    mounted = mount(tmp_path / "saved")
    async with on(mounted, live.guest) as vm:
        assert await peek(vm, address, tmp_path) == pixels
    async with SMALL.anonymous(live.guest) as vm:
        await vm.load(tmp_path / "saved")
        assert await peek(vm, address, tmp_path) == pixels


async def peek(vm: Qemu, address: int, tmp_path: Path) -> bytes:
    """Read the machine's physical memory, once it runs."""
    await vm.tick()
    await vm.pmemsave(tmp_path / "peeked", address, 64)
    return (tmp_path / "peeked").read_bytes()


async def poke(gdb: Path, address: int, data: bytes) -> None:
    """Write the machine's physical memory, as a debugger does; it stands still meanwhile."""
    async with await trio.open_unix_socket(str(gdb)) as stream:
        for packet in ("Qqemu.PhyMemMode:1", f"M{address:x},{len(data):x}:{data.hex()}", "D"):
            checksum = sum(packet.encode()) % 256
            await stream.send_all(f"+${packet}#{checksum:02x}".encode())
            received = b""
            while b"$OK#" not in received:
                received += await stream.receive_some()


async def test_disks_go_on_after_a_save(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    """QEMU lets go of its images at the end of a migration; `cont` takes them back."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(4 << 20))
    disk = ("-blockdev", f"raw,node-name=disk,file.driver=file,file.filename={image}")
    mounted = mount(tmp_path / "vm", SMALL.ram_option)
    async with SMALL.on(mounted.ram, guest_files, *disk, "-device", "virtio-blk-pci,drive=disk,share-rw=on") as vm:
        mounted.ctl(f"qmp {vm.qmp_path}")
        for byte in (1, 2):
            mounted.ctl("save")
            assert await vm.hmp(f'qemu-io disk "write -P {byte} {byte}M 1M"') == ""
    assert image.read_bytes() == b"".join(bytes([byte]) * (1 << 20) for byte in (0, 1, 2, 0))
