"""Others command the machine too, at any moment of a save: it ends in a right checkpoint, or is refused.

The mount speaks to QEMU through a relay, which holds one of its commands while the other one has his say on a
monitor of his own. The guest stops by itself if its registers and its memory are not of one moment, here and when
it is started from what was saved.
"""

import contextlib
import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.doubles.qmp_server import QmpServer, relayed
from tests.live.machines import Machine
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import Mounted
from tests.qemu.machine import Qemu
from tests.qemu.qmp import QmpError
from tests.qemu.stepper import Stepper, build_stepper, steps

MACHINE = Machine("stepper", backends=(("pc.ram", 16),), devices=("-action", "reboot=reset"))
LENGTH = 8 << 20

BEFORE_THE_STOP = ["query-status", "qom-list", "getfd", "query-migrate-capabilities", "migrate-set-capabilities"]
STOPPED = ["migrate", "migrate-continue", "query-migrate"]
"""Commands that come while the guest is stopped for the save."""


class Both:
    """A guest on a mount: the mount commands it through `relay`, somebody else by himself."""

    def __init__(self, mounted: Mounted, vm: Qemu, relay: QmpServer, target: Path) -> None:
        self.mounted = mounted
        self.vm = vm
        self.relay = relay
        self.target = target

    async def save(self, at: str = "", *commands: str, time: int = 1) -> OSError | None:
        """Save while somebody else says `commands` as the mount comes to the command `at`; return the error.

        `time` says which of its commands of that name it is.
        """
        left = [at] * time if at else []

        async def interfere(command: str) -> None:
            if left:
                left.pop()
                if command == "query-migrate":
                    await self.has_migrated()
                for line in () if left else commands:
                    await self.says(line)

        self.relay.faults = {at: interfere}
        self.target.unlink(missing_ok=True)
        try:
            await trio.to_thread.run_sync(self.mounted.ctl, f"save {self.target}")
        except OSError as error:
            assert not self.target.exists()
            return error
        finally:
            assert not left, f"{at} never came"
            self.relay.faults = {}
        return None

    async def has_migrated(self) -> None:
        """Wait until QEMU obeys again: it tells that a migration has completed while it still refuses `cont`."""
        while await self.vm.run_state() == "finish-migrate":  # noqa: ASYNC110 - there is no event
            await trio.sleep(0.001)

    async def says(self, line: str) -> str:
        """One command of somebody else, in QEMU's words or (`HMP ...`) in those of the human monitor."""
        if line.startswith("HMP "):
            return await self.vm.hmp(line.removeprefix("HMP "))
        with contextlib.suppress(QmpError):  # QEMU refuses some, at some moments
            await self.vm.qmp(line)
        return ""

    async def runs_on(self) -> None:
        """See that the guest runs, on memory that is right."""
        assert await self.vm.run_state() == "running"
        await self.ticks()

    async def ticks(self) -> None:
        """Wait for three passes more than it has told of."""
        self.vm.forget_serial()
        await self.vm.wait_serial(r"[.]{3}")
        assert "!" not in self.vm.serial

    async def is_right(self, guest: Stepper) -> None:
        """See that the checkpoint is of one moment, and that stock QEMU runs on from it."""
        (ram,) = (content for idstr, content in decode(self.target).blocks.items() if idstr == "pc.ram")
        steps(ram, LENGTH)
        async with MACHINE.anonymous(guest) as vm:
            await vm.load(self.target)
            if await vm.run_state() != "running":
                await vm.cont()
            await vm.wait_serial(r"[.]{3}|!")
            assert "!" not in vm.serial, "RAM and device state are of two moments"


@pytest.fixture(scope="session")
def stepper(tmp_path_factory: pytest.TempPathFactory) -> Stepper:
    return build_stepper(tmp_path_factory.mktemp("stepper"), LENGTH)


@asynccontextmanager
async def commanded(mount: Mount, stepper: Stepper, tmp_path: Path, *arguments: str) -> AsyncIterator[Both]:
    mounted = mount(tmp_path / "vm", MACHINE.ram_option)
    async with (
        MACHINE.on(mounted.ram, stepper, *arguments) as vm,
        relayed(vm.qmp_path, tmp_path / "relay") as relay,
    ):
        mounted.ctl(f"qmp {tmp_path / 'relay'}")
        both = Both(mounted, vm, relay, tmp_path / "saved")
        await both.ticks()
        yield both


@pytest.fixture
async def both(mount: Mount, stepper: Stepper, tmp_path: Path) -> AsyncIterator[Both]:
    async with commanded(mount, stepper, tmp_path) as both:
        yield both


