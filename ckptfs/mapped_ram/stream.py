"""The framing of QEMU's migration stream, version 3 (``migration/savevm.c``, QEMU 9.0 to 10.2).

All numbers are big-endian. A stream is a header, a configuration section, sections that each carry an id and
(unless switched off) a footer, an EOF mark, and a description of the device sections in JSON.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol
from uuid import UUID

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.ramblock import RAMBlock

MAGIC = 0x5145564D  # "QEVM"
VERSION = 3


class SectionType(IntEnum):
    """The byte that begins every part of the stream after its header."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


# Flags in the low bits of the offsets in a RAM section (migration/ram.c).
RAM_ZERO = 0x02
RAM_MEM_SIZE = 0x04
RAM_PAGE = 0x08
RAM_EOS = 0x10
RAM_CONTINUE = 0x20

RAM_IDSTR = "ram"
RAM_INSTANCE_ID = 0
RAM_VERSION_ID = 4

DEFAULT_PAGE_SIZE = 4096
IGNORE_SHARED = "x-ignore-shared"
MAPPED_RAM = "mapped-ram"

MAX_MACHINE_LENGTH = 1024
MAX_COMMANDS = 4096
PAGE_BITS = range(10, 17)
_QUOTED_LENGTH = 80
_CAPABILITIES = b"configuration/capabilities"
_TARGET_PAGE_BITS = b"configuration/target-page-bits"
_UUID = b"configuration/uuid"


class Source(Protocol):
    """What a migration file is read from."""

    @property
    def length(self) -> int:
        """The file's length in bytes."""

    def pread(self, file_offset: int, length: int) -> bytes:
        """The bytes at ``file_offset``: ``length`` of them, or fewer only where the file ends."""


class BytesSource:
    """A migration stream held in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def length(self) -> int:
        """The stream's length in bytes."""
        return len(self._data)

    def pread(self, file_offset: int, length: int) -> bytes:
        """The bytes at ``file_offset``."""
        return self._data[file_offset : file_offset + length]


class Cursor:
    """Reads a source forward from ``position``, through a small buffer.

    Every method that consumes raises CheckpointError, with the position, where the file ends too early.
    """

    def __init__(self, source: Source, position: int, buffer_length: int = 1 << 14) -> None:
        self.source = source
        self.position = position
        self.command_count = 0
        self._buffer_length = buffer_length
        self._buffer = b""
        self._buffer_offset = 0

    def peek(self, length: int) -> bytes:
        """The next bytes without consuming them; fewer than ``length`` where the file ends."""
        if self.position >= self.source.length:
            return b""  # no offset that a file lies about gets as far as a system call
        start = self.position - self._buffer_offset
        if not 0 <= start <= start + length <= len(self._buffer):
            self._buffer = self.source.pread(self.position, max(length, self._buffer_length))
            self._buffer_offset, start = self.position, 0
        return self._buffer[start : start + length]

    def take(self, length: int, what: str) -> bytes:
        """The next ``length`` bytes, which are (part of) ``what``."""
        data = self.peek(length)
        if len(data) < length:
            raise CheckpointError(f"the file ends inside {what}", self.position)
        self.position += length
        return data

    def skip(self, length: int, what: str) -> None:
        """Pass over ``length`` bytes, which are (part of) ``what``."""
        if length > self.source.length - self.position:
            raise CheckpointError(f"the file ends inside {what}", self.position)
        self.position += length

    def u8(self, what: str) -> int:
        """The next byte."""
        return self.take(1, what)[0]

    def be16(self, what: str) -> int:
        """The next two bytes."""
        return int.from_bytes(self.take(2, what))

    def be32(self, what: str) -> int:
        """The next four bytes."""
        return int.from_bytes(self.take(4, what))

    def be64(self, what: str) -> int:
        """The next eight bytes."""
        return int.from_bytes(self.take(8, what))

    def idstr(self, what: str) -> str:
        """A counted string: one byte of length, then the name."""
        return decode_idstr(self.take(self.u8(what), what))


