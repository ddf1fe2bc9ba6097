"""A device section's fields by name, as the vmdesc describes them (migration/vmstate.c, QEMU 10.0).

The vmdesc lists fields in the order of the payload, each with its size; a struct has a list of its own, an array
says how many elements there are and describes one, and subsections follow with a header that names them. A
section whose description does not come out at its exact length is not read at all: a field from the wrong place
would be worse than none.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.checkpoint import Checkpoint
from ckptfs.mapped_ram.sections import Section
from ckptfs.mapped_ram.stream import Source
from ckptfs.mapped_ram.vmdesc import payload_length

MAX_FIELDS = 1 << 16
_MAX_DEPTH = 32
_SUBSECTION = 0x05
_NUMBERS = {
    "bool": False,
    "timer": True,
    **{f"{sign}int{bits}": not sign for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
"""The types of fields that are numbers (``int32 equal`` is one, too), and whether they are signed."""

Value = int | tuple[int, ...] | bytes


@dataclass(frozen=True)
class Field:
    """One field, or all elements of an array of simple ones; ``offset`` and ``length`` are bytes of the payload.

    ``type`` is QEMU's name (``uint64``, ``buffer``, ``bool`` ...), ``count`` the number of elements.
    """

    name: str
    type: str
    offset: int
    length: int
    count: int
    is_single: bool = True
    """Whether it is no array; an array may have one element."""


@dataclass(frozen=True)
class DeviceState:
    """What one section holds: ``payload``, and its fields by their paths (``env.segs[1].base``)."""

    idstr: str
    instance_id: int
    payload: bytes
    fields: Mapping[str, Field]

    def number(self, name: str) -> int:
        """An unsigned number. Raises CheckpointError if there is no such field, or it is more than one."""
        (value,) = self.numbers(name, 1)
        return value

    def numbers(self, name: str, count: int) -> tuple[int, ...]:
        """An array of ``count`` unsigned numbers, big-endian as all of a stream is."""
        field = self._field(name)
        if field.count != count:
            raise CheckpointError(f"{self.idstr}: {name} has {field.count} elements, not {count}")
        size = field.length // count
        data = self.payload[field.offset : field.offset + field.length]
        return tuple(int.from_bytes(data[i * size : (i + 1) * size]) for i in range(count))

    def value(self, name: str) -> Value:
        """A field as its type has it: a number or a truth, several of them, or bytes where it is neither."""
        field = self._field(name)
        kind = field.type.split(" ")[0]
        if kind not in _NUMBERS or field.length % max(field.count, 1):
            return self.data(name)
        size = field.length // max(field.count, 1)
        data = self.data(name)
        numbers = tuple(
            int.from_bytes(data[at : at + size], signed=_NUMBERS[kind]) for at in range(0, field.count * size, size)
        )
        values = tuple(map(bool, numbers)) if kind == "bool" else numbers
        return values[0] if field.is_single else values

    def values(self) -> dict[str, Value]:
        """All fields by name."""
        return {name: self.value(name) for name in self.fields}

    def data(self, name: str) -> bytes:
        """The bytes of a field."""
        field = self._field(name)
        return self.payload[field.offset : field.offset + field.length]

    def _field(self, name: str) -> Field:
        if name not in self.fields:
            raise CheckpointError(f"{self.idstr}: there is no field {name}")
        return self.fields[name]


def find_device(source: Source, checkpoint: Checkpoint, idstr: str, instance_id: int = 0) -> DeviceState | None:
    """The fields of a section; None without such a section. Raises CheckpointError where they can't be told."""
    for section in (*checkpoint.setup_sections, *checkpoint.sections):
        if (section.idstr, section.instance_id) == (idstr, instance_id):
            return read_device(source, checkpoint, section)
    return None


def read_device(source: Source, checkpoint: Checkpoint, section: Section) -> DeviceState:
    """The fields of ``section``. Raises CheckpointError without a vmdesc, or where it does not describe it."""
    entry = _entry(checkpoint, section)
    payload = source.pread(section.payload_offset, section.payload_length)
    try:
        fields = list(_Walk(payload).fields_of(entry, 0, len(payload)))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{section.idstr}: the vmdesc does not describe its payload: {error}") from None
    return DeviceState(section.idstr, section.instance_id, payload, {field.name: field for field in fields})


def _entry(checkpoint: Checkpoint, section: Section) -> dict[str, Any]:
    """What the vmdesc says of a section; devices are listed in the order of the sections."""
    if checkpoint.vmdesc is None:
        raise CheckpointError(f"{section.idstr}: the checkpoint has no vmdesc, so no field can be found")
    sections = (*checkpoint.setup_sections, *checkpoint.sections)
    entries = checkpoint.vmdesc["devices"]
    index = sections.index(section)
    if index >= len(entries) or not isinstance(entries[index], dict):
        raise CheckpointError(f"{section.idstr}: the vmdesc has no entry for it")
    entry: dict[str, Any] = entries[index]
    return entry


class _Walk:
    """One way through a payload; raises ValueError where the description does not fit it."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._left = MAX_FIELDS

    def fields_of(
        self, vmsd: Mapping[str, Any], start: int, stop: int, prefix: str = "", depth: int = 0
    ) -> Iterator[Field]:
        """All fields of a description that takes bytes ``start`` to ``stop``, exactly."""
        if depth > _MAX_DEPTH:
            raise ValueError("structs are nested too deeply")
        position = start
        for description in vmsd["fields"]:
            name, size = prefix + str(description["name"]), _natural(description["size"])
            count = _natural(description.get("array_len", 1))
            if position + count * size > stop:
                raise ValueError(f"{name} ends behind byte {stop}")
            yield from self._one(description, name, position, size, count, depth)
            position += count * size
        for subsection in vmsd.get("subsections", ()):
            head, body = self._subsection_head(subsection, position)
            length = stop - body if subsection is vmsd["subsections"][-1] else payload_length(subsection)
            yield from self.fields_of(subsection, body, body + length, f"{prefix}{head}.", depth + 1)
            position = body + length
        if position != stop:
            raise ValueError(f"{stop - position} bytes are not described")

    def _one(
        self, description: Mapping[str, Any], name: str, position: int, size: int, count: int, depth: int
    ) -> Iterator[Field]:
        struct = description.get("struct")
        if struct is None:
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"more than {MAX_FIELDS} fields")
            yield Field(
                name, str(description["type"]), position, count * size, count, "array_len" not in description
            )
            return
        for index in range(count):
            at = position + index * size
            path = f"{name}[{index}]" if "array_len" in description else name
            yield from self.fields_of(struct, at, at + size, f"{path}.", depth + 1)

    def _subsection_head(self, subsection: Mapping[str, Any], position: int) -> tuple[str, int]:
        """The name of a subsection, and where its fields begin."""
        name = str(subsection["vmsd_name"])
        encoded = name.encode()
        head = bytes([_SUBSECTION, len(encoded)]) + encoded
        if self._payload[position : position + len(head)] != head:
            raise ValueError(f"subsection {name} is not at byte {position}")
        return name, position + len(head) + 4


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value
