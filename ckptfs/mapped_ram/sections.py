"""Device sections: where each begins and ends, without knowing any device.

A device's payload is not self-delimiting. Two independent sources tell its length: the vmdesc, the JSON at
the end of the stream that describes every field (``migration/vmstate.c``, ``vmdesc_loop``), and the footer
after it. Here the vmdesc proposes, and the footer with what follows it confirms; where the vmdesc is missing
or wrong, all places where the footer could be are tried. Payload bytes are not kept.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.stream import (
    COMMAND,
    EOF,
    FOOTER,
    SECTION_END,
    SECTION_FULL,
    SECTION_PART,
    SECTION_START,
    VMDESCRIPTION,
    Cursor,
    SectionHeader,
    Source,
    decode_idstr,
    encode_footer,
    parse_section_header,
    read_section_header,
    skip_command,
)

MAX_SECTIONS = 1 << 16
MAX_VMDESC_LENGTH = 8 << 20
"""A longer vmdesc is not parsed (QEMU writes some 10 KiB a CPU and 100 KiB for everything else)."""
MAX_SCAN_LENGTH = 64 << 20
"""A longer device state is not searched for footers."""
_MAX_CANDIDATES = 64
_HEADER_LENGTH = 270  # the longest section header


@dataclass(frozen=True)
class Section:
    """A FULL section in place: ``length`` bytes at ``file_offset``, header and footer included."""

    idstr: str
    instance_id: int
    version_id: int
    section_id: int
    file_offset: int
    length: int
    payload_offset: int
    payload_length: int


@dataclass(frozen=True)
class Vmdesc:
    """The VMDESCRIPTION: ``length`` bytes at ``file_offset`` from its type byte on, and the JSON in it."""

    file_offset: int
    length: int
    description: dict[str, Any]


class OpaqueSectionError(Exception):
    """A section's end cannot be told; caught by this package only."""


def find_vmdesc(source: Source, start: int) -> Vmdesc | None:
    """The vmdesc after ``start``, at the end of the file or before garbage there; None if there is none.

    Needs no walk through the sections: JSON holds no NUL byte, so the last ``EOF VMDESCRIPTION length {`` is
    the one.
    """
    for window in (512 << 10, MAX_VMDESC_LENGTH + 6):
        window_offset = max(start, source.length - window)
        data = source.pread(window_offset, source.length - window_offset)
        for position, length in _vmdesc_candidates(data):
            description = _parse_vmdesc(data[position + 5 : position + 5 + length])
            if description is not None:
                return Vmdesc(window_offset + position, 5 + length, description)
        if window_offset == start:
            break
    return None


def payload_length(vmsd: dict[str, Any]) -> int:
    """A device's payload length in bytes, as its entry in the vmdesc describes it.

    Fields that are structs include their own subsections. Raises TypeError or KeyError where this is no such
    entry.
    """
    length = 0
    pending = [vmsd]
    while pending:
        vmsd = pending.pop()
        for field in vmsd["fields"]:
            length += _natural(field["size"]) * _natural(field.get("array_len", 1))
        for subsection in vmsd.get("subsections", ()):
            length += 1 + 1 + len(subsection["vmsd_name"].encode("utf-8", "surrogateescape")) + 4
            pending.append(subsection)
    return length


