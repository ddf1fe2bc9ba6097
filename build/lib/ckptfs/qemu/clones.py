"""What makes clones of one machine differ: names, MAC addresses, sockets and files, by their numbers.

``{n}`` in an argument is the clone's number, from 1 on; what the caller numbered himself is left alone.
"""

import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ckptfs.qemu.command_line import Option, escaped

PLACEHOLDER = "{n}"

_OWN_DISPLAY = frozenset({"display", "nographic", "vnc", "spice"})
_MAC_PROPERTY = {"device": "mac", "nic": "mac", "net": "macaddr"}
"""Options that can make a network card, and the property that is its address."""


@dataclass(frozen=True)
class Clone:
    """One of many: its number, and the files it has for itself in ``directory``."""

    number: int
    directory: str
    name: str

    @property
    def qmp_path(self) -> str:
        """Its QMP socket."""
        return self._path("qmp")

    @property
    def log_path(self) -> str:
        """What its QEMU prints."""
        return self._path("log")

    def serial_path(self, index: int) -> str:
        """What its guest prints on serial line ``index``."""
        return self._path("serial" if index == 0 else f"serial{index}")

    def _path(self, suffix: str) -> str:
        return os.path.join(self.directory, f"{self.number}.{suffix}")


class MACAddresses:
    """Addresses that no other clone of this run has, and most likely none of another (52:54:00 is QEMU's)."""

    def __init__(self) -> None:
        self._next = secrets.randbits(24)

    def take(self) -> str:
        """The next address."""
        low = self._next % (1 << 24)
        self._next += 1
        return f"52:54:00:{low >> 16:02x}:{low >> 8 & 0xFF:02x}:{low & 0xFF:02x}"


def arguments_of(
    clone: Clone, options: Sequence[Option], addresses: MACAddresses, *, has_serial: bool, snapshot: bool
) -> list[Option]:
    """The options of one clone out of those of all.

    ``has_serial``: the machine has a serial line that QEMU makes by itself. ``snapshot``: what a clone writes to
    its disks is dropped when it ends.
    """
    own = [_distinguished(option, addresses) for option in options]
    own = [replace(option, value=_numbered(option.value, clone)) for option in own]
    own = _with_serial_files(own, options, clone, has_serial=has_serial)
    if not any(option.name in _OWN_DISPLAY for option in options):
        own.append(Option("display", "none"))
    if not any(option.name == "monitor" for option in options):
        own.append(Option("monitor", "none"))
    if snapshot and not any(option.name == "snapshot" for option in options):
        own.append(Option("snapshot"))
    if not any(option.name == "name" and _is_numbered(option) for option in options):
        own.append(Option("name", f"guest={escaped(clone.name)}"))
    own.append(Option("qmp", f"unix:{escaped(clone.qmp_path)},server=on,wait=off"))
    return own


def _is_numbered(option: Option) -> bool:
    return option.value is not None and PLACEHOLDER in option.value


def _numbered(value: str | None, clone: Clone) -> str | None:
    return None if value is None else value.replace(PLACEHOLDER, str(clone.number))


def _distinguished(option: Option, addresses: MACAddresses) -> Option:
    """An identity of the machine's hardware, made the clone's own."""
    if _is_numbered(option):
        return option
    if _makes_card(option):
        return option.with_property(_MAC_PROPERTY[option.name], addresses.take())
    if option.name == "device" and _driver(option) == "vmgenid":
        return option.with_property("guid", "auto")
    return option


def _makes_card(option: Option) -> bool:
    match option.name:
        case "device":
            return "netdev" in option.properties()
        case "nic":
            return _driver(option) != "none"
        case "net":
            return _driver(option) == "nic"
    return False


def _driver(option: Option) -> object:
    properties = option.properties()
    return properties.get("driver", properties.get(""))


def _with_serial_files(
    own: Iterable[Option], options: Iterable[Option], clone: Clone, *, has_serial: bool
) -> list[Option]:
    """A file for each serial line: those that are named, or the one that QEMU makes where none is."""
    lines = 0
    result = []
    for option, former in zip(own, options, strict=True):
        if option.name != "serial" or option.value == "none":
            result.append(option)
            continue
        result.append(option if _is_numbered(former) else Option("serial", f"file:{clone.serial_path(lines)}"))
        lines += 1
    named = any(option.name in ("serial", "nodefaults") for option in options)
    if has_serial and not named:
        result.append(Option("serial", f"file:{clone.serial_path(0)}"))
    return result