@dataclass(frozen=True)
class StreamHeader:
    """A stream's header and configuration section.

    ``subsections`` holds the configuration's subsections verbatim, without the one of the capabilities.
    """

    machine: str
    capabilities: tuple[str, ...]
    subsections: tuple[bytes, ...]
    page_size: int


@dataclass(frozen=True)
class SectionHeader:
    """The header of a START or FULL section; ``payload_offset`` is the first byte after it."""

    idstr: str
    instance_id: int
    version_id: int
    section_id: int
    payload_offset: int


def decode_idstr(data: bytes) -> str:
    """Any bytes of an idstr or a machine name as text; ``encode_idstr`` gets the same bytes back."""
    return data.decode("utf-8", "surrogateescape")


def encode_idstr(idstr: str) -> bytes:
    """The bytes of an idstr."""
    return idstr.encode("utf-8", "surrogateescape")


def quote_idstr(idstr: str | bytes) -> str:
    """A name out of a file as an error's text can show it: printable, on one line, not endless."""
    quoted = repr(idstr)
    return quoted if len(quoted) <= _QUOTED_LENGTH else quoted[:_QUOTED_LENGTH] + "..."


def read_stream_header(cursor: Cursor) -> StreamHeader:
    """Read the stream header and the configuration section.

    Raises CheckpointError if this is no migration stream, or one that no QEMU since 9.0 writes by default.
    """
    start = cursor.position
    magic = cursor.peek(8)
    if magic == bytes(8):
        raise CheckpointError("Not a migration stream: the header is zeros, as an unfinished save leaves it", start)
    if len(magic) < 8 or int.from_bytes(magic[:4]) != MAGIC:
        raise CheckpointError("Not a migration stream (or it begins at another offset)", start)
    version = int.from_bytes(magic[4:])
    if version != VERSION:
        raise CheckpointError(f"migration stream version {version} is not supported, only {VERSION}", start + 4)
    cursor.position += 8
    if cursor.u8("the configuration section") != SectionType.CONFIGURATION:
        raise CheckpointError("Configuration section missing: machine and capabilities are unknown", start + 8)
    machine = _read_machine(cursor)
    capabilities: tuple[str, ...] = ()
    subsections: dict[bytes, bytes] = {}
    page_size = DEFAULT_PAGE_SIZE
    while cursor.peek(1) == bytes([SectionType.SUBSECTION]):
        offset = cursor.position
        name, payload = _read_subsection(cursor)
        if name in subsections or (name == _CAPABILITIES and capabilities):
            raise CheckpointError(f"configuration subsection {quote_idstr(name)} occurs twice", offset)
        if name == _CAPABILITIES:
            capabilities = _parse_capabilities(payload, offset)
            continue
        if name == _TARGET_PAGE_BITS:
            page_size = _parse_page_bits(payload, offset)
        subsections[name] = encode_subsection(name, payload)
    return StreamHeader(machine, capabilities, tuple(subsections.values()), page_size)


def is_mapped_ram(header: StreamHeader) -> bool:
    """Whether the stream keeps RAM pages at fixed offsets; otherwise it is a plain one (``precopy.py``)."""
    return MAPPED_RAM in header.capabilities


def parse_section_header(data: bytes, file_offset: int) -> SectionHeader | None:
    """The header of the START or FULL section whose type byte is ``data[0]``; None if ``data`` is too short.

    ``file_offset`` is where that byte lies; 270 bytes of ``data`` are always enough.
    """
    if len(data) < 6 or len(data) < 14 + data[5]:
        return None
    section_id, idstr_length = struct.unpack_from(">IB", data, 1)
    stop = 6 + idstr_length
    instance_id, version_id = struct.unpack_from(">II", data, stop)
    idstr = decode_idstr(data[6:stop])
    return SectionHeader(idstr, instance_id, version_id, section_id, file_offset + stop + 8)


