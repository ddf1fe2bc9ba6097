"""Live checkpoints that fail, at one step or another: the guest goes on, the former checkpoint is what it was."""

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.doubles.qmp_server import FakeQemu, HangUpError, QmpServer, hang_up, refuse, relayed, served
from tests.live.machines import SMALL, LiveCheckpoints, goes_on, was_stopped
from tests.mount.conftest import Mount
from tests.mount.harness import BIN, DEADLINE, Mounted, unmount_by_force
from tests.qemu.guest import Guest
from tests.qemu.machine import Qemu

BEFORE_THE_STOP = [
    "query-status",
    "human-monitor-command",  # info ramblock
    "qom-list",
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "migrate-set-capabilities",
    "getfd",
    "stop",
]
AFTER_THE_STOP = ["migrate", "migrate-continue", "query-migrate"]
NVME = ("-blockdev", "null-co,node-name=ssd", "-device", "nvme,drive=ssd,serial=1")


class Running:
    """A guest on a mount, which has been saved once to `former`."""

    def __init__(self, mounted: Mounted, vm: Qemu, former: Path) -> None:
        self.mounted = mounted
        self.vm = vm
        self.former = former
        mounted.ctl(f"qmp {vm.qmp_path}")
        mounted.ctl(f"save {former}")
        self._former = self._look()

    def _look(self) -> tuple[int, ...]:
        """What changes with any change of the file, or of its bytes."""
        status = self.former.stat()
        return status.st_ino, status.st_size, status.st_blocks, status.st_mtime_ns, status.st_ctime_ns

    async def save(self) -> str:
        """Save over `former`, as somebody else's process does."""
        return await trio.to_thread.run_sync(self.mounted.ctl, f"save {self.former}")

    async def fails(self, words: str, code: int = errno.EIO) -> None:
        """See that a save fails with `words` and leaves all as it was."""
        with pytest.raises(OSError, match=words) as caught:
            await self.save()
        assert caught.value.errno == code, caught.value
        self.is_untouched()

    def is_untouched(self, *, but: str = "") -> None:
        """See that `former` is as it was, and alone."""
        assert self._look() == self._former
        found = {path.name for path in self.former.parent.glob("*former*") if not path.match(but or "/")}
        assert found == {"former"}

    async def goes_on(self) -> None:
        """See that the guest runs."""
        assert await self.vm.run_state() == "running"
        await goes_on(self.vm)

    async def can_be_saved(self) -> None:
        """See that the next save works."""
        self.mounted.ctl(f"qmp {self.vm.qmp_path}")
        await self.save()
        self._former = self._look()
        await self.goes_on()


@asynccontextmanager
async def running(
    checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path, *arguments: str
) -> AsyncIterator[Running]:
    """A guest that runs on a mount."""
    checkpoint = checkpoints.live(SMALL)
    mounted = mount(checkpoint.path)
    incoming = f"file:{mounted.path}/vmstate"
    async with SMALL.on(mounted.ram, checkpoint.guest, *arguments, incoming=incoming) as vm:
        await vm.tick()
        yield Running(mounted, vm, tmp_path / "former")


@pytest.fixture
async def guest(checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path) -> AsyncIterator[Running]:
    async with running(checkpoints, mount, tmp_path) as guest:
        yield guest


@asynccontextmanager
async def monitored(guest: Running, tmp_path: Path) -> AsyncIterator[QmpServer]:
    """Have the mount speak to its QEMU through a relay."""
    async with relayed(guest.vm.qmp_path, tmp_path / "relay") as server:
        guest.mounted.ctl(f"qmp {tmp_path / 'relay'}")
        yield server


async def settings(vm: Qemu) -> tuple[Any, Any]:
    return await vm.qmp("query-migrate-capabilities"), await vm.qmp("query-migrate-parameters")


# ---- QEMU refuses, or the connection breaks -----------------------------------------------------------------


async def test_qemu_refuses_a_command(guest: Running, tmp_path: Path) -> None:
    found = await settings(guest.vm)
    async with monitored(guest, tmp_path) as server:
        await was_stopped(guest.vm)
        for command in BEFORE_THE_STOP:
            server.faults = {command: refuse}
            await guest.fails(f"QEMU refused {command}: told to refuse")
            assert not await was_stopped(guest.vm)
        for command in AFTER_THE_STOP:
            server.faults = {command: refuse}
            await guest.fails(f"QEMU refused {command}: told to refuse")
            assert await was_stopped(guest.vm)
    await guest.goes_on()
    assert await settings(guest.vm) == found
    await guest.can_be_saved()


