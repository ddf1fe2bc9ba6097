"""The monitor, tried on stock QEMU and on the double that stands for it in other tests: both behave alike."""

import asyncio
import gc
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from ckptfs.channels.identity import Identity
from ckptfs.errors import QemuError
from ckptfs.qemu import monitor as monitor_module
from ckptfs.qemu.monitor import connected
from tests.doubles.qmp_server import FakeQemu, HangUpError, QmpServer, hang, hang_up, relayed, served
from tests.doubles.storage import open_descriptors, wait_until_open
from tests.qemu.guest import Guest
from tests.qemu.machine import Qemu


@asynccontextmanager
async def double(guest_files: Guest, tmp_path: Path) -> AsyncIterator[tuple[QmpServer, Path]]:
    path = tmp_path / "double"
    async with trio.open_nursery() as nursery, served(FakeQemu(nursery), path) as server:
        yield server, path


@asynccontextmanager
async def stock_qemu(guest_files: Guest, tmp_path: Path) -> AsyncIterator[tuple[QmpServer, Path]]:
    path = tmp_path / "relay"
    async with Qemu(guest_files, "-S") as vm, relayed(vm.qmp_path, path) as server:
        yield server, path


@pytest.fixture(params=[double, stock_qemu])
async def server(
    request: pytest.FixtureRequest, guest_files: Guest, tmp_path: Path
) -> AsyncIterator[tuple[QmpServer, Path]]:
    async with request.param(guest_files, tmp_path) as served:
        yield served


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    before = open_descriptors()
    yield
    wait_until_open(before)
    assert "qmp" not in [thread.name for thread in threading.enumerate()]


def connect(path: Path, deadline: float = 20.0) -> Any:
    return connected(str(path), Identity.of_daemon(), deadline)


async def test_a_command_and_its_result(server: tuple[QmpServer, Path]) -> None:
    async with connect(server[1]) as monitor:
        parameters = await monitor.execute("query-migrate-parameters")
        assert parameters["max-bandwidth"] == 128 << 20
        await monitor.execute("migrate-set-parameters", max_bandwidth=12345)
        assert (await monitor.execute("query-migrate-parameters"))["max-bandwidth"] == 12345


async def test_a_refusal_names_the_command_and_the_session_goes_on(server: tuple[QmpServer, Path]) -> None:
    async with connect(server[1]) as monitor:
        with pytest.raises(QemuError, match=r"^QEMU refused closefd: File descriptor named 'nosuch' not found$"):
            await monitor.execute("closefd", fdname="nosuch")
        with pytest.raises(QemuError, match=r"^QEMU refused nosuch: The command nosuch has not been found$"):
            await monitor.execute("nosuch")
        assert "status" in await monitor.execute("query-status")


async def test_a_descriptor(server: tuple[QmpServer, Path]) -> None:
    async with connect(server[1]) as monitor:
        receiver, sender = os.pipe()
        await monitor.send_descriptor("given", sender)
        os.close(sender)
        async with trio.lowlevel.FdStream(receiver) as pipe:
            await monitor.execute("closefd", fdname="given")
            assert await pipe.receive_some() == b""


async def test_one_session_after_the_other(server: tuple[QmpServer, Path]) -> None:
    for _ in range(3):
        async with connect(server[1]) as monitor:
            await monitor.execute("query-status")


async def test_two_commands_at_once(server: tuple[QmpServer, Path]) -> None:
    async with connect(server[1]) as monitor, trio.open_nursery() as nursery:
        for command in ("query-status", "query-migrate"):
            nursery.start_soon(monitor.execute, command)


async def test_a_cancelled_command_leaves_the_session_usable(server: tuple[QmpServer, Path]) -> None:
    async with connect(server[1]) as monitor:
        with trio.CancelScope() as scope:
            scope.cancel()
            await monitor.execute("query-migrate")
        assert scope.cancelled_caught
        assert "status" in await monitor.execute("query-status")


async def test_no_answer(server: tuple[QmpServer, Path]) -> None:
    server[0].faults["query-migrate"] = hang
    async with connect(server[1]) as monitor:
        monitor.deadline = 0.05
        with pytest.raises(QemuError, match=r"^query-migrate: QEMU did not answer for 0\.05 s$"):
            await monitor.execute("query-migrate")


async def broken_at(server: tuple[QmpServer, Path], command: str) -> None:
    async with connect(server[1]) as monitor:
        with pytest.raises(QemuError, match=rf"^{command}: the connection to QEMU broke$"):
            await monitor.execute(command)
        with pytest.raises(QemuError, match=r"^cont: the connection to QEMU broke$"):
            await monitor.execute("cont")
    del server[0].faults[command]
    async with connect(server[1]) as monitor:
        assert "status" in await monitor.execute("query-status")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b'{"return": {"status"',
        b"\xff\x00garbage\r\n",
        b"[1, 2]\r\n",
        b"null\r\n",
        b'{"error": {"class": "GenericError", "desc": "Invalid JSON syntax"}}\r\n',
        b"[" * 100_000 + b"\r\n",
        b'{"return": "' + b"x" * (11 << 20) + b'"}\r\n',
    ],
    ids=["end", "half", "binary", "list", "null", "no-id", "deep", "huge"],
)
async def test_broken_in_the_middle_of_a_command(server: tuple[QmpServer, Path], answer: bytes) -> None:
    async def fault(command: str) -> None:
        raise HangUpError(answer)

    server[0].faults["query-migrate"] = fault
    await broken_at(server, "query-migrate")