class SectionWalker:
    """Walks FULL sections at a cursor, checking each against the vmdesc and its footer."""

    def __init__(self, cursor: Cursor, vmdesc: Vmdesc | None, ram_section_id: int, *, footers: bool) -> None:
        self.cursor = cursor
        self.vmdesc = vmdesc
        self.footers = footers
        self._ram_section_id = ram_section_id
        self._section_ids = {ram_section_id}
        self._devices = (
            [] if vmdesc is None else [_Device.parse(entry) for entry in vmdesc.description["devices"]]
        )
        self._next_device = 0
        self._scan: _FooterScan | None = None

    def full_section(self) -> Section:
        """Pass over the FULL section at the cursor.

        Raises CheckpointError where the file is wrong, and OpaqueSectionError where only QEMU could tell.
        """
        cursor = self.cursor
        file_offset = cursor.position
        header = read_section_header(cursor)
        if header.section_id in self._section_ids:
            raise CheckpointError(
                f"section id {header.section_id} ({header.idstr!r}) occurs twice", file_offset
            )
        self._section_ids.add(header.section_id)
        if len(self._section_ids) > MAX_SECTIONS:
            raise CheckpointError(f"more than {MAX_SECTIONS} sections", file_offset)
        device = self._take_device(header, file_offset)
        payload_stop = self._payload_stop(header, device)
        footer_length = len(encode_footer(header.section_id, footers=self.footers))
        cursor.position = payload_stop + footer_length
        return Section(
            header.idstr,
            header.instance_id,
            header.version_id,
            header.section_id,
            file_offset,
            cursor.position - file_offset,
            header.payload_offset,
            payload_stop - header.payload_offset,
        )

    def device_state(self) -> tuple[Section, ...]:
        """Pass over everything after the RAM section, up to and including EOF and VMDESCRIPTION.

        Raises as ``full_section``.
        """
        cursor = self.cursor
        sections: list[Section] = []
        while True:
            match cursor.u8("the device state: it was cut short"):
                case 0x00:  # EOF
                    break
                case 0x04:  # SECTION_FULL
                    cursor.position -= 1
                    sections.append(self.full_section())
                case 0x08:  # COMMAND
                    cursor.position -= 1
                    skip_command(cursor)
                case other:
                    refuse_section(cursor, other)
        if self._next_device < len(self._devices):
            name = self._devices[self._next_device].idstr
            raise CheckpointError(f"the vmdesc lists device {name!r}, which has no section", cursor.position)
        self._pass_vmdesc()
        return tuple(sections)

    def _take_device(self, header: SectionHeader, file_offset: int) -> "_Device | None":
        """The vmdesc's entry of the section with this header: they are in the same order."""
        if self.vmdesc is None:
            return None
        if self._next_device == len(self._devices):
            raise CheckpointError(f"section {header.idstr!r} is not in the vmdesc", file_offset)
        device = self._devices[self._next_device]
        if not device.describes(header):
            raise CheckpointError(
                f"section {header.idstr!r} stands where the vmdesc lists {device.idstr!r}", file_offset
            )
        self._next_device += 1
        return device

    def _payload_stop(self, header: SectionHeader, device: "_Device | None") -> int:
        footer = encode_footer(header.section_id, footers=self.footers)
        if device is not None and device.payload_length is not None:
            payload_stop = header.payload_offset + device.payload_length
            if self._ends_at(payload_stop, footer):
                return payload_stop
        if not self.footers:
            if self.vmdesc is None:
                raise OpaqueSectionError
            raise CheckpointError(
                f"section {header.idstr!r} is not as long as the vmdesc says", header.payload_offset
            )
        return self._scan_for_end(header)

    def _ends_at(self, payload_stop: int, footer: bytes) -> bool:
        """Whether the footer stands there, with something after it that may follow."""
        if payload_stop + len(footer) > self.cursor.source.length:
            return False
        self.cursor.position = payload_stop
        return self.cursor.peek(len(footer)) == footer and self._may_follow(payload_stop + len(footer))

    def _may_follow(self, file_offset: int) -> bool:
        """Whether what stands at ``file_offset`` can come after a FULL section."""
        self.cursor.position = file_offset
        data = self.cursor.peek(_HEADER_LENGTH)
        match data[0] if data else None:
            case 0x00:  # EOF
                if self.vmdesc is not None:
                    return file_offset + 1 == self.vmdesc.file_offset
                return len(data) == 1 or data[1] == VMDESCRIPTION
            case 0x02 | 0x03:  # SECTION_PART, SECTION_END
                return int.from_bytes(data[1:5]) == self._ram_section_id
            case 0x04:  # SECTION_FULL
                header = parse_section_header(data, file_offset)
                if header is None or header.section_id in self._section_ids:
                    return False
                if self.vmdesc is None:
                    return header.idstr.isascii() and header.idstr.isprintable() and header.idstr != ""
                return self._next_device < len(self._devices) and self._devices[self._next_device].describes(
                    header
                )
            case 0x08:  # COMMAND
                return len(data) >= 5 and data[1] == 0 and data[2] <= 0x20
            case _:
                return False

    def _scan_for_end(self, header: SectionHeader) -> int:
        if self._scan is None:
            self._scan = _FooterScan(self.cursor.source, header.payload_offset)
        footers = self._scan.footers(header.section_id, header.payload_offset)
        if self._scan.complete and not footers:
            text = f"section {header.idstr!r} has no footer: the file was cut short or is damaged"
            raise CheckpointError(text, header.payload_offset)
        ends = [footer for footer in footers[:_MAX_CANDIDATES] if self._may_follow(footer + 5)]
        if self.vmdesc is not None:
            if ends:
                return ends[0]
            raise CheckpointError(
                f"section {header.idstr!r} is not as long as the vmdesc says", header.payload_offset
            )
        if len(ends) == 1 and len(footers) <= _MAX_CANDIDATES and self._scan.complete:
            return ends[0]
        if self._scan.complete and footers[-1] + 5 == self.cursor.source.length:
            raise CheckpointError(
                "the file ends after a section: it was cut short", self.cursor.source.length
            )
        raise OpaqueSectionError

    def _pass_vmdesc(self) -> None:
        """Pass over the VMDESCRIPTION, if there is one; like QEMU, do not mind one that is cut short."""
        cursor = self.cursor
        if self.vmdesc is not None:
            if cursor.position != self.vmdesc.file_offset:
                raise CheckpointError(
                    "the device state does not end where its vmdesc begins", cursor.position
                )
            cursor.position += self.vmdesc.length
        elif cursor.peek(1) == bytes([VMDESCRIPTION]):
            length = int.from_bytes(cursor.peek(5)[1:])
            cursor.position = min(cursor.position + 5 + length, cursor.source.length)