def read_section_header(cursor: Cursor) -> SectionHeader:
    """Read the header of a START or FULL section."""
    header = parse_section_header(cursor.peek(270), cursor.position)
    if header is None:
        raise CheckpointError("the file ends inside a section header", cursor.position)
    cursor.position = header.payload_offset
    return header


def skip_command(cursor: Cursor) -> None:
    """Pass over a COMMAND: be16 command, be16 length, payload.

    A file has one (SWITCHOVER_START); the limit keeps one that is nothing but commands from taking for ever.
    """
    cursor.command_count += 1
    if cursor.command_count > MAX_COMMANDS:
        raise CheckpointError(f"more than {MAX_COMMANDS} commands", cursor.position)
    cursor.skip(3, "a command")
    cursor.skip(cursor.be16("a command"), "a command")


def encode_stream_header(machine: str, subsections: Sequence[bytes], capabilities: Sequence[str]) -> bytes:
    """Stream header and configuration section; ``subsections`` are verbatim, without the capabilities."""
    name = encode_idstr(machine)
    configuration = list(subsections)
    if capabilities:
        # QEMU's order: target-page-bits, capabilities, uuid.
        bits = [s for s in configuration if s[2:].startswith(_TARGET_PAGE_BITS)]
        rest = [s for s in configuration if s not in bits]
        configuration = [*bits, encode_capabilities(capabilities), *rest]
    header = struct.pack(">IIBI", MAGIC, VERSION, SectionType.CONFIGURATION, len(name))
    return b"".join([header, name, *configuration])


def uuid_of(subsections: Sequence[bytes]) -> UUID | None:
    """The guest's uuid in a configuration's verbatim subsections; QEMU sends it with capability validate-uuid."""
    for subsection in subsections:
        if subsection[2:].startswith(_UUID):
            return UUID(bytes=subsection[-16:])
    return None


def with_uuid(subsections: Sequence[bytes], uuid: UUID | None) -> tuple[bytes, ...]:
    """Verbatim subsections with this uuid in the place of theirs, or with none; in QEMU's order it is the last."""
    others = [subsection for subsection in subsections if not subsection[2:].startswith(_UUID)]
    return tuple(others) if uuid is None else (*others, encode_subsection(_UUID, uuid.bytes))


def encode_subsection(name: bytes, payload: bytes) -> bytes:
    """A subsection of version 1."""
    return struct.pack(">BB", SectionType.SUBSECTION, len(name)) + name + struct.pack(">I", 1) + payload


def encode_capabilities(capabilities: Sequence[str]) -> bytes:
    """The configuration's list of capabilities that both sides must have."""
    names = [capability.encode() for capability in capabilities]
    payload = struct.pack(">I", len(names)) + b"".join(bytes([len(name)]) + name for name in names)
    return encode_subsection(_CAPABILITIES, payload)


def encode_target_page_bits(page_size: int) -> bytes:
    """The configuration's target-page-bits, for a ``page_size`` other than 4096."""
    return encode_subsection(_TARGET_PAGE_BITS, struct.pack(">I", page_size.bit_length() - 1))


def encode_section_header(section_type: SectionType, header: SectionHeader) -> bytes:
    """The header of a START or FULL section."""
    idstr = encode_idstr(header.idstr)
    start = struct.pack(">BIB", section_type, header.section_id, len(idstr))
    return start + idstr + struct.pack(">II", header.instance_id, header.version_id)


def encode_ram_start(section_id: int, total: int) -> bytes:
    """The RAM section's START, up to its list of blocks; ``total`` is the sum of their used_length."""
    header = SectionHeader(RAM_IDSTR, RAM_INSTANCE_ID, RAM_VERSION_ID, section_id, 0)
    return encode_section_header(SectionType.START, header) + struct.pack(">Q", total | RAM_MEM_SIZE)