async def test_broken_at_a_descriptor(server: tuple[QmpServer, Path]) -> None:
    server[0].faults["getfd"] = hang_up
    async with connect(server[1]) as monitor:
        receiver, sender = os.pipe()
        async with trio.lowlevel.FdStream(receiver) as pipe:
            with pytest.raises(QemuError, match=r"^getfd: the connection to QEMU broke$"):
                await monitor.send_descriptor("given", sender)
            os.close(sender)
            assert await pipe.receive_some() == b""


GREETINGS = {
    "end": b"",
    "half": b'{"QMP": {',
    "garbage": b"SSH-2.0-OpenSSH_9.2\r\n",
    "other": json.dumps({"hello": "there"}).encode() + b"\r\n",
    "list": b"[]\r\n",
    "deep": b"[" * 100_000 + b"\r\n",
    "huge": b"x" * (11 << 20) + b"\r\n",
}


@pytest.mark.parametrize("greeting", GREETINGS.values(), ids=GREETINGS)
async def test_no_qemu_at_the_socket(tmp_path: Path, greeting: bytes) -> None:
    async with trio.open_nursery() as nursery, served(FakeQemu(nursery), tmp_path / "socket") as server:

        async def fault(command: str) -> None:
            raise HangUpError(greeting)

        server.faults["greeting"] = fault
        with pytest.raises(QemuError, match=r"^QMP socket .*/socket: whatever answers there does not speak QMP$"):
            async with connect(tmp_path / "socket"):
                pass


async def test_a_server_without_a_greeting(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery, served(FakeQemu(nursery), tmp_path / "socket") as server:
        server.faults["greeting"] = hang
        with pytest.raises(QemuError, match=r"no greeting in 0\.05 s; it serves one client at a time") as caught:
            async with connect(tmp_path / "socket", deadline=0.05):
                pass
        assert caught.value.errno == 110


async def test_no_socket(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match=r"^QMP socket .*/nowhere: No such file or directory: start QEMU .*`qmp"):
        async with connect(tmp_path / "nowhere"):
            pass
    (tmp_path / "file").touch()
    with pytest.raises(QemuError, match=r"^QMP socket .*/file: Connection refused: start QEMU .*`qmp"):
        async with connect(tmp_path / "file"):
            pass
    async with trio.open_nursery() as nursery, served(FakeQemu(nursery), tmp_path / "gone"):
        pass
    with pytest.raises(QemuError, match=r"^QMP socket .*/gone: Connection refused: start QEMU .*`qmp"):
        async with connect(tmp_path / "gone"):
            pass


async def test_a_monitor_is_one_at_a_time(guest_files: Guest) -> None:
    async with Qemu(guest_files, "-S") as vm, connect(vm.qmp_path):
        with pytest.raises(QemuError, match=r"no greeting in 0\.05 s; it serves one client at a time"):
            async with connect(vm.qmp_path, deadline=0.05):
                pass


async def test_a_monitor_whose_backlog_is_full(guest_files: Guest) -> None:
    async with Qemu(guest_files, "-S") as vm, connect(vm.qmp_path):
        words = []
        for _ in range(4):
            with pytest.raises(
                QemuError, match="it serves one client at a time: give QEMU a second -qmp"
            ) as caught:
                async with connect(vm.qmp_path, deadline=0.05):
                    pass
            words.append(str(caught.value).split(": ")[1].split(";")[0])
        assert words[-1] == "others are already waiting there", words


async def test_a_qemu_that_has_missed_a_deadline_has_less_time(
    server: tuple[QmpServer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "_LAST_CHANCE", 0.01)
    server[0].faults["query-migrate"] = hang
    async with connect(server[1]) as monitor:
        monitor.deadline = 0.1
        with pytest.raises(QemuError, match=r"^query-migrate: QEMU did not answer for 0\.1 s$"):
            await monitor.execute("query-migrate")
        for command in ("cont", "closefd"):
            with pytest.raises(QemuError, match=rf"^{command}: QEMU did not answer for 0\.01 s$"):
                await monitor.execute(command)


async def test_cancelled_while_it_connects(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery, served(FakeQemu(nursery), tmp_path / "socket") as server:
        server.faults["greeting"] = hang
        with trio.move_on_after(0.05) as scope:
            async with connect(tmp_path / "socket"):
                pass
        assert scope.cancelled_caught


async def test_cancelled_while_its_call_fails(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio would print an exception that nobody takes any more."""
    waits = threading.Event()

    async def fail() -> None:
        try:
            waits.set()
            await asyncio.Event().wait()
        finally:
            raise EOFError

    async with monitor_module._loop_in_thread() as loop, trio.open_nursery() as nursery:
        nursery.start_soon(monitor_module._run_in, loop, fail())
        await trio.to_thread.run_sync(waits.wait)
        nursery.cancel_scope.cancel()
    gc.collect()
    assert not caplog.records