def refuse_section(cursor: Cursor, section_type: int) -> None:
    """Raise CheckpointError for a section that has no place at the cursor, one byte after its type."""
    offset = cursor.position - 1
    if section_type == SECTION_START:
        cursor.position = offset
        idstr = read_section_header(cursor).idstr
        raise CheckpointError(f"iterable section {idstr!r} is not supported, only 'ram'", offset)
    if section_type in (SECTION_PART, SECTION_END):
        section_id = cursor.be32("a section header")
        raise CheckpointError(f"a part of section {section_id} has no place here", offset)
    raise CheckpointError(f"unknown section type {section_type:#04x}", offset)


@dataclass(frozen=True)
class _Device:
    """An entry of the vmdesc; ``payload_length`` is None where the entry makes no sense."""

    idstr: str
    instance_id: int | None
    payload_length: int | None

    @classmethod
    def parse(cls, entry: object) -> "_Device":
        if not isinstance(entry, dict):
            return cls("", None, None)
        instance_id = entry.get("instance_id")
        try:
            length = payload_length(entry)
        except (TypeError, KeyError, AttributeError):
            length = None
        return cls(str(entry.get("name")), instance_id if type(instance_id) is int else None, length)

    def describes(self, header: SectionHeader) -> bool:
        if self.instance_id is None or self.idstr != header.idstr:
            return False
        return self.instance_id % (1 << 32) == header.instance_id


class _FooterScan:
    """Every place from ``start`` on where a footer could stand, found in one pass.

    ``complete`` tells whether all of the file was looked at.
    """

    def __init__(self, source: Source, start: int) -> None:
        self.complete = source.length - start <= MAX_SCAN_LENGTH
        stop = min(source.length, start + MAX_SCAN_LENGTH)
        offsets = [np.empty(0, np.int64)]
        ids = [np.empty(0, np.uint32)]
        for position in range(start, stop, 1 << 20):
            data = np.frombuffer(source.pread(position, (1 << 20) + 5), np.uint8)
            at = np.flatnonzero(data[:-4] == FOOTER) if data.size > 4 else np.empty(0, np.int64)
            at = at[at < 1 << 20]
            after = np.append(data, np.uint8(EOF))[np.minimum(at + 5, data.size)]
            at = at[np.isin(after, [EOF, SECTION_PART, SECTION_END, SECTION_FULL, COMMAND])]
            offsets.append(at + position)
            ids.append(_be32(data, at + 1))
        self._ids = np.concatenate(ids)
        order = np.argsort(self._ids, kind="stable")
        self._ids = self._ids[order]
        self._offsets = np.concatenate(offsets)[order]

    def footers(self, section_id: int, start: int) -> list[int]:
        """Where a section's footer may be if its payload begins at ``start``: the first few and the last."""
        first, last = np.searchsorted(self._ids, [section_id, section_id + 1])
        offsets = self._offsets[first:last]
        offsets = offsets[np.searchsorted(offsets, start) :]
        return [*offsets[: _MAX_CANDIDATES + 1].tolist(), *offsets[_MAX_CANDIDATES + 1 :][-1:].tolist()]


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError
    return value


def _vmdesc_candidates(data: bytes) -> Iterator[tuple[int, int]]:
    """Where a type byte may be, and the length of the JSON after it: 16 at most, likeliest first."""
    raw = np.frombuffer(data, np.uint8)
    if raw.size < 7:
        return
    hits = np.flatnonzero((raw[:-6] == EOF) & (raw[1:-5] == VMDESCRIPTION) & (raw[6:] == ord("{"))) + 1
    lengths = _be32(raw, hits + 1).astype(np.int64)
    ends = hits + 5 + lengths
    inside = ends <= raw.size
    hits, lengths, ends = hits[inside], lengths[inside], ends[inside]
    closed = raw[ends - 1] == ord("}")
    hits, lengths, ends = hits[closed], lengths[closed], ends[closed]
    at_end = ends == raw.size
    for position in [*hits[at_end][-1:], *hits[~at_end][:-16:-1]]:
        yield int(position), int.from_bytes(data[position + 1 : position + 5])


def _be32(data: npt.NDArray[np.uint8], positions: npt.NDArray[np.intp]) -> npt.NDArray[np.uint32]:
    """The big-endian 32-bit numbers at these positions."""
    numbers: npt.NDArray[np.uint32] = data[positions[:, None] + np.arange(4)].view(">u4")
    return numbers[:, 0].astype(np.uint32)


def _parse_vmdesc(text: bytes) -> dict[str, Any] | None:
    if b"\0" in text or len(text) > MAX_VMDESC_LENGTH:
        return None
    try:
        description = json.loads(decode_idstr(text))
    except (ValueError, RecursionError):
        return None
    if isinstance(description, dict) and isinstance(description.get("devices"), list):
        return description
    return None
