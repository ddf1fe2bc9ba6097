"""ckptfs info --registers and --devices: the state of a machine's vCPUs and devices, by name."""

import argparse
import os
from typing import Any

from ckptfs.api.checkpoint import OpenCheckpoint, open_checkpoint
from ckptfs.api.status import is_dead_mount, read_status
from ckptfs.errors import CkptfsError, StateError
from ckptfs.namespace.status import counted, printable
from ckptfs.physical.devices import DeviceState, Value

Document = dict[str, Any]

_SHOWN_BYTES = 32
_COLUMNS = 4
ALL_DEVICES = ""
"""What --devices is without a name."""


def describe(path: str, arguments: argparse.Namespace) -> Document:
    """What is asked for of the checkpoint at ``path``."""
    if os.path.isdir(path) or is_dead_mount(path):
        base = read_status(path)["base"]
        where = "it has no checkpoint yet" if base is None else f"name its checkpoint: {base}"
        raise StateError(
            f"{path}: only a checkpoint has registers and devices to show, and this is a mount: {where}"
        )
    with open_checkpoint(path, offset=arguments.offset) as checkpoint:
        document: Document = {"file": path, "machine": printable(checkpoint.machine)}
        if arguments.registers:
            document["registers"] = _registers(checkpoint)
        if arguments.devices is not None:
            document["devices"] = _devices(checkpoint, arguments.devices)
        return document


def _registers(checkpoint: OpenCheckpoint) -> list[dict[str, int]]:
    try:
        return checkpoint.registers()
    except CkptfsError as error:
        raise type(error)(f"{checkpoint.path}: {error}") from None


def _devices(checkpoint: OpenCheckpoint, name: str) -> list[Document]:
    """Those of that name, or all; one whose fields can't be told has a problem instead."""
    wanted = [device for device in checkpoint.devices if name in (ALL_DEVICES, device[0])]
    if not checkpoint.devices:
        raise StateError(f"{checkpoint.path}: has no devices: it holds RAM alone")
    if not wanted:
        names = ", ".join(dict(checkpoint.devices))
        raise StateError(f"{checkpoint.path}: has no device {name!r}; it has {names}")
    return [_device(checkpoint, *device) for device in wanted]


def _device(checkpoint: OpenCheckpoint, idstr: str, instance: int) -> Document:
    document: Document = {"idstr": printable(idstr), "instance": instance}
    try:
        state = checkpoint.device(idstr, instance)
    except CkptfsError as error:
        return {**document, "problem": str(error)}
    return {**document, "length": len(state.payload), "fields": _fields(state)}


def _fields(state: DeviceState) -> Document:
    return {printable(name): _plain(value) for name, value in state.values().items()}


def _plain(value: Value) -> Any:
    """A value as JSON has it: bytes are hex digits."""
    return value.hex() if isinstance(value, bytes) else value


def format_state(document: Document) -> str:
    """Write it for people."""
    lines = [f"{document['file']}: {document['machine']}"]
    for index, registers in enumerate(document.get("registers", ())):
        lines += ["", f"vCPU {index}", *_register_lines(registers)]
    devices = document.get("devices", ())
    names = {device["idstr"] for device in devices}
    if len(names) > 1:
        lines += ["", *map(_device_line, devices)]
    else:
        for device in devices:
            lines += ["", _device_line(device), *_field_lines(device.get("fields", {}))]
    return "\n".join(lines)


def _register_lines(registers: dict[str, int]) -> list[str]:
    width = max(map(len, registers))
    cells = [f"{name:{width}} {value:016x}" for name, value in registers.items()]
    return ["  ".join(cells[start : start + _COLUMNS]) for start in range(0, len(cells), _COLUMNS)]


def _device_line(device: Document) -> str:
    name = f"{device['idstr']} {device['instance']}"
    if "problem" in device:
        return f"{name}: its fields can't be told: {device['problem']}"
    return f"{name}: {counted(device['length'], 'byte')}, {counted(len(device['fields']), 'field')}"


def _field_lines(fields: Document) -> list[str]:
    width = max(map(len, fields), default=0)
    return [f"  {name:{width}}  {_text(value)}" for name, value in fields.items()]


def _text(value: Any) -> str:
    match value:
        case str():
            shown = bytes.fromhex(value[: 2 * _SHOWN_BYTES]).hex(" ")
            return shown + (f" ... ({len(value) // 2} bytes)" if len(value) > 2 * _SHOWN_BYTES else "")
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:#x}" if value > 9 else f"{value}"
        case _:
            shown = " ".join(_text(one) for one in value[:_SHOWN_BYTES])
            return shown + (f" ... ({len(value)})" if len(value) > _SHOWN_BYTES else "")
