"""A QMP server that does as it is told: a machine made up here, or stock QEMU with faults in between.

::

    machine = FakeQemu()
    async with served(machine, path) as server:
        server.faults["migrate"] = hang

`machine` answers; a fault comes between: it is called with the command's name ("greeting" for the first words),
does its evil, and then the machine answers, unless the fault has raised one of the errors below.
"""

import array
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import trio

from tests.qemu.qmp import Qmp, QmpError

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": []}}\r\n'


class RefusalError(Exception):
    """What the machine, or a fault, answers with an error of this text."""


class HangUpError(Exception):
    """Close the connection, after sending what is in `args[0]`, if anything."""


class HangError(Exception):
    """Give no answer for as long as the client is there."""


Fault = Callable[[str], Awaitable[None]]


async def hang(command: str) -> None:
    """Never answer."""
    raise HangError


async def hang_up(command: str) -> None:
    """Close the connection instead of an answer."""
    raise HangUpError


async def refuse(command: str) -> None:
    """Answer with an error."""
    raise RefusalError("told to refuse")


class Machine(Protocol):
    """Whatever answers commands."""

    async def answer(self, command: str, arguments: dict[str, Any], fd: int | None) -> Any:
        """Return the command's result, or raise RefusalError; `fd` came with it, and is the machine's now."""


class QmpServer:
    """One client at a time, as QEMU's; `commands` are those that came, in order."""

    def __init__(self, machine: Machine) -> None:
        self.faults: dict[str, Fault] = {}
        self.commands: list[str] = []
        self._machine = machine
        self._fds: list[int] = []

    async def serve(self, listener: trio.socket.SocketType) -> None:
        """Serve one client after the other, for ever."""
        while True:
            connection, _ = await listener.accept()
            with connection:
                with contextlib.suppress(HangUpError, ConnectionError):
                    await self._session(connection)
                for fd in self._fds:
                    os.close(fd)
                self._fds.clear()

    async def _session(self, connection: trio.socket.SocketType) -> None:
        await self._fault(connection, "greeting")
        await _send(connection, GREETING)
        received = ""
        while data := await self._receive(connection):
            received = (received + data.decode()).lstrip()
            with contextlib.suppress(json.JSONDecodeError):  # no line end tells that a request is whole
                while received:
                    request, end = json.JSONDecoder().raw_decode(received)
                    received = received[end:].lstrip()
                    await _send(connection, await self._reply(connection, request))

    async def _reply(self, connection: trio.socket.SocketType, request: dict[str, Any]) -> bytes:
        command = request["execute"]
        self.commands.append(command)
        try:
            await self._fault(connection, command)
            fd = self._fds.pop(0) if command == "getfd" else None
            result: dict[str, Any] = {}
            if command != "qmp_capabilities":
                result = await self._machine.answer(command, request.get("arguments", {}), fd)
            reply = {"return": result}
        except RefusalError as refusal:
            reply = {"error": {"class": "GenericError", "desc": str(refusal)}}
        if "id" in request:
            reply["id"] = request["id"]
        return json.dumps(reply).encode() + b"\r\n"

    async def _fault(self, connection: trio.socket.SocketType, command: str) -> None:
        try:
            if command in self.faults:
                await self.faults[command](command)
        except HangUpError as fault:
            await _send(connection, *fault.args)
            raise
        except HangError:
            while await self._receive(connection):
                pass
            raise HangUpError from None

    async def _receive(self, connection: trio.socket.SocketType) -> bytes:
        data, ancillary, _, _ = await connection.recvmsg(1 << 16, socket.CMSG_SPACE(16 * 4))
        for level, kind, packed in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds += array.array("i", packed)
        return data


async def _send(connection: trio.socket.SocketType, data: bytes = b"") -> None:
    while data:
        data = data[await connection.send(data) :]


@asynccontextmanager
async def served(machine: Machine, path: Path) -> AsyncIterator[QmpServer]:
    """A server of `machine` at `path`."""
    server = QmpServer(machine)
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, listener)
            yield server
            nursery.cancel_scope.cancel()


