"""A monitor of QEMU: `Monitor` is what all of them are, whichever way commands, descriptors and events go.

Here that is a QMP socket, by the official qemu.qmp library, which is asyncio, in a thread with its own loop;
``libvirt`` has the way through libvirt.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import logging
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import outcome
import trio
from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient, QMPError

from ckptfs.channels.identity import Identity
from ckptfs.errors import QemuError
from ckptfs.foreign.libvirt import Domain

T = TypeVar("T")

DEADLINE = 30.0
"""Seconds that QEMU has for any one answer."""

_UCRED = struct.Struct("3i")

_LAST_CHANCE = 1.0
"""Seconds for each further answer once QEMU has missed a deadline: it answers in order."""

_ONE_AT_A_TIME = "it serves one client at a time: give QEMU a second -qmp for ckptfs"
_START_OR_LET_GO = ": start QEMU with that -qmp (`qmp none` makes a mount let go of it)"

log = logging.getLogger(__name__)

# what the library would log comes as an exception as well
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True)
class Event:
    """What QEMU told unasked: STOP, RESUME, RESET, MIGRATION ...; ``at`` is in seconds, by its host's clock."""

    name: str
    data: dict[str, Any]
    at: float


class Monitor(ABC):
    """One connection to QEMU's monitor, for as long as it lasts. Methods raise QemuError, naming the command.

    ``deadline`` is the time in seconds that QEMU has for the next answer. ``events`` are all that were heard, in
    their order; whatever had happened before QEMU answered is in it when the answer is here. ``lost`` says that
    the connection broke. ``pid`` is QEMU's process, 0 where that can't be told: of a socket, the one that listens
    there; ``version`` is QEMU's. ``domain`` is the machine as libvirt knows it, None without libvirt.
    """

    def __init__(self, deadline: float, pid: int, version: str, domain: Domain | None = None) -> None:
        self.pid = pid
        self.version = version
        self.domain = domain
        self._alerted: trio.CancelScope | None = None
        self.deadline = deadline
        self.events: list[Event] = []
        self.lost = False

    def note_event(self, event: Event) -> None:
        """QEMU has told it; in trio's thread, and before the answer that it came before."""
        self.events.append(event)
        self._alert()

    def note_loss(self) -> None:
        """The connection broke."""
        self.lost = True
        self._alert()

    def _alert(self) -> None:
        if self._alerted is not None:
            self._alerted.cancel()

    @contextmanager
    def alerting(self, scope: trio.CancelScope) -> Iterator[None]:
        """Within this, the next event and the loss of the connection cancel ``scope``."""
        self._alerted = scope
        try:
            yield
        finally:
            self._alerted = None

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; ``_`` in the names of arguments stands for ``-``."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self._answer_in_time(command, named, None)

    async def send_descriptor(self, name: str, fd: int) -> None:
        """Hand ``fd`` to QEMU under ``name`` (QMP getfd)."""
        await self._answer_in_time("getfd", {"fdname": name}, fd)

    async def _answer_in_time(self, command: str, arguments: dict[str, Any], fd: int | None) -> Any:
        try:
            with trio.fail_after(self.deadline):
                return await self._answer_to(command, arguments, fd)
        except trio.TooSlowError:
            error = QemuError(f"{command}: QEMU did not answer for {self.deadline:g} s", errno.ETIMEDOUT)
            self.deadline = min(self.deadline, _LAST_CHANCE)
            raise error from None

    @abstractmethod
    async def _answer_to(self, command: str, arguments: dict[str, Any], fd: int | None) -> Any:
        """Send a command, with a descriptor if there is one, and return the answer; QemuError."""


class SocketMonitor(Monitor):
    """One connection to a QMP socket, within `connected`."""

    def __init__(self, client: QMPClient, loop: asyncio.AbstractEventLoop, deadline: float, pid: int) -> None:
        super().__init__(deadline, pid, _version_of(client))
        self._client = client
        self._loop = loop
        trio_token = trio.lowlevel.current_trio_token()
        # what is told to trio's thread keeps its order: events before the answers that they came before
        client.register_listener(_Listener(lambda event: tell(trio_token, self.note_event, event)))
        self._watch = asyncio.run_coroutine_threadsafe(
            _watch(client, lambda: tell(trio_token, self.note_loss)), loop
        )

    async def _answer_to(self, command: str, arguments: dict[str, Any], fd: int | None) -> Any:
        async def ask() -> Any:
            if fd is not None:
                self._client.send_fd_scm(fd)
            return await self._client.execute(command, arguments or None)

        try:
            return await _run_in(self._loop, ask())
        except ExecuteError as error:
            raise QemuError(f"QEMU refused {command}: {error}") from error
        except (QMPError, EOFError, OSError) as error:
            raise QemuError(f"{command}: the connection to QEMU broke", errno.EPIPE) from error


