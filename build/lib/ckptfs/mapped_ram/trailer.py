"""The trailer: what ckptfs remembers of a checkpoint, behind the stream, where QEMU does not look.

A list of named entries, found from the end of the stream; docs/format.md has it to the byte. Each entry says what
it depends on, so that whoever saves keeps what he does not know for as long as it holds. A trailer is read whole or
not at all: with any damage in it, the file is a checkpoint without one.

``Trailer`` is a value. `SavedMachine` is the one entry that is understood here: which QEMU was saved.
"""

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import IntFlag
from typing import Any

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.stream import Source

MAGIC = b"CKPTFS\r\n"  # a transfer that takes it for text damages it visibly
VERSION = 1
MAX_LENGTH = 64 << 20
"""Of all entries together, in bytes: room for a checksum of every MiB of 16 TiB."""
MAX_ENTRIES = 256

_HEADER = struct.Struct(">8sIIQI")
_ENTRY = struct.Struct(">BIQI")
_MAX_NAME_LENGTH = 255
_YEAR_10000 = 253402300800


class Depends(IntFlag):
    """What an entry is about: it goes when that changes. Bits that have no name here are kept by nobody."""

    NOTHING = 0
    RAM = 1
    """The content of RAM."""
    DEVICE_STATE = 2
    """The machine's state beside its RAM."""
    FILE = 4
    """How this one file has it: every save drops such an entry, and may write its own."""


@dataclass(frozen=True)
class Entry:
    """A ``name`` of 1 to 255 ASCII characters and what is to be remembered under it."""

    name: str
    payload: bytes
    depends: Depends = Depends.NOTHING

    @property
    def header(self) -> bytes:
        """Its place in the list at the beginning of the trailer."""
        name = self.name.encode("ascii")
        assert 0 < len(name) <= _MAX_NAME_LENGTH
        return _ENTRY.pack(len(name), self.depends, len(self.payload), zlib.crc32(self.payload)) + name


@dataclass(frozen=True)
class Trailer:
    """The entries of a trailer, no name twice; without any of them there is none in the file."""

    entries: tuple[Entry, ...] = ()

    def get(self, name: str) -> bytes | None:
        """The payload of an entry, None if there is none of that name."""
        return next((entry.payload for entry in self.entries if entry.name == name), None)

    def with_entry(self, entry: Entry) -> "Trailer":
        """The same with this entry, in the place of one of its name."""
        others = tuple(other for other in self.entries if other.name != entry.name)
        return replace(self, entries=(*others, entry))

    def with_room_for(self, entry: Entry) -> "Trailer":
        """The same with this entry if that can be written, without one of its name otherwise."""
        others = tuple(other for other in self.entries if other.name != entry.name)
        length = sum(len(one.header) + len(one.payload) for one in (*others, entry))
        fits = length <= MAX_LENGTH and len(others) < MAX_ENTRIES
        return replace(self, entries=(*others, entry) if fits else others)

    def after(self, change: Depends) -> "Trailer":
        """What still holds in another file, after a change of RAM, of the device state, of both, or of nothing."""
        unknown = ~int(Depends.RAM | Depends.DEVICE_STATE)
        return replace(self, entries=tuple(e for e in self.entries if not int(e.depends) & (int(change) | unknown)))

    @property
    def machine(self) -> "SavedMachine | None":
        """The machine that was saved; None where that is not known, or not told in a way that is understood."""
        payload = self.get(SavedMachine.NAME)
        return None if payload is None else SavedMachine.parse(payload)

    def encode(self) -> bytes:
        """The bytes behind the stream; none at all without entries. Raises CheckpointError for too much."""
        if not self.entries:
            return b""
        directory = b"".join(entry.header for entry in self.entries)
        payloads = b"".join(entry.payload for entry in self.entries)
        length = len(directory) + len(payloads)
        if length > MAX_LENGTH or len(self.entries) > MAX_ENTRIES:
            raise CheckpointError(f"{len(self.entries)} entries in {length} bytes are more than a trailer can hold")
        head = _HEADER.pack(MAGIC, VERSION, len(self.entries), length, zlib.crc32(directory))
        return head + struct.pack(">I", zlib.crc32(head)) + directory + payloads


NO_TRAILER = Trailer()