class FakeQemu:
    """What ckptfs asks of a QEMU, without one: `stream` is what it has for a device state.

    `broken_off` makes a migration fail in the middle, `stalled` has it stay there until it is cancelled.
    """

    def __init__(self, nursery: trio.Nursery, run_state: str = "running", stream: bytes = b"device state") -> None:
        self.run_state = run_state
        self.stream = stream
        self.broken_off = False
        self.stalled = False
        self.half_sent = trio.Event()
        self.capabilities = dict.fromkeys(("xbzrle", "events", "multifd", "x-ignore-shared", "mapped-ram"), False)
        self.parameters: dict[str, Any] = {"max-bandwidth": 128 << 20, "tls-creds": "", "mode": "normal"}
        self.migration: dict[str, Any] = {}
        self.descriptors: dict[str, int] = {}
        self._cancelled = trio.Event()
        self._nursery = nursery

    async def answer(self, command: str, arguments: dict[str, Any], fd: int | None) -> Any:
        await trio.lowlevel.checkpoint()
        match command:
            case "query-status":
                return {"status": self.run_state, "running": self.run_state == "running"}
            case "stop":
                self.run_state = "paused" if self.run_state == "running" else self.run_state
            case "cont":
                self.run_state = "running"
            case "query-migrate-capabilities":
                return [{"capability": name, "state": state} for name, state in self.capabilities.items()]
            case "query-migrate-parameters":
                return self.parameters
            case "migrate-set-capabilities":
                for entry in arguments["capabilities"]:
                    self.capabilities[entry["capability"]] = entry["state"]
            case "migrate-set-parameters":
                self.parameters = {**self.parameters, **arguments}
            case "getfd":
                assert fd is not None
                self.descriptors[arguments["fdname"]] = fd
            case "closefd":
                os.close(self._take(arguments["fdname"]))
            case "migrate":
                self._nursery.start_soon(self._migrate, self._take(arguments["uri"].removeprefix("fd:")))
            case "migrate_cancel":
                self._cancelled.set()
            case "query-migrate":
                return self.migration
            case _:
                raise RefusalError(f"The command {command} has not been found")
        return {}

    def close(self) -> None:
        """Close the descriptors that it was given, as QEMU's end does."""
        for fd in self.descriptors.values():
            os.close(fd)

    def _take(self, name: str) -> int:
        if name not in self.descriptors:
            raise RefusalError(f"File descriptor named '{name}' not found")
        return self.descriptors.pop(name)

    async def _migrate(self, fd: int) -> None:
        self.migration = {"status": "active"}
        self._cancelled = trio.Event()
        half = len(self.stream) // 2
        async with trio.lowlevel.FdStream(fd) as pipe:
            try:
                await pipe.send_all(self.stream[:half])
                self.half_sent.set()
                if self.stalled:
                    await self._cancelled.wait()
                if not self.broken_off and not self._cancelled.is_set():
                    await pipe.send_all(self.stream[half:])
            except trio.BrokenResourceError:
                self.broken_off = True
            if self._cancelled.is_set():
                self.migration = {"status": "cancelled"}
            elif self.broken_off:
                self.migration = {"status": "failed", "error-desc": "told to fail"}
            else:
                self.run_state = "postmigrate"
                self.migration = {"status": "completed"}


class Relay:
    """Stock QEMU, at the other end of `connection`."""

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self._connection = connection
        self.qmp = Qmp(trio.SocketStream(connection))

    async def answer(self, command: str, arguments: dict[str, Any], fd: int | None) -> Any:
        if fd is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            await self._connection.sendmsg([b" "], rights)
            os.close(fd)
        try:
            return await self.qmp.execute(command, **arguments)
        except QmpError as error:
            raise RefusalError(str(error).removeprefix(f"{command}: ")) from error
        except EOFError:
            raise HangUpError from None


@asynccontextmanager
async def relayed(qmp_path: Path, path: Path) -> AsyncIterator[QmpServer]:
    """A server at `path` that has QEMU's monitor at `qmp_path` answer."""
    with trio.socket.socket(socket.AF_UNIX) as connection:
        await connection.connect(str(qmp_path))
        relay = Relay(connection)
        await relay.qmp.greet()
        async with served(relay, path) as server:
            yield server
