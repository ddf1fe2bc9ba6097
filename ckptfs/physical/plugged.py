"""Where a machine's memory devices are (pc-dimm, nvdimm, virtio-mem): no device section tells, so its monitor does.

What it said at a save is kept in the trailer, as entry ``memory-devices``, which depends on the device state: a
JSON array of objects with ``memdev`` (the backend's id), ``address`` and ``length``.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ckptfs.mapped_ram.trailer import Depends, Entry, Trailer
from ckptfs.physical.memory_map import ADDRESS_MAX, Region

NAME = "memory-devices"

_OBJECTS = "/objects/"


def entry_of(devices: Iterable[Mapping[str, Any]]) -> Entry | None:
    """The entry for what QMP's query-memory-devices has answered; None where there is nothing to tell.

    A device has its address and size in ``addr`` and ``size``, or ``memaddr`` and ``max-size`` (qapi/machine.json).
    """
    told = [
        {
            "memdev": str(data["memdev"]).removeprefix(_OBJECTS),
            "address": data.get("addr", data.get("memaddr")),
            "length": data.get("max-size", data.get("size")),
        }
        for data in (device["data"] for device in devices)
        if "memdev" in data
    ]
    return Entry(NAME, json.dumps(told).encode(), Depends.DEVICE_STATE) if told else None


def plugged_in(trailer: Trailer, lengths: Mapping[str, int]) -> list[Region]:
    """Where the trailer says that blocks are, of those in ``lengths`` (bytes by idstr) that can be there."""
    try:
        devices = json.loads(trailer.get(NAME) or b"[]")
        return [region for device in devices for region in _places(device, lengths)]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return []


def _places(device: dict[str, Any], lengths: Mapping[str, int]) -> Iterator[Region]:
    """Machine types up to 4.0 name the blocks of files with /objects/ before them."""
    start, length, memdev = device["address"], device["length"], device["memdev"]
    if type(start) is not int or type(length) is not int or not 0 <= start < start + length <= ADDRESS_MAX:
        return
    for idstr in (memdev, _OBJECTS + memdev):
        if length <= lengths.get(idstr, 0):
            yield Region(start, length, idstr, 0)
            return