async def test_the_connection_breaks(guest: Running, tmp_path: Path) -> None:
    guest.mounted.expect_log("migration settings could not be restored")
    async with monitored(guest, tmp_path) as server:
        for command in [*BEFORE_THE_STOP, *AFTER_THE_STOP]:
            server.faults = {command: hang_up}
            stopped = "; if QEMU still runs, its guest is stopped" if command in ("stop", *AFTER_THE_STOP) else ""
            noticed_by = rf"({command}|migrate)"  # whoever reads what QEMU sends may see it first
            await guest.fails(rf"{noticed_by}: the connection to QEMU broke{stopped}", errno.EPIPE)
            assert "lost" in guest.mounted.status()["qmp"]
            if command in AFTER_THE_STOP:
                await guest.vm.qmp("migrate_cancel")
                await guest.vm.migration_ended()
                await guest.vm.cont()
    await guest.goes_on()
    await guest.can_be_saved()


@pytest.mark.parametrize(
    "command", ["query-status", "getfd", "stop", "migrate", "migrate-continue", "query-migrate"]
)
async def test_qemu_is_killed(command: str, checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path) -> None:
    async with running(checkpoints, mount, tmp_path) as guest, monitored(guest, tmp_path) as server:

        async def kill(_: str) -> None:
            os.kill(guest.vm.pid, signal.SIGKILL)

        server.faults = {command: kill}
        if command in ("stop", *AFTER_THE_STOP):
            guest.mounted.expect_log("migration settings could not be restored")
        await guest.fails(f"{command}: the connection to QEMU broke", errno.EPIPE)
    await assert_starts_again(guest, checkpoints.live(SMALL).guest)


async def assert_starts_again(guest: Running, guest_files: Guest) -> None:
    """What the dead machine has written is dropped, and another one starts on its last checkpoint."""
    mounted = guest.mounted
    mounted.ctl("qmp none")
    mounted.ctl("reset")
    async with SMALL.on(mounted.ram, guest_files, incoming=f"file:{mounted.path}/vmstate") as vm:
        mounted.ctl(f"qmp {vm.qmp_path}")
        tick = await vm.tick()
        mounted.ctl("save")
        assert await goes_on(vm) > tick


