"""QEMU's command line, taken apart, changed, and put together again (system/vl.c and qemu-options.def, 10.0).

An option begins with one dash or two, and takes the next argument unless it is one of `SWITCHES`; what is no
option is a disk image. A value is ``[WORD,]NAME=VALUE,...`` with commas doubled inside of VALUE, or JSON for the
options that take it. Of most options QEMU merges what comes later into what came before: a change can be one more.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

SWITCHES = frozenset({
    "h", "help", "version", "mem-prealloc", "snapshot", "usb", "nographic", "full-screen", "win2k-hack",
    "preconfig", "S", "s", "enable-kvm", "xen-attach", "xen-domid-restrict", "no-reboot", "no-shutdown",
    "daemonize", "only-migratable", "nodefaults", "no-user-config", "enable-sync-profile", "perfmap", "jitdump",
    "no-fd-bootchk", "no-acpi", "no-hpet", "singlestep", "portrait", "semihosting", "old-param",
})  # fmt: skip
"""The options that take no argument; the last line's are those of older versions."""

_REPLACED = frozenset({"incoming", "mem-path", "mem-prealloc", "loadvm", "daemonize"})
"""Where memory comes from, and what would leave this process."""

_DESCRIPTOR = re.compile(r"(^|,)(v?hostfds?|fds?)=\d")


@dataclass(frozen=True)
class Option:
    """An option without its dashes, and its value; a disk image has no name, a switch no value."""

    name: str
    value: str | None = None

    def arguments(self) -> list[str]:
        """As it stands on the command line."""
        return ([f"-{self.name}"] if self.name else []) + ([] if self.value is None else [self.value])

    def properties(self) -> dict[str, Any]:
        """The properties in the value; the word before them, if there is one, is ``""``."""
        if self.value is None:
            return {}
        if self.value.startswith("{"):
            return _json_object(self.value)
        first, *words = (word.replace(_COMMA, ",") for word in self.value.replace(",,", _COMMA).split(","))
        named = {"": first} if "=" not in first else dict([_named(first)])
        return {**named, **dict(map(_named, words))}

    def with_property(self, name: str, value: str) -> "Option":
        """The same with a property set."""
        if self.value is not None and self.value.startswith("{"):
            return replace(self, value=json.dumps({**_json_object(self.value), name: value}))
        others = [word for word in self._words() if not word.startswith(f"{name}=")]
        return replace(self, value=",".join([*others, f"{name}={escaped(value)}"]))

    def _words(self) -> list[str]:
        text = (self.value or "").replace(",,", _COMMA)
        return [word.replace(_COMMA, ",,") for word in text.split(",") if word]


def _named(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    return name, value if equals else "on"


_COMMA = "\0"  # no argument of a program holds one


def escaped(value: str) -> str:
    """A value in which commas stand for themselves."""
    return value.replace(",", ",,")


def parse(arguments: Sequence[str]) -> list[Option]:
    """Take QEMU's arguments apart, without its own name."""
    options = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-") or argument == "-":
            options.append(Option("", argument))
            continue
        name = argument.removeprefix("-").removeprefix("-")
        options.append(Option(name, None if name in SWITCHES else next(rest, None)))
    return options


def join(options: Iterable[Option]) -> list[str]:
    """Put them together again."""
    return [argument for option in options for argument in option.arguments()]


def without_memory(options: Iterable[Option], backends: Collection[str]) -> list[Option]:
    """Leave out what says where the memory of ``backends`` (ids of objects) and the machine's state come from."""
    return [
        option
        for option in options
        if option.name not in _REPLACED and not (option.name == "object" and _backend_id(option) in backends)
    ]


def memory_backends(options: Iterable[Option]) -> set[str]:
    """The ids of the memory backends that the options make."""
    ids = (_backend_id(option) for option in options if option.name == "object")
    return {found for found in ids if found is not None}


def inherited_descriptors(options: Iterable[Option]) -> list[str]:
    """The arguments that name a descriptor which only the program that first started QEMU could hand over."""
    return [option.value for option in options if option.value is not None and _DESCRIPTOR.search(option.value)]


def _backend_id(option: Option) -> str | None:
    properties = option.properties()
    kind = str(properties.get("qom-type", properties.get("", "")))
    return str(properties.get("id")) if kind.startswith("memory-backend-") else None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