def encode_block(block: RAMBlock, capabilities: Sequence[str]) -> bytes:
    """A block's entry in the list of the RAM section's START, as far as all streams have it.

    x-ignore-shared adds the guest address; 0 where none is known. QEMU compares it for blocks that it ignores
    itself, and refuses page records for those anyway, so it matters for none that a stream has pages of.
    """
    name = encode_idstr(block.idstr)
    entry = bytes([len(name)]) + name + struct.pack(">Q", block.used_length)
    return entry + struct.pack(">Q", block.address or 0) if IGNORE_SHARED in capabilities else entry


def encode_eos() -> bytes:
    """The mark that ends the payload of every RAM section."""
    return struct.pack(">Q", RAM_EOS)


def encode_footer(section_id: int, *, footers: bool) -> bytes:
    """A section's footer, or nothing in a stream without footers."""
    return struct.pack(">BI", SectionType.FOOTER, section_id) if footers else b""


def encode_part_header(section_type: SectionType, section_id: int) -> bytes:
    """The header of a PART or END section."""
    return struct.pack(">BI", section_type, section_id)


def encode_ram_section(section_type: SectionType, section_id: int, *, footers: bool) -> bytes:
    """A PART or END of the RAM section without page records, as mapped-ram has it."""
    return encode_part_header(section_type, section_id) + encode_eos() + encode_footer(section_id, footers=footers)


def encode_vmdescription(vmdesc: bytes) -> bytes:
    """The stream's last part: the JSON that describes its device sections."""
    return struct.pack(">BI", SectionType.VMDESCRIPTION, len(vmdesc)) + vmdesc


def _read_machine(cursor: Cursor) -> str:
    length = cursor.be32("the machine name")
    if length > MAX_MACHINE_LENGTH:
        raise CheckpointError(f"a machine name of {length} bytes is not plausible", cursor.position - 4)
    return decode_idstr(cursor.take(length, "the machine name"))


def _read_subsection(cursor: Cursor) -> tuple[bytes, bytes]:
    """Name and payload of a configuration subsection; lengths are known only of the three that QEMU has."""
    start = cursor.position
    what = "a configuration subsection"
    cursor.skip(1, what)
    name = cursor.take(cursor.u8(what), what)
    version = cursor.be32(what)
    if version != 1:
        raise CheckpointError(f"configuration subsection {quote_idstr(name)} has version {version}, not 1", start)
    payload_offset = cursor.position
    if name == _TARGET_PAGE_BITS:
        cursor.skip(4, what)
    elif name == _UUID:
        cursor.skip(16, what)
    elif name == _CAPABILITIES:
        count = cursor.be32(what)
        if count > 255:
            raise CheckpointError(f"{count} capabilities are not plausible", payload_offset)
        for _ in range(count):
            cursor.skip(cursor.u8(what), what)
    else:
        raise CheckpointError(f"configuration subsection {quote_idstr(name)} is unknown", start)
    length = cursor.position - payload_offset
    cursor.position = payload_offset
    return name, cursor.take(length, what)


def _parse_capabilities(payload: bytes, file_offset: int) -> tuple[str, ...]:
    capabilities: list[str] = []
    position = 4
    while position < len(payload):
        stop = position + 1 + payload[position]
        capability = decode_idstr(payload[position + 1 : stop])
        if capability not in (IGNORE_SHARED, MAPPED_RAM) or capability in capabilities:
            raise CheckpointError(f"capability {quote_idstr(capability)} is unknown or listed twice", file_offset)
        capabilities.append(capability)
        position = stop
    return tuple(capabilities)


def _parse_page_bits(payload: bytes, file_offset: int) -> int:
    bits = int.from_bytes(payload)
    if bits not in PAGE_BITS:
        raise CheckpointError(f"a target page of 2^{bits} bytes is not supported", file_offset)
    return 1 << bits