async def settings(vm: Qemu) -> tuple[object, object]:
    return await vm.qmp("query-migrate-capabilities"), await vm.qmp("query-migrate-parameters")


async def test_nobody_else(both: Both, stepper: Stepper) -> None:
    found = await settings(both.vm)
    assert await both.save() is None
    await both.runs_on()
    await both.is_right(stepper)
    assert await settings(both.vm) == found


async def test_somebody_says_cont(both: Both, stepper: Stepper) -> None:
    for at in [*BEFORE_THE_STOP, "stop", *STOPPED, "cont"]:
        failed = await both.save(at, "cont")
        await both.runs_on()
        assert failed is None, (at, failed)
        await both.is_right(stepper)


async def test_somebody_lets_a_paused_guest_go_on(both: Both, stepper: Stepper) -> None:
    for at in ("getfd", "migrate-set-capabilities", "migrate", "query-migrate"):
        await both.says("stop")
        failed = await both.save(at, "cont")
        assert failed is None, (at, failed)
        await both.runs_on()
        await both.is_right(stepper)
    await both.says("stop")
    assert await both.save("migrate-continue", "cont") is None  # QEMU has refused it
    assert await both.vm.run_state() == "postmigrate"
    await both.says("cont")
    await both.is_right(stepper)


async def test_somebody_stops_it_for_good(both: Both, stepper: Stepper) -> None:
    for at, commands in (
        ("query-status", ["stop"]),
        ("getfd", ["stop"]),
        ("migrate-set-capabilities", ["stop"]),
        ("migrate", ["cont", "stop"]),
        ("query-migrate", ["cont", "stop"]),
    ):
        failed = await both.save(at, *commands)
        assert failed is None, (at, failed)
        assert await both.vm.run_state() in ("paused", "postmigrate"), at
        await both.is_right(stepper)
        await both.says("cont")
        await both.runs_on()


async def test_somebody_cancels(both: Both, stepper: Stepper) -> None:
    for at in ("query-status", "migrate", "query-migrate", "cont"):
        failed = await both.save(at, "migrate_cancel")
        assert failed is None, (at, failed)
        await both.runs_on()
        await both.is_right(stepper)
    found = await settings(both.vm)
    failed = await both.save("migrate-continue", "migrate_cancel")
    assert failed is not None
    assert (failed.errno, "somebody else cancelled" in str(failed)) == (errno.EBUSY, True), failed
    await both.runs_on()
    assert await settings(both.vm) == found


async def test_somebody_resets(both: Both, stepper: Stepper) -> None:
    for at in ("query-status", "migrate-set-capabilities", "migrate", "cont"):
        failed = await both.save(at, "system_reset")
        assert failed is None, (at, failed)
        await both.runs_on()
    failed = await both.save("migrate-continue", "system_reset")
    assert failed is not None
    assert (failed.errno, "somebody else reset the guest" in str(failed)) == (errno.EBUSY, True), failed
    assert await both.vm.run_state() == "running"


async def test_somebody_migrates(both: Both, stepper: Stepper) -> None:
    found = await settings(both.vm)
    both.mounted.expect_log("somebody began a migration: that one was cancelled")
    for at in [*BEFORE_THE_STOP, "stop", *STOPPED, "cont"]:
        failed = await both.save(at, "HMP migrate -d exec:cat>/dev/null")
        await both.vm.migration_ended()
        if failed is None:
            await both.is_right(stepper)
        else:
            assert "migrat" in str(failed), failed
        await both.says("cont")  # where theirs was first, it has left the guest in postmigrate
        await both.runs_on()
        assert await settings(both.vm) == found, at


async def test_somebody_migrates_before_the_settings_are_put_back(both: Both, stepper: Stepper) -> None:
    found = await settings(both.vm)
    both.mounted.expect_log("somebody began a migration: that one was cancelled")
    for at in ("query-migrate-parameters", "migrate-set-parameters", "query-migrate-capabilities"):
        time = 3 if at == "query-migrate-capabilities" else 2
        for _ in range(2):
            failed = await both.save(at, "HMP migrate -d exec:cat>/dev/null", time=time)
            assert failed is None, (at, failed)
            await both.vm.migration_ended()
            await both.is_right(stepper)
            await both.runs_on()
            assert await settings(both.vm) == found, at


