"""RAM and device state have to belong together. QEMU would not notice: the mount refuses, and says what to do."""

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.live.machines import NUMA, SMALL, LiveCheckpoints, assert_holds, goes_on
from tests.mount.conftest import Mount
from tests.mount.harness import Mounted
from tests.qemu.guest import BLOB_LENGTH, Guest
from tests.qemu.machine import Qemu

START_QEMU_SO = "start QEMU with the arguments that `ckptfs qemu-args` prints"


@contextmanager
def refused(mounted: Mounted, words: str) -> Iterator[None]:
    """What happens inside is refused a look at vmstate: to whom, and why, is in status and in the log."""
    mounted.expect_log(rf"vmstate was refused to process \d+: .*{words}")
    yield
    assert words in mounted.status()["vmstate"]


async def assert_does_not_start(vm: Qemu) -> None:
    with pytest.raises(EOFError) as caught:
        async with vm:
            await vm.tick()
    assert any("Operation not permitted" in note for note in caught.value.__notes__), caught.value.__notes__


def incoming(mounted: Mounted) -> str:
    return f"file:{mounted.path}/vmstate"


async def test_a_qemu_that_has_its_ram_elsewhere(checkpoints: LiveCheckpoints, mount: Mount) -> None:
    checkpoint = checkpoints.live(SMALL)
    mounted, other = mount(checkpoint.path), mount(checkpoint.path)
    with refused(mounted, START_QEMU_SO):
        await assert_does_not_start(SMALL.anonymous(checkpoint.guest, incoming=incoming(mounted)))
    with refused(mounted, f"the process does not have pc.ram of this mount as its RAM: {START_QEMU_SO}"):
        await assert_does_not_start(SMALL.on(other.ram, checkpoint.guest, incoming=incoming(mounted)))
    async with SMALL.on(mounted.ram, checkpoint.guest, incoming=incoming(mounted)) as vm:
        assert await vm.tick() > checkpoint.last_tick


def test_a_process_that_holds_all_of_the_ram_may_read_it(checkpoints: LiveCheckpoints, mount: Mount) -> None:
    mounted = mount(checkpoints.live(NUMA).path)
    vmstate = mounted.path / "vmstate"
    with (mounted.ram / "m0").open("rb"):
        with refused(mounted, "does not have m1 of this mount"), pytest.raises(PermissionError) as caught:
            vmstate.read_bytes()
        assert caught.value.errno == errno.EPERM
        with (mounted.ram / "m1").open("rb"):
            assert vmstate.read_bytes().startswith(b"QEVM")
            assert mounted.status()["vmstate"] == "ready"
    with refused(mounted, "does not have m0, m1 of this mount"):
        result = subprocess.run(["cat", vmstate], capture_output=True, text=True)
    assert result.returncode != 0
    assert "Operation not permitted" in result.stderr


async def test_pages_were_written(checkpoints: LiveCheckpoints, mount: Mount) -> None:
    checkpoint = checkpoints.live(SMALL)
    mounted = mount(checkpoint.path)
    (page,) = patch(mounted.ram / "pc.ram", b"\1" * 4096, at=0x8000)
    assert page == b"\1" * 4096
    with refused(mounted, "`reset` drops them, `save` makes a new checkpoint"):
        await assert_does_not_start(SMALL.on(mounted.ram, checkpoint.guest, incoming=incoming(mounted)))
    assert mounted.ctl("reset") == "ok 1 written page dropped"
    assert mounted.status()["vmstate"] == "ready"
    async with SMALL.on(mounted.ram, checkpoint.guest, incoming=incoming(mounted)) as vm:
        assert await vm.tick() > checkpoint.last_tick


def test_a_page_that_the_kernel_has_not_written_back(checkpoints: LiveCheckpoints, mount: Mount) -> None:
    """A store through a mapping, as a machine's: the mount hears of it when it asks the kernel."""
    mounted = mount(checkpoints.live(SMALL).path)
    with (mounted.ram / "pc.ram").open("r+b") as file, mmap.mmap(file.fileno(), 1 << 20) as ram:
        ram[0x8000] ^= 0xFF
        with (
            refused(mounted, "pages have been written since the checkpoint"),
            pytest.raises(PermissionError) as caught,
        ):
            (mounted.path / "vmstate").read_bytes()
    assert caught.value.errno == errno.EPERM


async def test_pages_that_were_written_with_what_they_held(checkpoints: LiveCheckpoints, mount: Mount) -> None:
    """As QEMU does with prealloc=on (libvirt: allocation mode immediate), before it opens vmstate."""
    checkpoint = checkpoints.live(SMALL)
    mounted = mount(checkpoint.path)
    with (mounted.ram / "pc.ram").open("rb") as file:
        part = os.pread(file.fileno(), 3 << 20, 16 << 20)
    patch(mounted.ram / "pc.ram", part, at=16 << 20)
    patch(mounted.ram / "pc.ram", bytes(4096), at=0x8000)
    assert mounted.status()["written-pages"] == 769
    async with SMALL.on(
        mounted.ram, checkpoint.guest, share="share=on,prealloc=on", incoming=incoming(mounted)
    ) as vm:
        assert await vm.tick() > checkpoint.last_tick
        await goes_on(vm)


