"""Machines whose RAM is their own: anonymous, memfd, /dev/shm, a private file; with a mount, and without one.

The guest writes pass N into page after page, and stops where its registers and its memory are not of one moment.
"""

import errno
import filecmp
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio

from ckptfs.channels.opened import open_file
from tests.doubles.checkpoints import verified
from tests.live.machines import Machine
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.qemu.machine import Qemu
from tests.qemu.stepper import Stepper, build_stepper, steps

LENGTH = 24 << 20
MACHINE = Machine("stepper", backends=(("pc.ram", 32),), devices=())


@pytest.fixture(scope="session")
def stepper(tmp_path_factory: pytest.TempPathFactory) -> Stepper:
    return build_stepper(tmp_path_factory.mktemp("stepper"), LENGTH)


@pytest.fixture
def shm() -> Iterator[Path]:
    path = Path("/dev/shm") / f"ckptfs-test-{os.getpid()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def backend(kind: str, tmp_path: Path, shm: Path) -> str:
    """The -object of a kind of memory."""
    return {
        "ram": "memory-backend-ram",
        "memfd": "memory-backend-memfd,share=on",
        "shm": f"memory-backend-file,mem-path={shm / 'ram'},share=on",
        "private": f"memory-backend-file,mem-path={tmp_path / 'ram'},share=off",
    }[kind]


def running(stepper: Stepper, kind: str, *arguments: str) -> Qemu:
    """A machine of that memory."""
    machine = "pc,memory-backend=pc.ram"
    return Qemu(stepper, "-object", f"{kind},id=pc.ram,size=32M", *arguments, machine=machine, memory="32M")


