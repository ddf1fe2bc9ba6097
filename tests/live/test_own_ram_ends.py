"""Captures of machines whose RAM is their own that end early: QEMU dies, ckptfs dies, somebody else interferes."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.doubles.qmp_server import Fault, QmpServer, relayed
from tests.live.test_own_ram import LENGTH, assert_is_right, left_in, running, settings, ticks
from tests.mount.conftest import Mount
from tests.mount.harness import Mounted
from tests.qemu.machine import Qemu
from tests.qemu.qmp import QmpError
from tests.qemu.stepper import Stepper, build_stepper

COMMANDS = ["getfd", "migrate", "query-migrate"]


@pytest.fixture(scope="session")
def stepper(tmp_path_factory: pytest.TempPathFactory) -> Stepper:
    return build_stepper(tmp_path_factory.mktemp("stepper"), LENGTH)


class Program:
    """A command line, and the signal that ends it at one of its steps."""

    def __init__(self, command: list[Path | str], number: int = signal.SIGKILL) -> None:
        self._command = command
        self._number = number
        self._process: subprocess.Popen[str] | None = None

    async def kill(self, _: str) -> None:
        assert self._process is not None
        self._process.send_signal(self._number)
        if self._number == signal.SIGKILL:
            self._process.wait()

    async def run(self) -> tuple[int, str]:
        """Its exit code and what it says on stderr."""
        self._process = await trio.to_thread.run_sync(self._start)
        _, stderr = await trio.to_thread.run_sync(self._process.communicate)
        return self._process.returncode, stderr

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)


@asynccontextmanager
async def captured(
    way: str, mount: Mount, stepper: Stepper, tmp_path: Path
) -> AsyncIterator[tuple[Qemu, Mounted, QmpServer]]:
    """A machine that has been saved once, over a relay."""
    async with (
        running(stepper, "memory-backend-ram") as vm,
        relayed(vm.qmp_path, tmp_path / "relay") as server,
    ):
        await ticks(vm)
        mounted = mount(tmp_path / "saved", f"qmp={tmp_path / 'relay'}", f"capture={way}")
        await trio.to_thread.run_sync(mounted.ctl, "save")
        yield vm, mounted, server


def look_at(path: Path) -> tuple[int, ...]:
    """What changes with any change of a file, or of its bytes, and not with a look at them, as atime does."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_blocks, status.st_mtime_ns, status.st_ctime_ns


@pytest.mark.parametrize("way", ["snapshot", "precopy"])
async def test_qemu_is_killed(way: str, mount: Mount, stepper: Stepper, tmp_path: Path) -> None:
    for command in [*COMMANDS, "amid the stream"]:
        directory = tmp_path / command
        directory.mkdir()
        async with captured(way, mount, stepper, directory) as (vm, mounted, server):
            former = look_at(directory / "saved")

            async def kill(_: str, vm: Qemu = vm) -> None:
                os.kill(vm.pid, signal.SIGKILL)

            server.faults = {command: kill}
            if command in ("migrate", "query-migrate", "amid the stream"):
                mounted.expect_log("settings could not be restored")
            if command == "amid the stream":
                mounted.ctl("migrate_set_parameter max-bandwidth 1")
                mounted.ctl("save nowait")
                await trio.to_thread.run_sync(
                    mounted.wait_for, lambda status: status["migration"]["status"] == "active"
                )
                await kill("")
                mounted.expect_log("in the background: ")
                mounted.ctl("migrate_set_parameter max-bandwidth 0")
                await trio.to_thread.run_sync(
                    mounted.wait_for, lambda status: status["migration"]["status"] == "failed"
                )
            else:
                with pytest.raises(OSError, match="the connection to QEMU broke") as caught:
                    await trio.to_thread.run_sync(mounted.ctl, "save")
                assert caught.value.errno == errno.EPIPE
            assert look_at(directory / "saved") == former
            assert left_in(directory) == ["saved"]
        await assert_is_right(directory / "saved", stepper)
        mounted.umount()