@asynccontextmanager
async def connected(path: str, identity: Identity, deadline: float = DEADLINE) -> AsyncIterator[Monitor]:
    """Connect to the QMP socket at ``path``, as ``identity`` may; raises QemuError if no QEMU answers there."""
    try:
        connection = await trio.to_thread.run_sync(_connect, path, identity)
    except OSError as error:
        if error.errno == errno.EAGAIN:  # its backlog is full, of connections that waited in vain
            raise QemuError(
                f"QMP socket {path}: others are already waiting there; {_ONE_AT_A_TIME}", errno.EBUSY
            ) from error
        remedy = _START_OR_LET_GO if error.errno in (errno.ENOENT, errno.ECONNREFUSED) else ""
        raise QemuError(f"QMP socket {path}: {error.strerror}{remedy}", error.errno) from error
    pid = _listener_of(connection)
    async with _loop_in_thread() as loop:
        client = QMPClient("ckptfs")
        try:
            await _greet(loop, client, connection, path, deadline)
            yield SocketMonitor(client, loop, deadline, pid)
        finally:
            with trio.move_on_after(deadline, shield=True):
                await _run_in(loop, _disconnect(client))


def _listener_of(connection: socket.socket) -> int:
    """The process that called listen(2) (struct ucred: pid, uid, gid)."""
    pid: int = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
    return pid


def _version_of(client: QMPClient) -> str:
    return version_text({} if client.greeting is None else client.greeting.QMP.version)


def version_text(told: Any) -> str:
    """``10.0.2 (Debian 1:10.0.2+ds-2)``, from QMP's greeting or query-version."""
    try:
        qemu = told["qemu"]
        numbers = f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}"
        package = told.get("package")
    except (LookupError, TypeError, AttributeError):
        return "unknown"
    return f"{numbers} ({package})" if package else numbers


class _Listener(EventListener):
    """Has each event handed on as it comes, in the library's thread."""

    def __init__(self, hand_on: Callable[[Event], None]) -> None:
        super().__init__()
        self._hand_on = hand_on

    async def put(self, event: Message) -> None:
        told: dict[str, Any] = dict(event)
        try:
            at = told["timestamp"]["seconds"] + told["timestamp"]["microseconds"] / 1e6
            heard = Event(told["event"], dict(told.get("data", {})), at)
        except (LookupError, TypeError, ValueError) as error:
            raise EOFError("what calls itself an event is none") from error
        self._hand_on(heard)


async def _watch(client: QMPClient, tell: Callable[[], None]) -> None:
    """Tell when the connection is no longer what it is now."""
    await client.runstate_changed()
    tell()


def tell(trio_token: trio.lowlevel.TrioToken, function: Callable[..., None], *arguments: object) -> None:
    """Have a function run in trio's thread, if that still runs."""
    with contextlib.suppress(trio.RunFinishedError):
        trio_token.run_sync_soon(function, *arguments)


async def _greet(
    loop: asyncio.AbstractEventLoop, client: QMPClient, connection: socket.socket, path: str, deadline: float
) -> None:
    """Begin the session on a connection, which is the client's from here on."""
    try:
        with trio.fail_after(deadline):
            await _run_in(loop, client.connect(connection))
    except trio.TooSlowError:
        raise QemuError(
            f"QMP socket {path}: no greeting in {deadline:g} s; {_ONE_AT_A_TIME}",
            errno.ETIMEDOUT,
        ) from None
    except ConnectError as error:
        raise QemuError(f"QMP socket {path}: whatever answers there does not speak QMP") from error


async def _disconnect(client: QMPClient) -> None:
    """End the session; how the connection has ended before is told here, and does not matter any more."""
    try:
        await client.disconnect()
    except EOFError:
        pass  # QEMU has ended it
    except Exception as error:  # noqa: BLE001 - whatever the library found
        log.debug("QMP: the connection ended: %s", str(error) or type(error).__name__)


async def _run_in(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in the library's loop and wait for it here; if this is cancelled, so is that."""
    trio_token = trio.lowlevel.current_trio_token()
    done = trio.Event()
    future = asyncio.run_coroutine_threadsafe(_end_of(coroutine), loop)

    def wake(_: concurrent.futures.Future[outcome.Outcome[T]]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            trio_token.run_sync_soon(done.set)

    future.add_done_callback(wake)
    try:
        await done.wait()
    except trio.Cancelled:
        future.cancel()
        raise
    return future.result().unwrap()


async def _end_of(coroutine: Coroutine[Any, Any, T]) -> outcome.Outcome[T]:
    """What it returns or raises: asyncio prints an exception that nobody takes, as after a cancellation."""
    return await outcome.acapture(lambda: coroutine)


@asynccontextmanager
async def _loop_in_thread() -> AsyncIterator[asyncio.AbstractEventLoop]:
    """An asyncio loop that runs within this; tasks that are left at the end are cancelled, and end."""
    started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = (
        concurrent.futures.Future()
    )

    async def run() -> None:
        over = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), over))
        await over.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),), name="qmp", daemon=True)
    thread.start()
    loop, over = started.result()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(over.set)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(thread.join)


def _connect(path: str, identity: Identity) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        with identity.assumed():
            connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection
