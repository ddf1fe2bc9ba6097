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
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import trio

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


Emit = Callable[[str, dict[str, Any]], Awaitable[None]]
"""Sends an event, by its name and data."""


class Machine(Protocol):
    """Whatever answers commands; the server says how to emit events."""

    emit: Emit

    async def answer(self, command: str, arguments: dict[str, Any], fd: int | None) -> Any:
        """Return the command's result, or raise RefusalError; `fd` came with it, and is the machine's now."""


class QmpServer:
    """One client at a time, as QEMU's; `commands` are those that came, in order."""

    def __init__(self, machine: Machine) -> None:
        self.faults: dict[str, Fault] = {}
        self.commands: list[str] = []
        self._machine = machine
        self._fds: list[int] = []
        self._client: trio.socket.SocketType | None = None
        self._sending = trio.Lock()
        machine.emit = self._emit

    async def serve(self, listener: trio.socket.SocketType) -> None:
        """Serve one client after the other, for ever."""
        while True:
            connection, _ = await listener.accept()
            with connection:
                with contextlib.suppress(HangUpError, ConnectionError):
                    await self._session(connection)
                self._client = None
                for fd in self._fds:
                    os.close(fd)
                self._fds.clear()

    async def _session(self, connection: trio.socket.SocketType) -> None:
        await self._fault(connection, "greeting")
        await _send(connection, GREETING)
        self._client = connection
        received = ""
        while data := await self._receive(connection):
            received = (received + data.decode()).lstrip()
            with contextlib.suppress(json.JSONDecodeError):  # no line end tells that a request is whole
                while received:
                    request, end = json.JSONDecoder().raw_decode(received)
                    received = received[end:].lstrip()
                    reply = await self._reply(connection, request)
                    async with self._sending:
                        await _send(connection, reply)

    async def _emit(self, name: str, data: dict[str, Any]) -> None:
        """Tell the client, if there is one, of an event."""
        event = {"event": name, "data": data, "timestamp": {"seconds": int(time.time()), "microseconds": 0}}
        async with self._sending:
            if self._client is None:
                return
            with contextlib.suppress(OSError):
                await _send(self._client, json.dumps(event).encode() + b"\r\n")

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

    It answers migrate-continue when all of that is sent, as QEMU may.

    `broken_off` makes a migration fail in the middle, `stalled` has it stay there until it is cancelled. `late` is
    how many times it is asked for its run state before that tells that a migration is over.
    """

    emit: Emit

    def __init__(self, nursery: trio.Nursery, run_state: str = "running", stream: bytes = b"device state") -> None:
        self.run_state = run_state
        self.stream = stream
        self.broken_off = False
        self.reason = "told to fail"
        self.stalled = False
        self.late = 0
        self.half_sent = trio.Event()
        names = ("xbzrle", "events", "pause-before-switchover", "multifd", "x-ignore-shared", "mapped-ram")
        self.capabilities = dict.fromkeys(names, False)
        self.parameters: dict[str, Any] = {"max-bandwidth": 128 << 20, "tls-creds": "", "mode": "normal"}
        self.migration: dict[str, Any] = {}
        self.descriptors: dict[str, int] = {}
        self._cancelled = trio.Event()
        self._goes_on = trio.Event()
        self._sent = trio.Event()
        self._nursery = nursery

    async def answer(self, command: str, arguments: dict[str, Any], fd: int | None) -> Any:
        await trio.lowlevel.checkpoint()
        match command:
            case "query-status":
                if self.migration.get("status") == "completed" and self.run_state == "finish-migrate":
                    self._finish()
                return {"status": self.run_state, "running": self.run_state == "running"}
            case "stop":
                if self.run_state == "running":
                    self.run_state = "paused"
                    await self.emit("STOP", {})
            case "cont":
                if self.run_state == "finish-migrate":
                    raise RefusalError("Migration is not finalized yet")
                await self._run()
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
                await self._set_status("setup")
                self._nursery.start_soon(self._migrate, self._take(arguments["uri"].removeprefix("fd:")))
            case "migrate-continue":
                if self.migration != {"status": "pre-switchover"}:
                    raise RefusalError(f"Migration not in expected state: {self.migration['status']}")
                self._goes_on.set()
                await self._sent.wait()
            case "migrate_cancel":
                self._cancelled.set()
                self._goes_on.set()
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

    async def _run(self) -> None:
        if self.run_state != "running":
            self.run_state = "running"
            await self.emit("RESUME", {})

    def _finish(self) -> None:
        if not self.late:
            self.run_state = "postmigrate"
        self.late = max(0, self.late - 1)

    async def _set_status(self, status: str, **more: str) -> None:
        self.migration = {"status": status, **more}
        if self.capabilities["events"]:
            await self.emit("MIGRATION", {"status": status})

    async def _migrate(self, fd: int) -> None:
        self._cancelled = trio.Event()
        self._goes_on = trio.Event()
        self._sent = trio.Event()
        half = len(self.stream) // 2
        async with trio.lowlevel.FdStream(fd) as pipe:
            await self._set_status("active")
            found = self.run_state
            if found == "running":
                await self.emit("STOP", {})
            self.run_state = "finish-migrate"
            try:
                await pipe.send_all(self.stream[:half])
                self.half_sent.set()
                if self.stalled:
                    await self._cancelled.wait()
                if self.capabilities["pause-before-switchover"] and not self._cancelled.is_set():
                    await self._set_status("pre-switchover")
                    await self._goes_on.wait()
                if not self.broken_off and not self._cancelled.is_set():
                    await pipe.send_all(self.stream[half:])
            except trio.BrokenResourceError:
                self.broken_off = True
            self._sent.set()
            if self._cancelled.is_set():
                await self._set_status("cancelled")
            elif self.broken_off:
                await self._set_status("failed", **{"error-desc": self.reason})
            else:
                await self._set_status("completed")
                self._finish()
                return
            self.run_state = "paused" if found == "running" else found
            if found == "running":
                await self._run()


class Relay:
    """Stock QEMU, at the other end of `connection`; its events are passed on as they come, by `pass_events`."""

    emit: Emit

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self._connection = connection
        self._lines, self._answers = trio.open_memory_channel[dict[str, Any]](1)

    async def pass_events(self) -> None:
        """Tell events from answers, until QEMU ends."""
        received = b""
        with self._lines:
            while data := await _received(self._connection):
                *lines, received = (received + data).split(b"\n")
                for message in map(json.loads, lines):
                    if "event" in message:
                        await self.emit(message["event"], message.get("data", {}))
                    elif "QMP" not in message:
                        await self._lines.send(message)

    async def answer(self, command: str, arguments: dict[str, Any], fd: int | None) -> Any:
        if fd is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            await self._connection.sendmsg([b" "], rights)
            os.close(fd)
        try:
            await _send(self._connection, json.dumps({"execute": command, "arguments": arguments}).encode())
            answer = await self._answers.receive()
        except (OSError, trio.EndOfChannel):
            raise HangUpError from None
        if "error" in answer:
            raise RefusalError(answer["error"]["desc"])
        return answer["return"]


async def _received(connection: trio.socket.SocketType) -> bytes:
    with contextlib.suppress(ConnectionError):
        return await connection.recv(1 << 16)
    return b""


@asynccontextmanager
async def relayed(qmp_path: Path, path: Path) -> AsyncIterator[QmpServer]:
    """A server at `path` that has QEMU's monitor at `qmp_path` answer."""
    with trio.socket.socket(socket.AF_UNIX) as connection:
        await connection.connect(str(qmp_path))
        relay = Relay(connection)
        async with served(relay, path) as server, trio.open_nursery() as nursery:
            nursery.start_soon(relay.pass_events)
            await relay.answer("qmp_capabilities", {}, None)
            yield server
            nursery.cancel_scope.cancel()
