"""The monitor of a domain, through libvirt, which holds it: commands, descriptors and events go its way.

libvirt's library blocks. So a call runs in a worker thread, which is left behind when its time is over. One more
thread runs libvirt's event loop for as long as this process lives. libvirt itself follows what happens to the guest
by QEMU's events, and takes it for running or paused as it is.

An answer and the events before it come on different ways: QEMU's events are queued for libvirtd's main loop, and
again for ours, while an answer goes straight through. So an answer is given only when whatever was queued before it
has come too: after two more calls, the second of which libvirtd's loop reads when the round that sent the events is
over, and two rounds of our own loop (GLib dispatches all that is ready in one round).
"""

import contextlib
import errno
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache, partial
from itertools import pairwise
from typing import Any, TypeVar

import trio

from ckptfs.channels.identity import Identity
from ckptfs.errors import QemuError
from ckptfs.foreign.libvirt import Domain
from ckptfs.migration.address import LibvirtDomain
from ckptfs.qemu.monitor import DEADLINE, Event, Monitor, tell, version_text
from ckptfs.qemu.users import is_machine

try:
    import libvirt
    import libvirt_qemu
except ImportError as missing:
    raise QemuError(
        "libvirt's library for Python is not here: pip install 'ckptfs[libvirt]' (python3-libvirt is Debian's)",
        errno.ENOSYS,
    ) from missing

T = TypeVar("T")

_KEEPALIVE = 5, 3
"""Seconds between two questions whether libvirtd is alive, and how many it may leave unanswered."""

_FENCES = 2


class DomainMonitor(Monitor):
    """The monitor of a domain, within `connected`."""

    def __init__(
        self, connection: Any, domain: Any, deadline: float, pid: int, version: str, description: Domain
    ) -> None:
        super().__init__(deadline, pid, version, description)
        self._connection = connection
        self._domain = domain

    async def _answer_to(self, command: str, arguments: dict[str, Any], fd: int | None) -> Any:
        text = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
        try:
            answer = await _in_thread(partial(self._ask, text, [] if fd is None else [fd]))
        except libvirt.libvirtError as error:
            raise _error(f"{command}: libvirt", error) from error
        if (refusal := answer.get("error")) is not None:
            raise QemuError(f"QEMU refused {command}: {refusal.get('desc')}")
        return answer.get("return")

    def _ask(self, text: str, descriptors: list[int]) -> dict[str, Any]:
        answer, _ = libvirt_qemu.qemuMonitorCommandWithFiles(self._domain, text, descriptors, 0)
        for _ in range(_FENCES):
            self._connection.getLibVersion()
        _wait_for_our_loop()
        told: dict[str, Any] = json.loads(answer)
        return told


@asynccontextmanager
async def connected(
    address: LibvirtDomain, identity: Identity, deadline: float = DEADLINE
) -> AsyncIterator[DomainMonitor]:
    """Connect to the monitor of a running domain; raises QemuError where there is none.

    libvirt judges by the process that connects. So only whoever this process runs as may have it connect (EPERM).
    """
    if identity.uid != os.geteuid():
        raise QemuError(
            f"{address}: libvirt would take you for user {os.geteuid()}, as whom this mount runs: ask that user",
            errno.EPERM,
        )
    _start_loop()
    try:
        with trio.fail_after(deadline):
            connection = await _in_thread(partial(libvirt.open, address.uri))
    except trio.TooSlowError:
        raise QemuError(f"{address}: libvirt did not answer for {deadline:g} s", errno.ETIMEDOUT) from None
    except libvirt.libvirtError as error:
        raise _error(f"{address}: libvirt", error) from error
    callbacks = _Callbacks(connection)
    try:
        with trio.fail_after(deadline):
            monitor = await _in_thread(partial(_open, connection, address.name, deadline, callbacks))
        yield monitor
    except trio.TooSlowError:
        raise QemuError(f"{address}: libvirt did not answer for {deadline:g} s", errno.ETIMEDOUT) from None
    except libvirt.libvirtError as error:
        raise _error(f"{address}: libvirt", error) from error
    finally:
        with trio.move_on_after(deadline, shield=True):
            await _in_thread(callbacks.close)


