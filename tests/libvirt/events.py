"""What libvirt tells of a domain's life to whoever listens."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any

import libvirt

from tests.libvirt.daemon import DEADLINE, Domain

_EVENTS = (
    "Defined",
    "Undefined",
    "Started",
    "Suspended",
    "Resumed",
    "Stopped",
    "Shutdown",
    "PMSuspended",
    "Crashed",
)
_fences = count()

PAUSED = ["Suspended Paused", "Resumed Unpaused"]
"""What a live save is to libvirt, and no more."""
RESTORED = {"Started Restored", "Resumed From snapshot"}
"""A restore."""


@contextmanager
def lifecycle(vm: Domain) -> Iterator[Callable[[], list[str]]]:
    """A function that returns what was told since it was called last, as ["Suspended Paused", ...].

    Nothing is missing in it and nothing comes later: before it returns, it has heard of a new title of the domain,
    which libvirt tells behind all that has happened before. libvirtd must not be restarted within.
    """
    _start_loop()
    connection = libvirt.open(vm.libvirtd.uri)
    told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def on_lifecycle(_connection: Any, domain: Any, event: int, detail: int, _: Any) -> None:
        if domain.name() == vm.name:
            told.put(f"{_EVENTS[event]} {_details(_EVENTS[event])[detail]}")

    def on_title(_connection: Any, domain: Any, _kind: int, _uri: str, _: Any) -> None:
        if domain.name() == vm.name:
            told.put("")

    def until_now() -> list[str]:
        domain = connection.lookupByName(vm.name)
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_TITLE, f"fence {next(_fences)}", None, None, 0)
        return list(iter(lambda: told.get(timeout=DEADLINE), ""))

    connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle, None)
    connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, on_title, None)
    try:
        yield until_now
    finally:
        connection.close()


def _details(event: str) -> dict[int, str]:
    prefix = f"VIR_DOMAIN_EVENT_{event.upper()}_"
    return {
        getattr(libvirt, name): name.removeprefix(prefix).replace("_", " ").capitalize()
        for name in dir(libvirt)
        if name.startswith(prefix)
    }


@cache
def _start_loop() -> None:
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt", daemon=True).start()