def read_trailer(source: Source, file_offset: int) -> Trailer:
    """The trailer behind a stream that ends at ``file_offset``, an empty one if something else is there or nothing.

    Raises CheckpointError if there is one that can't be read: damaged, of another version, or cut short.
    """
    head = source.pread(file_offset, _HEADER.size + 4) if file_offset < source.length else b""
    if not head.startswith(MAGIC):
        return NO_TRAILER
    if len(head) < _HEADER.size + 4 or zlib.crc32(head[:-4]) != int.from_bytes(head[-4:]):
        raise CheckpointError("the trailer's header is damaged", file_offset)
    _, version, count, length, checksum = _HEADER.unpack(head[:-4])
    if version != VERSION:
        raise CheckpointError(f"the trailer has version {version}, not {VERSION}", file_offset)
    if count > MAX_ENTRIES or length > MAX_LENGTH:
        raise CheckpointError(f"the trailer claims {count} entries in {length} bytes", file_offset)
    content = source.pread(file_offset + len(head), length)
    if len(content) < length:
        raise CheckpointError("the file ends inside the trailer", file_offset)
    return Trailer(tuple(_parse(content, count, checksum, file_offset)))


def _parse(content: bytes, count: int, checksum: int, file_offset: int) -> Sequence[Entry]:
    """The entries out of directory and payloads."""
    found: list[tuple[str, int, int, int]] = []
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(content):
            raise CheckpointError("the trailer's directory is longer than the trailer", file_offset)
        name_length, depends, length, payload_checksum = _ENTRY.unpack_from(content, position)
        position += _ENTRY.size
        name = content[position : position + name_length].decode("ascii", "replace")
        position += name_length
        found.append((name, depends, length, payload_checksum))
    if zlib.crc32(content[:position]) != checksum:
        raise CheckpointError("the trailer's directory is damaged", file_offset)
    if position + sum(length for _, _, length, _ in found) != len(content):
        raise CheckpointError("the lengths in the trailer's directory do not add up", file_offset)
    if len({name for name, *_ in found}) != count or not all(n and n.isascii() for n, *_ in found):
        raise CheckpointError("the trailer has a name twice, or one that is none", file_offset)
    entries = []
    for name, depends, length, payload_checksum in found:
        payload = content[position : position + length]
        position += length
        if zlib.crc32(payload) != payload_checksum:
            raise CheckpointError(f"the trailer's entry {name!r} is damaged", file_offset)
        entries.append(Entry(name, payload, Depends(depends)))
    return entries


@dataclass(frozen=True)
class SavedMachine:
    """The QEMU that was saved, as its process and its monitor told: JSON, which depends on the device state.

    ``arguments`` are those after the program's name. ``directory`` is where relative paths in them start, ``uid``
    the user that the process ran as, ``time`` seconds since 1970, and ``ckptfs`` our version. A text that was no
    UTF-8 has surrogate escapes (os.fsencode).
    """

    NAME = "machine"

    program: str
    arguments: tuple[str, ...]
    directory: str
    uid: int
    qemu: str
    host: str
    time: int
    ckptfs: str

    @classmethod
    def parse(cls, payload: bytes) -> "SavedMachine | None":
        """What an entry tells, None if it can't be understood. Keys that are not known are passed over."""
        try:
            told = json.loads(payload)
            values = {field.name: told[field.name] for field in fields(cls)}
        except (ValueError, RecursionError, KeyError, TypeError):
            return None
        texts = [values[name] for name in ("program", "directory", "qemu", "host", "ckptfs")]
        arguments = values["arguments"]
        if not isinstance(arguments, list) or not all(type(values[name]) is int for name in ("uid", "time")):
            return None
        if not 0 <= values["time"] < _YEAR_10000:
            return None
        if not all(map(_is_text, (*texts, *arguments))):
            return None
        return cls(**{**values, "arguments": tuple(arguments)})

    def entry(self) -> Entry:
        """The entry that tells it."""
        return Entry(self.NAME, json.dumps(self.describe()).encode("ascii"), Depends.DEVICE_STATE)

    def describe(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return {**asdict(self), "arguments": list(self.arguments)}


def _is_text(value: object) -> bool:
    """Whether it can be an argument of a program."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True