async def save(vm: Qemu, target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ckptfs save --qmp`, as a user does it."""
    command = [Path(sys.executable).parent / "ckptfs", "save", "--qmp", vm.qmp_path, *arguments, target]
    return await trio.to_thread.run_sync(lambda: subprocess.run(command, capture_output=True, text=True))


async def ticks(vm: Qemu) -> None:
    """Wait for two passes more."""
    vm.forget_serial()
    await vm.wait_serial("[.]{2}|!")
    assert "!" not in vm.serial


async def assert_is_right(target: Path, stepper: Stepper, run_state: str = "running") -> None:
    """See that the file is of one moment, that stock QEMU loads it, and that its guest goes on from there."""
    found = verified(target)
    assert (found.findings, found.unknown) == ([], 0)
    (ram,) = (content for idstr, content in decode(target).blocks.items() if idstr == "pc.ram")
    steps(ram, LENGTH)
    async with MACHINE.anonymous(stepper) as vm:
        await vm.load(target)
        assert await vm.run_state() == (run_state or await vm.run_state())
        if await vm.run_state() != "running":
            await vm.cont()
        await ticks(vm)


def assert_remembers_its_machine(target: Path) -> None:
    """See that the file tells how its machine was started; behind a relay, nobody can know."""
    with open_file(str(target)) as opened:
        assert opened.trailer.machine is not None
        assert "-bios" in opened.trailer.machine.arguments


def left_in(directory: Path) -> list[str]:
    return [path.name for path in directory.glob("*saved*")]


async def settings(vm: Qemu) -> tuple[object, object]:
    return await vm.qmp("query-migrate-capabilities"), await vm.qmp("query-migrate-parameters")


@pytest.mark.parametrize(
    ("kind", "way"), [("ram", "snapshot"), ("memfd", "snapshot"), ("shm", "snapshot"), ("private", "precopy")]
)
async def test_any_memory(kind: str, way: str, stepper: Stepper, tmp_path: Path, shm: Path) -> None:
    async with running(stepper, backend(kind, tmp_path, shm)) as vm:
        await ticks(vm)
        found = await settings(vm)
        for _ in range(2):  # the second replaces the first
            result = await save(vm, tmp_path / "saved")
            assert result.returncode == 0, result.stderr
            assert "guest paused" in result.stdout
            assert result.stdout.endswith(f"captured by {way}\n"), result.stdout
            assert await vm.run_state() == "running"
            assert await settings(vm) == found
            await ticks(vm)
            assert (tmp_path / "saved").stat().st_size < 40 << 20
            assert_remembers_its_machine(tmp_path / "saved")
            await assert_is_right(tmp_path / "saved", stepper)
        assert left_in(tmp_path) == ["saved"]


async def test_forced_precopy_and_a_refused_snapshot(stepper: Stepper, tmp_path: Path, shm: Path) -> None:
    async with running(stepper, backend("private", tmp_path, shm)) as vm:
        await ticks(vm)
        result = await save(vm, tmp_path / "saved", "--capture=snapshot")
        assert result.returncode == 1
        assert "QEMU refused migrate-set-capabilities: Background-snapshot is not" in result.stderr
        result = await save(vm, tmp_path / "saved", "--capture=precopy", "--capture-rounds=1")
        assert result.stdout.endswith("captured by precopy\n"), result
        await ticks(vm)
        await assert_is_right(tmp_path / "saved", stepper)


@pytest.mark.parametrize("way", ["snapshot", "precopy"])
async def test_a_paused_guest_stays_paused(way: str, stepper: Stepper, tmp_path: Path) -> None:
    async with running(stepper, "memory-backend-ram") as vm:
        await ticks(vm)
        await vm.stop()
        result = await save(vm, tmp_path / "saved", f"--capture={way}")
        assert "guest paused 0.0 ms" in result.stdout, result
        assert await vm.run_state() == {"snapshot": "paused", "precopy": "postmigrate"}[way]
        await vm.pmemsave(tmp_path / "memory", 0, 32 << 20)
        async with MACHINE.anonymous(stepper) as stock:
            await stock.load(tmp_path / "saved")
            await stock.pmemsave(tmp_path / "loaded", 0, 32 << 20)
        assert filecmp.cmp(tmp_path / "memory", tmp_path / "loaded", shallow=False)
        await vm.cont()
        await ticks(vm)
        await assert_is_right(tmp_path / "saved", stepper, "paused")


# ---- on a mount --------------------------------------------------------------------------------------------


async def test_a_mount_shows_what_was_saved(mount: Mount, stepper: Stepper, tmp_path: Path) -> None:
    async with running(stepper, "memory-backend-ram") as vm:
        await ticks(vm)
        mounted = mount(tmp_path / "saved", f"qmp={vm.qmp_path}")
        assert list(mounted.ram.iterdir()) == []
        for _ in range(2):
            answer = await trio.to_thread.run_sync(mounted.ctl, "save")
            assert answer.endswith("captured by snapshot"), answer
            content = np.fromfile(mounted.ram / "pc.ram", np.uint8)
            assert np.array_equal(content, decode(tmp_path / "saved").blocks["pc.ram"])
            steps(content, LENGTH)
            await ticks(vm)
        status = mounted.status()
        assert (status["capture"], status["vmstate"]) == ("snapshot", "ready")
        mounted.ctl("migrate_set_capability x-ignore-shared on")
        with pytest.raises(OSError, match="is saved as a whole: switch x-ignore-shared off"):
            mounted.ctl("save")
        mounted.ctl("migrate_set_capability x-ignore-shared off")
        mounted.expect_log(r"RAM was refused to process \d+: pc\.ram: is a copy of the machine's RAM")
        with pytest.raises(OSError, match="Read-only") as caught:
            (mounted.ram / "pc.ram").open("r+b")
        assert caught.value.errno == errno.EROFS
    mounted.umount()
    mounted = mount(tmp_path / "saved")
    async with MACHINE.on(mounted.ram, stepper, incoming=f"file:{mounted.path}/vmstate") as vm:
        await ticks(vm)
        mounted.ctl(f"qmp {vm.qmp_path}")
        assert "captured" not in await trio.to_thread.run_sync(mounted.ctl, "save")  # RAM is on the mount now
        await ticks(vm)
    await assert_is_right(tmp_path / "saved", stepper)


async def test_a_mount_of_a_checkpoint_whose_machine_has_its_own_ram(
    mount: Mount, stepper: Stepper, tmp_path: Path
) -> None:
    async with running(stepper, "memory-backend-ram") as vm:
        await ticks(vm)
        assert (await save(vm, tmp_path / "saved")).returncode == 0
        mounted = mount(tmp_path / "saved", f"qmp={vm.qmp_path}")
        assert (await trio.to_thread.run_sync(mounted.ctl, "save")).endswith("captured by snapshot")
        await assert_is_right(tmp_path / "saved", stepper)
        other = mount(tmp_path / "fresh", "ram=pc.ram:32M", f"qmp={vm.qmp_path}", "capture=snapshot")
        with pytest.raises(OSError, match="capture=snapshot is for machines whose RAM lies elsewhere"):
            other.ctl("save")


async def test_a_mount_of_another_machine(mount: Mount, stepper: Stepper, tmp_path: Path) -> None:
    async with running(stepper, "memory-backend-ram") as vm, Qemu(stepper, memory="64M") as other:
        await ticks(vm)
        mounted = mount(tmp_path / "saved", f"qmp={vm.qmp_path}")
        await trio.to_thread.run_sync(mounted.ctl, "save")
        mounted.ctl(f"qmp {other.qmp_path}")
        with pytest.raises(OSError, match=r"QEMU's RAM is no longer that of this mount \(pc.ram\)") as caught:
            await trio.to_thread.run_sync(mounted.ctl, "save")
        assert caught.value.errno == errno.EBUSY
        assert await other.run_state() == "running"
        await assert_is_right(tmp_path / "saved", stepper)


# ---- given up, and killed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["snapshot", "precopy"])
async def test_cancel_leaves_the_guest_running_and_nothing_on_disk(
    way: str, mount: Mount, stepper: Stepper, tmp_path: Path
) -> None:
    async with running(stepper, "memory-backend-ram") as vm:
        await ticks(vm)
        found = await settings(vm)
        mounted = mount(tmp_path / "saved", f"qmp={vm.qmp_path}", f"capture={way}", "max-bandwidth=1M")
        mounted.ctl("save nowait")
        mounted.wait_for(lambda status: status["migration"]["status"] == "active")
        assert mounted.ctl("cancel") == "ok save cancelled"
        assert left_in(tmp_path) == []
        assert await vm.run_state() == "running"
        assert await settings(vm) == found
        await ticks(vm)
        mounted.ctl("migrate_set_parameter max-bandwidth 0")
        await trio.to_thread.run_sync(mounted.ctl, "save")
        await assert_is_right(tmp_path / "saved", stepper)
