"""A QMP connection for trio: the official qemu.qmp library, which is asyncio, in a thread with its own loop."""

import asyncio
import concurrent.futures
import contextlib
import errno
import socket
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio
from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

from ckptfs.channels.identity import Identity
from ckptfs.errors import QemuError

T = TypeVar("T")

DEADLINE = 30.0
"""Seconds that QEMU has for any one answer."""


class Monitor:
    """One QMP connection, within `connected`. Methods raise QemuError, naming the command."""

    def __init__(self, client: QMPClient, events: EventListener, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._events = events
        self._loop = loop

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; ``_`` in the names of arguments stands for ``-``."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return await self._in_loop(self._client.execute(command, named or None))
        except ExecuteError as error:
            raise QemuError(f"QEMU refused {command}: {error}") from error

    async def send_descriptor(self, name: str, fd: int) -> None:
        """Hand ``fd`` to QEMU under ``name`` (QMP getfd)."""

        async def send() -> None:
            self._client.send_fd_scm(fd)
            await self._client.execute("getfd", {"fdname": name})

        try:
            await self._in_loop(send())
        except ExecuteError as error:
            raise QemuError(f"QEMU refused getfd: {error}") from error

    async def migration_ended(self) -> str:
        """Wait for the end of the migration that was just started; return its last status."""
        while True:
            event: Any = await self._in_loop(self._events.get())
            status: str = event["data"]["status"]
            if status in ("completed", "failed", "cancelled"):
                return status

    def forget_events(self) -> None:
        """Drop what came before."""
        self._events.clear()

    async def _in_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the library's loop and wait for it here."""
        trio_token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)

        def wake(_: concurrent.futures.Future[T]) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                trio_token.run_sync_soon(done.set)

        future.add_done_callback(wake)
        try:
            with trio.fail_after(DEADLINE):
                await done.wait()
        except trio.TooSlowError:
            future.cancel()
            raise QemuError(f"QEMU gave no answer in {DEADLINE:g} s", errno.ETIMEDOUT) from None
        except trio.Cancelled:
            future.cancel()
            raise
        try:
            return future.result()
        except ExecuteError:
            raise
        except (QMPError, EOFError, OSError, asyncio.CancelledError) as error:
            raise QemuError(f"the connection to QEMU broke: {str(error) or 'end of file'}", errno.EPIPE) from error


@asynccontextmanager
async def connected(path: str, identity: Identity) -> AsyncIterator[Monitor]:
    """Connect to the QMP socket at ``path``, as ``identity`` may; raises QemuError if nobody answers there."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run_loop, args=(loop,), name="qmp", daemon=True)
    thread.start()
    client = QMPClient("ckptfs")
    events = EventListener("MIGRATION")
    client.register_listener(events)
    monitor = Monitor(client, events, loop)
    try:
        try:
            connection = await trio.to_thread.run_sync(_connect, path, identity)
        except OSError as error:
            raise QemuError(f"QMP socket {path}: {error.strerror}", error.errno) from error
        try:
            await monitor._in_loop(client.connect(connection))
        except ConnectError as error:
            raise QemuError(f"QMP socket {path}: {error}") from error
        try:
            yield monitor
        finally:
            with trio.CancelScope(shield=True), contextlib.suppress(QemuError):
                await monitor._in_loop(client.disconnect())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(thread.join)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _connect(path: str, identity: Identity) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(DEADLINE)
        with identity.assumed():
            connection.connect(path)
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    return connection