class _Callbacks:
    """What libvirt calls in its loop's thread, until this is closed; first of all it gets its monitor."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._trio_token = trio.lowlevel.current_trio_token()
        self._monitor: DomainMonitor | None = None
        self._undo: list[Callable[[], object]] = []

    def register(self, domain: Any) -> None:
        """Have events told from now on (blocks)."""
        number = libvirt_qemu.qemuMonitorEventRegister(self._connection, domain, None, self._on_event, None, 0)
        self._undo.append(partial(libvirt_qemu.qemuMonitorEventDeregister, self._connection, number))
        kind = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        number = self._connection.domainEventRegisterAny(domain, kind, self._on_lifecycle, None)
        self._undo.append(partial(self._connection.domainEventDeregisterAny, number))
        self._connection.registerCloseCallback(self._on_close, None)
        self._undo.append(self._connection.unregisterCloseCallback)

    def tell(self, monitor: DomainMonitor) -> None:
        """Tell this monitor."""
        self._monitor = monitor

    def close(self) -> None:
        """Let go of libvirt (blocks)."""
        for undo in reversed(self._undo):
            with contextlib.suppress(libvirt.libvirtError):
                undo()
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.close()

    def _on_event(
        self, _connection: Any, _domain: Any, name: str, seconds: int, micros: int, details: str, _: Any
    ) -> None:
        data = json.loads(details) if details else {}
        if self._monitor is not None:
            tell(self._trio_token, self._monitor.note_event, Event(name, data, seconds + micros / 1e6))

    def _on_lifecycle(self, _connection: Any, _domain: Any, event: int, _detail: int, _: Any) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            self._on_close()

    def _on_close(self, *_: Any) -> None:
        if self._monitor is not None:
            tell(self._trio_token, self._monitor.note_loss)


def _open(connection: Any, name: str, deadline: float, callbacks: _Callbacks) -> DomainMonitor:
    """Find a running domain by its name or UUID, and see who it is (blocks)."""
    connection.setKeepAlive(*_KEEPALIVE)
    try:
        domain = connection.lookupByName(name)
    except libvirt.libvirtError as error:
        try:
            domain = connection.lookupByUUIDString(name)
        except libvirt.libvirtError:
            raise error from None
    answer, _ = libvirt_qemu.qemuMonitorCommandWithFiles(domain, '{"execute": "query-version"}', [], 0)
    version = version_text(json.loads(answer).get("return"))
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE)
    pid = _pid_of(domain.UUIDString())
    monitor = DomainMonitor(connection, domain, deadline, pid, version, Domain(xml).settled())
    callbacks.tell(monitor)
    callbacks.register(domain)
    return monitor


def _pid_of(uuid: str) -> int:
    """The process of a domain, which libvirt does not tell: the machine that was started with its UUID, or 0."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
                if (b"-uuid", uuid.encode()) in pairwise(words) and is_machine(int(entry)):
                    found.append(int(entry))
    return found[0] if len(found) == 1 else 0


def _error(what: str, error: Any) -> QemuError:
    codes = {
        libvirt.VIR_ERR_NO_DOMAIN: errno.ENOENT,
        libvirt.VIR_ERR_OPERATION_INVALID: errno.ENOENT,  # not running
        libvirt.VIR_ERR_OPERATION_TIMEOUT: errno.ETIMEDOUT,  # busy with a job of its own
        libvirt.VIR_ERR_AUTH_FAILED: errno.EACCES,
        libvirt.VIR_ERR_RPC: errno.EPIPE,
        libvirt.VIR_ERR_INTERNAL_ERROR: errno.EPIPE,
        libvirt.VIR_ERR_SYSTEM_ERROR: errno.EPIPE,
    }
    text = " ".join(str(error).split())
    return QemuError(f"{what}: {text}", codes.get(error.get_error_code()))


async def _in_thread(call: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


@cache
def _start_loop() -> None:
    """Run libvirt's event loop in a thread, once for this process."""
    libvirt.registerErrorHandler(lambda *_: None, None)  # what it would print comes as an exception as well
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt", daemon=True).start()


def _wait_for_our_loop() -> None:
    """Return when a whole round of our loop has passed (blocks)."""
    passed = threading.Event()
    rounds = iter(range(2))

    def count(timer: int, _: Any) -> None:
        if next(rounds, None) is None:
            libvirt.virEventRemoveTimeout(timer)
            passed.set()

    libvirt.virEventAddTimeout(0, count, None)
    passed.wait(DEADLINE)