async def test_somebody_migrates_again_and_again(both: Both, stepper: Stepper) -> None:
    found = await settings(both.vm)
    both.mounted.expect_log("somebody began a migration: that one was cancelled")
    times = 0

    async def migrate(_: str) -> None:
        nonlocal times
        times += 1
        if 1 < times < 5:  # the first sets them
            await both.says("HMP migrate -d exec:cat>/dev/null")

    both.relay.faults = {"migrate-set-capabilities": migrate}
    await trio.to_thread.run_sync(both.mounted.ctl, f"save {both.target}")
    assert times == 5
    assert await settings(both.vm) == found
    await both.is_right(stepper)
    await both.runs_on()


async def test_somebody_changes_capabilities(both: Both, stepper: Stepper) -> None:
    for name in ("pause-before-switchover", "x-ignore-shared", "events", "multifd"):
        for at in ("stop", "migrate"):
            state = "on" if name == "multifd" else "off"
            failed = await both.save(at, f"HMP migrate_set_capability {name} {state}")
            await both.runs_on()
            if failed is None:
                await both.is_right(stepper)
    await both.says("HMP migrate_set_capability multifd off")


async def test_somebody_lets_it_go_on_by_gdb(mount: Mount, stepper: Stepper, tmp_path: Path) -> None:
    """What QEMU refuses a monitor, in the very moment that counts, it does not refuse gdb."""
    address = tmp_path / "gdb"
    chardev = f"socket,path={address},server=on,wait=off,id=gdb"
    async with (
        commanded(mount, stepper, tmp_path, "-chardev", chardev, "-gdb", "chardev:gdb") as both,
        await trio.open_unix_socket(address) as gdb,
    ):
        await gdb.send_all(b"+$?#3f$vCont;c#a8")  # gdb stops what it finds, as it comes
        await both.ticks()

        async def go_on(_: str) -> None:
            if "migrate" not in both.relay.commands:
                return
            both.relay.faults = {}
            while (await both.vm.qmp("query-migrate"))["status"] != "pre-switchover":
                await trio.lowlevel.checkpoint()
            both.vm.forget_events("RESUME")
            await gdb.send_all(b"+$c#63")
            await both.vm.event("RESUME")

        both.relay.faults = {"query-migrate-capabilities": go_on}
        with pytest.raises(OSError, match="let the guest go on while its device state was taken") as caught:
            await trio.to_thread.run_sync(both.mounted.ctl, f"save {both.target}")
        assert caught.value.errno == errno.EBUSY
        await both.runs_on()


COMMANDS = [
    *("cont", "stop", "cont", "stop", "migrate_cancel", "HMP system_wakeup", "HMP balloon 8", "HMP savevm x"),
    *("HMP object_add rng-builtin,id=more", "HMP migrate_set_capability xbzrle on"),
    *("HMP migrate_set_parameter max-bandwidth 1M", "HMP nmi", "HMP info registers", "HMP migrate_continue"),
]


@pytest.mark.parametrize("seed", [1, 2])
async def test_somebody_says_anything_at_any_moment(both: Both, stepper: Stepper, seed: int) -> None:
    chance = random.Random(seed)
    saved = 0
    for _ in range(12):
        at = chance.choice([*BEFORE_THE_STOP, "stop", *STOPPED, "cont"])
        commands = chance.choices(COMMANDS, k=chance.randint(1, 4))
        failed = await both.save(at, *commands)
        await both.vm.migration_ended()
        if failed is None:
            saved += 1
            await both.is_right(stepper)
        await both.says("cont")
        await both.runs_on()
    assert saved


async def test_somebody_writes_ram(both: Both, stepper: Stepper) -> None:
    """As a device does that gets something from outside, though the guest stands still."""
    for at, refused in (("migrate", False), ("migrate-continue", True), ("cont", False)):

        async def write(_: str) -> None:
            await trio.to_thread.run_sync(patch, both.mounted.ram / "pc.ram")

        both.relay.faults = {at: write}
        failed = None
        try:
            await trio.to_thread.run_sync(both.mounted.ctl, f"save {both.target}")
        except OSError as error:
            failed = error
        assert ("RAM was written while its device state was taken" in str(failed)) == refused, (at, failed)
        assert failed is None or failed.errno == errno.EBUSY
        both.relay.faults = {}
        await both.runs_on()
    await both.is_right(stepper)


def patch(ram: Path) -> None:
    """Write a page that the guest does not use."""
    with ram.open("r+b", buffering=0) as file:
        file.seek(12 << 20)
        file.write(b"x" * 4096)


async def test_somebody_quits(mount: Mount, stepper: Stepper, tmp_path: Path) -> None:
    async with commanded(mount, stepper, tmp_path) as both:
        both.mounted.expect_log("settings could not be restored")
        failed = await both.save("migrate-continue", "quit")
        assert failed is not None
        assert failed.errno == errno.EPIPE