async def test_qemu_is_killed_while_pages_are_written(
    checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    async with running(checkpoints, mount, tmp_path) as guest:
        mounted = guest.mounted
        last_tick = guest.vm.ticks()[-1]
        mounted.ctl("migrate_set_parameter max-bandwidth 1")
        mounted.ctl(f"save {guest.former} nowait")
        wait_status(mounted, "active")
        os.kill(guest.vm.pid, signal.SIGKILL)
        mounted.ctl("migrate_set_parameter max-bandwidth 0")
        wait_status(mounted, "completed")
    mounted.umount()
    async with SMALL.anonymous(guest_files(checkpoints)) as vm:
        await vm.load(guest.former)
        assert await vm.tick() > last_tick


def guest_files(checkpoints: LiveCheckpoints) -> Guest:
    return checkpoints.live(SMALL).guest


def wait_status(mounted: Mounted, status: str) -> None:
    """Wait until the migration has come so far."""
    mounted.wait_for(lambda found: found["migration"]["status"] == status)


async def test_qemu_is_gone(checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path) -> None:
    async with running(checkpoints, mount, tmp_path) as guest:
        os.kill(guest.vm.pid, signal.SIGKILL)
        with pytest.raises(EOFError):
            await guest.vm.wait_serial("what a dead guest does not print")
        status = guest.mounted.status()
        assert (status["qmp"], status["guest"]) == (f"lost {guest.vm.qmp_path}", None)
        assert status["vmstate"].startswith("used: a machine has run on this RAM, and has ended")
        await guest.fails(f"QMP socket {guest.vm.qmp_path}: Connection refused", errno.ECONNREFUSED)
    await guest.fails(f"QMP socket {guest.vm.qmp_path}: No such file or directory", errno.ENOENT)
    assert guest.mounted.status()["qmp"] == f"lost {guest.vm.qmp_path}"
    await assert_starts_again(guest, guest_files(checkpoints))


# ---- the daemon dies ----------------------------------------------------------------------------------------


async def test_the_daemon_is_killed_below_a_guest(
    checkpoints: LiveCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    async with running(checkpoints, mount, tmp_path) as guest:
        guest.mounted.kill()
        with contextlib.suppress(EOFError):  # SIGBUS, at the first page that the kernel has not
            for _ in range(2):
                await guest.vm.tick()
    assert "BAD" not in guest.vm.serial
    unmount_by_force(guest.mounted.path)
    mounted = mount(guest.former, path=guest.mounted.path)
    async with SMALL.on(mounted.ram, guest_files(checkpoints), incoming=f"file:{mounted.path}/vmstate") as vm:
        await goes_on(vm)


# ---- whatever else is at the socket -------------------------------------------------------------------------


async def test_what_is_at_the_socket_is_no_qemu(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "vm", "ram=pc.ram:4M", f"qmp={tmp_path / 'qmp'}")

    async def save_fails(words: str) -> None:
        with pytest.raises(OSError, match=words):
            await trio.to_thread.run_sync(mounted.ctl, "save")

    await save_fails(f"QMP socket {tmp_path / 'qmp'}: No such file or directory")
    assert mounted.status()["qmp"] == f"waiting {tmp_path / 'qmp'}"
    async with trio.open_nursery() as nursery, served(FakeQemu(nursery), tmp_path / "qmp") as server:
        for greeting in (b"", b"\x00\xff\n", b"220 mail ready\r\n"):

            async def greet(_: str, greeting: bytes = greeting) -> None:
                raise HangUpError(greeting)

            server.faults = {"greeting": greet}
            await save_fails("whatever answers there does not speak QMP")
        server.faults = {}
        await save_fails("QEMU refused human-monitor-command: The command human-monitor-command has not been found")
    assert mounted.ctl("save ram-only").startswith("ok")


# ---- QEMU cannot migrate ------------------------------------------------------------------------------------


async def test_a_device_that_cannot_be_migrated(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "vm", SMALL.ram_option)
    async with SMALL.on(mounted.ram, guest_files, *NVME) as vm:
        await set_odd(vm)
        found = await settings(vm)
        mounted.ctl(f"qmp {vm.qmp_path}")
        with pytest.raises(OSError, match=r"QEMU refused migrate: State blocked by non-migratable device '.*nvme'"):
            mounted.ctl("save")
        assert await settings(vm) == found
        assert await vm.run_state() == "running"
        assert not (tmp_path / "vm").exists()
    assert mounted.ctl("save ram-only").startswith("ok")


async def test_another_migration_is_running(guest: Running, tmp_path: Path) -> None:
    await guest.vm.qmp("migrate-set-parameters", max_bandwidth=10_000)
    await was_stopped(guest.vm)
    await guest.vm.qmp("migrate", uri=f"file:{tmp_path / 'elsewhere'}")
    await guest.fails("QEMU refused migrate-set-capabilities: There's a migration process in progress")
    await guest.vm.qmp("migrate_cancel")
    await guest.vm.migration_ended()
    assert not await was_stopped(guest.vm)
    await guest.can_be_saved()


# ---- what QEMU was set to -----------------------------------------------------------------------------------

ODD_CAPABILITIES = {
    "multifd": True,
    "mapped-ram": True,
    "events": False,
    "return-path": True,
    "auto-converge": True,
}
ODD_PARAMETERS = {
    "max-bandwidth": 12345,
    "multifd-channels": 7,
    "direct-io": True,
    "zero-page-detection": "none",
    "downtime-limit": 1,
    "mode": "cpr-reboot",
}


async def set_odd(vm: Qemu) -> None:
    entries = [{"capability": name, "state": state} for name, state in ODD_CAPABILITIES.items()]
    await vm.qmp("migrate-set-capabilities", capabilities=entries)
    await vm.qmp("migrate-set-parameters", **ODD_PARAMETERS)


async def test_settings_are_put_back(guest: Running) -> None:
    await set_odd(guest.vm)
    found = await settings(guest.vm)
    await guest.can_be_saved()
    assert await settings(guest.vm) == found
    capabilities, parameters = found
    assert ODD_CAPABILITIES.items() <= {entry["capability"]: entry["state"] for entry in capabilities}.items()
    assert ODD_PARAMETERS.items() <= parameters.items()


async def test_tls_credentials_are_put_back(guest: Running) -> None:
    await guest.vm.qmp("migrate-set-parameters", tls_creds="tls0")
    found = await settings(guest.vm)
    await guest.can_be_saved()
    assert await settings(guest.vm) == found
    assert found[1]["tls-creds"] == "tls0"


# ---- a guest that is paused ---------------------------------------------------------------------------------


async def test_a_paused_guest_stays_paused(guest: Running, checkpoints: LiveCheckpoints, tmp_path: Path) -> None:
    vm, mounted = guest.vm, guest.mounted
    await vm.stop()
    last_tick = vm.ticks()[-1]
    await guest.save()
    assert await vm.run_state() == "postmigrate"
    mounted.ctl(f"save {tmp_path / 'again'}")  # QEMU would not migrate again, and need not
    assert vm.ticks()[-1] == last_tick
    await vm.cont()
    await guest.can_be_saved()
    await vm.stop()
    await guest.save()
    await vm.cont()
    await guest.can_be_saved()
    async with SMALL.anonymous(guest_files(checkpoints)) as other:
        await other.load(tmp_path / "again")
        assert await other.run_state() == "paused"
        assert other.ticks() == []
        await other.cont()
        assert await other.tick() == last_tick + 1


async def test_a_guest_that_ran_and_was_migrated_by_somebody_else(guest: Running, tmp_path: Path) -> None:
    await guest.vm.tick()
    await guest.vm.migrate_to(tmp_path / "elsewhere")
    assert await guest.vm.run_state() == "postmigrate"
    await guest.fails("QEMU saved this guest while it was paused, .*: `cont`, then save", errno.EBUSY)
    await guest.vm.cont()
    await guest.can_be_saved()


# ---- somebody stops the command that saves (ckptfs(1), SIGNALS) ---------------------------------------------


class OnATerminal:
    """ckptfs with a terminal of its own, whose keys it hears."""

    def __init__(self, *arguments: str | Path) -> None:
        self._ours, theirs = os.openpty()
        command = ["setsid", "--ctty", BIN / "ckptfs", *arguments]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)

    def ctrl_c(self) -> None:
        os.write(self._ours, b"\x03")

    def end(self) -> tuple[int, str]:
        """Its exit code, and all that it has shown."""
        shown = b""
        with contextlib.suppress(OSError):  # the other side is closed
            while part := os.read(self._ours, 4096):
                shown += part
        os.close(self._ours)
        return self.process.wait(DEADLINE), shown.decode()


async def test_a_save_is_stopped(guest: Running) -> None:
    mounted, bandwidth = guest.mounted, guest.mounted.path / "parameters/max-bandwidth"

    async def begun() -> OnATerminal:
        bandwidth.write_text("1M\n")
        command = await trio.to_thread.run_sync(OnATerminal, "save", mounted.path, guest.former)
        await trio.to_thread.run_sync(mounted.wait_for, is_active)
        return command

    for stop in (OnATerminal.ctrl_c, lambda command: command.process.terminate()):
        command = await begun()
        stop(command)
        code, shown = await trio.to_thread.run_sync(command.end)
        assert code == 1
        assert "cancelling ..." in shown
        assert shown.endswith(f"{mounted.path}: the save was cancelled\r\n")
        guest.is_untouched()
        await guest.goes_on()

    command = await begun()
    command.process.kill()
    assert (await trio.to_thread.run_sync(command.end))[0] == -signal.SIGKILL
    await guest.goes_on()
    guest.is_untouched(but="*.former.*")  # it is still being written
    bandwidth.write_text("0\n")
    await trio.run_process([BIN / "ckptfs", "wait", "-q", mounted.path])
    assert [path.name for path in guest.former.parent.glob("*former*")] == ["former"]
    await guest.can_be_saved()


def is_active(status: dict[str, Any]) -> bool:
    return status["migration"].get("status") == "active"
