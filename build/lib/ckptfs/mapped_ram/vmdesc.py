"""The vmdesc: JSON at the end of a stream that describes its device sections (``migration/vmstate.c``, QEMU 10.0).

QEMU writes it and never reads it. Its ``devices`` are in the order of the FULL sections, early ones included;
``ram`` is not among them. Since 9.2 ``configuration`` describes the configuration section.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptfs.mapped_ram.stream import (
    SectionHeader,
    SectionType,
    Source,
    decode_idstr,
    encode_idstr,
    encode_vmdescription,
)

MAX_VMDESC_LENGTH = 8 << 20
"""A longer one is not parsed. QEMU writes some 10 KiB a CPU and 100 KiB for everything else."""


_FIRST_CHUNK_LENGTH = 1 << 15
_CHUNK_LENGTH = 1 << 20
_MARK_LENGTH = 7  # EOF, VMDESCRIPTION, be32 length, {
_MAX_DISTANCE = 1 << 30
_LAST_WINDOW = MAX_VMDESC_LENGTH + 6
_MAX_ATTEMPTS = 64


@dataclass(frozen=True)
class Vmdesc:
    """The JSON of a VMDESCRIPTION of ``length`` bytes, whose type byte lies at ``file_offset``."""

    file_offset: int
    length: int
    description: dict[str, Any]

    def devices(self) -> list["Device"]:
        """What it says of each FULL section, in stream order."""
        return [Device.parse(entry) for entry in self.description["devices"]]


@dataclass(frozen=True)
class Device:
    """A device of the vmdesc; what makes no sense in its entry is None."""

    idstr: str
    instance_id: int | None
    payload_length: int | None

    @classmethod
    def parse(cls, entry: object) -> "Device":
        """The entry, whatever it is."""
        if not isinstance(entry, dict):
            return cls("", None, None)
        instance_id = entry.get("instance_id")
        try:
            length = payload_length(entry)
        except (TypeError, KeyError, AttributeError):
            length = None
        return cls(str(entry.get("name")), instance_id if type(instance_id) is int else None, length)

    def describes(self, header: SectionHeader) -> bool:
        """Whether it is the entry of the section with this header."""
        if self.instance_id is None or self.idstr != header.idstr:
            return False
        return self.instance_id % (1 << 32) == header.instance_id


def vmdescs(source: Source, start: int) -> Iterator[Vmdesc]:
    """What may be the vmdesc of a device state that begins at ``start``, in the order of the file.

    JSON holds no NUL byte, so ``EOF VMDESCRIPTION length {`` is a mark. A guest can write such a mark, and a vmdesc
    behind it, into the memory of a device: whoever takes one sees whether it describes what comes before.
    """
    attempts = _MAX_ATTEMPTS
    for position, length in _marks(source, start):
        attempts -= 1
        if attempts < 0:
            return
        text = source.pread(position + 5, length)
        description = _parse(text) if len(text) == length else None
        if description is not None:
            yield Vmdesc(position, 5 + length, description)


def last_vmdesc(source: Source, start: int) -> Vmdesc | None:
    """The last one in the file, for those who can't look from the front yet; None if it is not near the end."""
    window_offset = max(start, source.length - _LAST_WINDOW)
    found = list(vmdescs(source, window_offset))
    return found[-1] if found else None


def payload_length(vmsd: dict[str, Any]) -> int:
    """A device's payload length in bytes, as its entry in the vmdesc describes it.

    A field that is a struct includes that struct's subsections. Of an array only element 0 is described, so
    the length is wrong where elements differ. Raises TypeError, KeyError or AttributeError where this is no
    such entry.
    """
    length = 0
    pending = [vmsd]
    while pending:
        vmsd = pending.pop()
        for field in vmsd["fields"]:
            length += _natural(field["size"]) * _natural(field.get("array_len", 1))
        for subsection in vmsd.get("subsections", ()):
            length += 1 + 1 + len(encode_idstr(subsection["vmsd_name"])) + 4
            pending.append(subsection)
    return length


def empty_vmdesc(machine: str, page_size: int, capabilities: tuple[str, ...]) -> bytes:
    """The VMDESCRIPTION of a stream without devices."""
    description = {
        "configuration": _describe_configuration(machine, capabilities, [], has_uuid=False),
        "page_size": page_size,
        "devices": [],
    }
    return encode_vmdescription(json.dumps(description).encode())


def with_configuration(
    description: dict[str, Any], machine: str, capabilities: tuple[str, ...], *, has_uuid: bool
) -> bytes:
    """The VMDESCRIPTION of a stream with another configuration section, if it describes that."""
    configuration = description.get("configuration")
    if isinstance(configuration, dict):
        subsections = configuration.get("subsections")
        others = subsections if isinstance(subsections, list) else []
        configuration = _describe_configuration(machine, capabilities, others, has_uuid=has_uuid)
        description = {**description, "configuration": configuration}
    return encode_vmdescription(json.dumps(description).encode("utf-8", "surrogateescape"))


def _describe_configuration(
    machine: str, capabilities: tuple[str, ...], others: list[Any], *, has_uuid: bool
) -> dict[str, Any]:
    """The configuration's entry in QEMU's order; target-page-bits are taken over from its ``others`` of before."""
    subsections = [other for other in others if _is_subsection(other, "configuration/target-page-bits")]
    if capabilities:
        fields = [_field("caps_count", "uint32", 4)]
        fields += [_field("capabilities", "capability", 1 + len(capability)) for capability in capabilities]
        subsections.append(_vmsd("configuration/capabilities", fields))
    if has_uuid:
        field = {"name": "uuid.data", "array_len": 16, "type": "uint8", "size": 1}
        subsections.append(_vmsd("configuration/uuid", [field]))
    fields = [_field("len", "uint32", 4), _field("name", "buffer", len(encode_idstr(machine)))]
    configuration = _vmsd("configuration", fields)
    return {**configuration, "subsections": subsections} if subsections else configuration


def _vmsd(name: str, fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {"vmsd_name": name, "version": 1, "fields": fields}


def _field(name: str, type_name: str, size: int) -> dict[str, Any]:
    return {"name": name, "type": type_name, "size": size}


def _is_subsection(entry: object, name: str) -> bool:
    return isinstance(entry, dict) and entry.get("vmsd_name") == name


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError
    return value


def _marks(source: Source, start: int) -> Iterator[tuple[int, int]]:
    """Where the type byte of a vmdesc may be, and how long its JSON would be."""
    chunk_offset, chunk_length = start, _FIRST_CHUNK_LENGTH
    while chunk_offset < min(source.length, start + _MAX_DISTANCE):
        raw = np.frombuffer(source.pread(chunk_offset, chunk_length + _MARK_LENGTH - 1), np.uint8)
        if raw.size < _MARK_LENGTH:
            return
        last = raw.size - _MARK_LENGTH + 1
        marks = (raw[:last] == SectionType.EOF) & (raw[1 : 1 + last] == SectionType.VMDESCRIPTION)
        marks &= raw[6 : 6 + last] == ord("{")
        for position in np.flatnonzero(marks).tolist():
            length = int.from_bytes(raw[position + 2 : position + 6].tobytes())
            if length <= MAX_VMDESC_LENGTH:
                yield chunk_offset + position + 1, length
        chunk_offset, chunk_length = chunk_offset + chunk_length, min(2 * chunk_length, _CHUNK_LENGTH)


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        description = json.loads(decode_idstr(text))
    except (ValueError, RecursionError):
        return None
    if isinstance(description, dict) and isinstance(description.get("devices"), list):
        return description
    return None