async def test_qemu_answers_no_sooner_than_its_stream_is_read(
    mount: Mount, stepper: Stepper, tmp_path: Path
) -> None:
    async with captured("snapshot", mount, stepper, tmp_path) as (vm, mounted, server):

        async def until_all_is_sent(_: str) -> None:
            if server.commands[-2] == "migrate":
                await vm.migration_ended()

        server.faults = {"query-migrate-capabilities": until_all_is_sent}
        await trio.to_thread.run_sync(mounted.ctl, "save")
        await ticks(vm)
    await assert_is_right(tmp_path / "saved", stepper)


@pytest.mark.parametrize("way", ["snapshot", "precopy"])
async def test_ckptfs_is_killed(way: str, stepper: Stepper, tmp_path: Path) -> None:
    async with (
        running(stepper, "memory-backend-ram") as vm,
        relayed(vm.qmp_path, tmp_path / "relay") as server,
    ):
        await ticks(vm)
        command = [Path(sys.executable).parent / "ckptfs", "save", f"--capture={way}", tmp_path / "saved"]
        await trio.run_process([*command, "--qmp", tmp_path / "relay", "--quiet"])
        former = (tmp_path / "saved").read_bytes()
        for at in COMMANDS:
            program = Program([*command, "--qmp", tmp_path / "relay"])
            server.faults = {at: program.kill}
            await program.run()
            server.faults = {}
            assert (tmp_path / "saved").read_bytes() == former
            await vm.migration_ended()
            if await vm.run_state() == "postmigrate":  # all had been sent
                assert (way, at) == ("precopy", "query-migrate")
                await vm.cont()
            await ticks(vm)
        await trio.run_process([*command, "--qmp", tmp_path / "relay", "--quiet"])
        assert left_in(tmp_path) == ["saved"]
        await ticks(vm)
    await assert_is_right(tmp_path / "saved", stepper)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_cancels(number: int, stepper: Stepper, tmp_path: Path) -> None:
    async with (
        running(stepper, "memory-backend-ram") as vm,
        relayed(vm.qmp_path, tmp_path / "relay") as server,
    ):
        await ticks(vm)
        found = await settings(vm)
        command = [Path(sys.executable).parent / "ckptfs", "save", "--qmp", tmp_path / "relay", tmp_path / "saved"]
        program = Program(command, number)
        server.faults = {"migrate": program.kill}
        assert await program.run() == (1, "cancelling ...\nthe save was cancelled\n")
        assert left_in(tmp_path) == []
        assert await settings(vm) == found
        await ticks(vm)


@pytest.mark.parametrize("way", ["snapshot", "precopy"])
async def test_somebody_else_commands_it(way: str, mount: Mount, stepper: Stepper, tmp_path: Path) -> None:
    async with captured(way, mount, stepper, tmp_path) as (vm, mounted, server):
        found = await settings(vm)
        for at in [*COMMANDS, *(["cont"] if way == "precopy" else [])]:
            for line in ("cont", "stop", "migrate_cancel"):
                server.faults = {at: once(vm, line, server if at == "query-migrate" else None)}
                failed = ""
                try:
                    await trio.to_thread.run_sync(mounted.ctl, "save")
                except OSError as error:
                    failed = str(error)
                assert not failed or (line == "migrate_cancel" and "somebody else cancelled" in failed), failed
                assert await vm.run_state() in states_after(way, at, line), (at, line)
                await vm.qmp("cont")
                await ticks(vm)
                assert await settings(vm) == found
            await assert_is_right(tmp_path / "saved", stepper, "")


def once(vm: Qemu, line: str, server: QmpServer | None) -> Fault:
    """Say `line` the first time; if there is a `server`, the first time after QEMU was told to migrate."""
    left = [line]

    async def interfere(_: str) -> None:
        if left and (server is None or "migrate" in server.commands[-8:]):
            with contextlib.suppress(QmpError):
                await vm.qmp(left.pop())

    return interfere


def states_after(way: str, at: str, line: str) -> tuple[str, ...]:
    """The guest stands still if somebody stopped it; what QEMU had stopped for precopy looks no different."""
    if line != "stop" or at == "cont" or (way, at) == ("precopy", "query-migrate"):
        return ("running",)
    return ("paused", "postmigrate")