def patch(ram: Path, data: bytes, at: int) -> list[bytes]:
    """Write with dd, as a user would; return what is there then."""
    subprocess.run(
        ["dd", f"of={ram}", "bs=4096", f"seek={at}", "oflag=seek_bytes", "conv=notrunc", "status=none"],
        input=data,
        check=True,
    )
    with ram.open("rb") as file:
        return [os.pread(file.fileno(), len(data), at)]


async def test_a_second_guest_on_shared_ram(checkpoints: LiveCheckpoints, mount: Mount) -> None:
    checkpoint = checkpoints.live(SMALL)
    mounted = mount(checkpoint.path)
    async with SMALL.on(mounted.ram, checkpoint.guest, incoming=incoming(mounted)) as vm:
        await vm.tick()
        for share in ("share=on", "share=off"):
            with refused(mounted, f"process {vm.pid} has this RAM with share=on"):
                other = SMALL.on(mounted.ram, checkpoint.guest, share=share, incoming=incoming(mounted))
                await assert_does_not_start(other)
        await goes_on(vm)


@pytest.mark.parametrize("order", [("share=on", "share=on"), ("share=on", "share=off"), ("share=off", "share=on")])
async def test_a_second_guest_before_the_first_has_written(
    order: tuple[str, str], checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    checkpoint = checkpoints.live(SMALL)
    mounted = mount(checkpoint.path)
    mine, other = order
    async with SMALL.on(mounted.ram, checkpoint.guest, "-S", share=mine, incoming=incoming(mounted)) as vm:
        with refused(mounted, f"process {vm.pid} has this RAM with {mine}"):
            await assert_does_not_start(
                SMALL.on(mounted.ram, checkpoint.guest, share=other, incoming=incoming(mounted))
            )
        await vm.cont()
        assert await vm.tick() > checkpoint.last_tick
    if mine == "share=off":
        async with SMALL.on(mounted.ram, checkpoint.guest, incoming=incoming(mounted)) as vm:
            assert await vm.tick() > checkpoint.last_tick


async def test_save_after_a_guest_has_run(checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path) -> None:
    checkpoint = checkpoints.live(SMALL)
    mounted = mount(checkpoint.path)
    async with SMALL.on(mounted.ram, checkpoint.guest, incoming=incoming(mounted)) as vm:
        first = await vm.tick()
        with pytest.raises(PermissionError, match=r"bind its QMP socket .* or say `save ram-only`, or `reset`"):
            mounted.ctl(f"save {tmp_path / 'refused'}")
        with pytest.raises(OSError, match="has a file in ram/ open for writing: stop it first") as caught:
            mounted.ctl("reset")
        assert caught.value.errno == errno.EBUSY
        await vm.tick()
    with pytest.raises(PermissionError, match="a machine has run on this RAM"):
        mounted.ctl(f"save {tmp_path / 'refused'}")
    with refused(mounted, "pages have been written since the checkpoint"):
        await assert_does_not_start(SMALL.on(mounted.ram, checkpoint.guest, incoming=incoming(mounted)))
    mounted.ctl("reset")
    assert_holds(mounted.ram, checkpoint.path)
    async with SMALL.on(mounted.ram, checkpoint.guest, incoming=incoming(mounted)) as vm:
        assert await vm.tick() == first
        mounted.ctl(f"save {tmp_path / 'ram'} ram-only")
        await vm.tick()
    assert not (tmp_path / "refused").exists()
    assert not (mounted.path / "vmstate").exists()
    with pytest.raises(PermissionError, match="a machine has run on this RAM, and its device state is not known"):
        mounted.ctl(f"save {checkpoint.path}")
    mounted.ctl(f"save {tmp_path / 'more'} ram-only")


async def test_save_after_the_machine_that_was_saved_has_gone(
    checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    checkpoint = checkpoints.live(SMALL)
    mounted = mount(tmp_path / "checkpoint", SMALL.ram_option)
    async with SMALL.on(mounted.ram, checkpoint.guest, incoming="defer") as vm:
        await vm.load(checkpoint.path)
        await vm.tick()
        mounted.ctl(f"qmp {vm.qmp_path}")
        mounted.ctl("save")
        await goes_on(vm)
    mounted.ctl("qmp none")
    with pytest.raises(PermissionError, match="a machine has run on this RAM"):
        mounted.ctl(f"save {tmp_path / 'refused'}")
    assert not (tmp_path / "refused").exists()
    mounted.ctl("reset")
    assert mounted.status()["vmstate"] == "ready"
    assert_holds(mounted.ram, tmp_path / "checkpoint")


async def test_pages_patched_by_hand_keep_the_device_state(
    checkpoints: LiveCheckpoints, mount: Mount, guest_files: Guest, tmp_path: Path
) -> None:
    checkpoint = checkpoints.live(SMALL)
    mounted = mount(checkpoint.path)
    amid_blob = guest_files.initrd.read_bytes()[-BLOB_LENGTH // 2 :][:64]
    ram = (mounted.ram / "pc.ram").read_bytes()
    start = -1
    while (start := ram.find(amid_blob, start + 1)) >= 0:
        patch(mounted.ram / "pc.ram", b"patched by hand", at=start)
    mounted.ctl(f"save {tmp_path / 'patched'}")
    assert mounted.status()["vmstate"] == "ready"
    mounted.umount()
    async with SMALL.anonymous(checkpoint.guest) as vm:
        await vm.load(tmp_path / "patched")
        assert int((await vm.wait_serial(r"^tick (\d+) MD5BAD\s"))[1]) > checkpoint.last_tick
