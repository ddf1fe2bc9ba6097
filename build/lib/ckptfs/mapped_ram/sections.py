"""Device sections: where each begins and ends, without knowing any device.

A device's payload is not self-delimiting. Two independent sources tell its length: the vmdesc, and the footer
after the payload. The vmdesc proposes, and the footer with what follows it confirms; where the vmdesc is
missing or wrong, all places where the footer could be are tried. Payload bytes are not kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.stream import (
    Cursor,
    SectionHeader,
    SectionType,
    Source,
    encode_footer,
    parse_section_header,
    quote_idstr,
    read_section_header,
    skip_command,
)
from ckptfs.mapped_ram.vmdesc import Device, Vmdesc

MAX_SECTIONS = 1 << 14
MAX_RECORDS = 1 << 20
"""In one part of an iterable section."""
MAX_PARTS = 1 << 16
"""Of iterable sections: QEMU writes one of each for every round, 20 in a second at the most."""
MAX_SCAN_LENGTH = 64 << 20
"""A longer device state is not searched for footers."""
_SCAN_CHUNK_LENGTH = 1 << 20
_MAX_CANDIDATES = 16
_MAX_COMMAND = 0x20
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


_STATTR_EOS, _STATTR_MORE, _STATTR_DONE = 1, 2, 8
_HPTE_LENGTH = 16


def _pass_storage_attributes(cursor: Cursor) -> None:
    """Pass over storage attributes: records of one byte a page, up to EOS (hw/s390x/s390-stattrib.c, 10.0)."""
    what = "the storage attributes"
    for _ in range(MAX_RECORDS):
        offset = cursor.position
        flags = cursor.be64(what) % 4096
        if flags == _STATTR_EOS:
            return
        if flags == _STATTR_MORE:
            cursor.skip(cursor.be64(what), what)
        elif flags != _STATTR_DONE:
            raise CheckpointError(f"storage attributes: unexpected flags {flags:#x}", offset)
    raise CheckpointError(f"more than {MAX_RECORDS} records in {what}", cursor.position)


def _pass_hash_table(cursor: Cursor) -> None:
    """Pass over hash page table entries, from be32 0 up to a record of zeros (hw/ppc/spapr.c, htab_load, 10.0).

    Instead of 0, START has the table's size, and all have -1 where there is no table: then nothing follows.
    """
    what = "the hash page table"
    if cursor.be32(what):
        return
    for _ in range(MAX_RECORDS):
        index, valid, invalid = cursor.be32(what), cursor.be16(what), cursor.be16(what)
        if index == valid == invalid == 0:
            return
        cursor.skip(valid * _HPTE_LENGTH, what)
    raise CheckpointError(f"more than {MAX_RECORDS} records in {what}", cursor.position)


_ITERABLE: dict[str, Callable[[Cursor], None]] = {
    "s390-storage_attributes": _pass_storage_attributes,
    "spapr/htab": _pass_hash_table,
}
"""Iterable sections other than the RAM's, and what passes over a payload of theirs."""


class OpaqueSectionError(Exception):
    """A section's end cannot be told. Never leaves this package."""


class SectionWalker:
    """Walks sections at a cursor: FULL ones are checked against the vmdesc and their footers.

    Iterable sections are those of `_ITERABLE`, whose payloads tell their own ends. ``setup_extents`` is where all
    that stands between the RAM section's START and its END lies, but for that section itself: offset and length.
    ``has_vmdesc`` tells, after `device_state`, whether there is one, readable or not, and ``vmdesc_cut`` that the
    file ends inside it: then it is no part of the device state.
    """

    def __init__(self, cursor: Cursor, vmdesc: Vmdesc | None, ram_section_id: int, *, footers: bool) -> None:
        self.cursor = cursor
        self.vmdesc = vmdesc
        self.footers = footers
        self.has_vmdesc = self.vmdesc_cut = False
        self._ram_section_id = ram_section_id
        self._section_ids = {ram_section_id}
        self._devices: list[Device] = [] if vmdesc is None else vmdesc.devices()
        self._next_device = 0
        self._scan: _FooterScan | None = None
        self._iterable: dict[int, Callable[[Cursor], None]] = {}
        self.setup_extents: list[tuple[int, int]] = []

    def setup_sections(self) -> tuple[Section, ...]:
        """Pass over early sections, return the FULL ones; their ends must be known, as RAM goes on after them.

        Without a vmdesc it is the first place that may be one: RAM comes next, where anything may look like more.
        """
        sections: list[Section] = []
        while (kind := self.cursor.peek(1)) in (bytes([SectionType.FULL]), bytes([SectionType.START])):
            offset = self.cursor.position
            if kind == bytes([SectionType.START]):
                self._start_iterable()
                continue
            sections.append(self._full_section(early=True))
            self.setup_extents.append((offset, self.cursor.position - offset))
        return tuple(sections)

    def _start_iterable(self) -> None:
        """Pass over the START of an iterable section other than the RAM's."""
        offset = self.cursor.position
        header = read_section_header(self.cursor)
        if header.idstr not in _ITERABLE or header.section_id in self._section_ids:
            self.cursor.position = offset + 1
            refuse_section(self.cursor, SectionType.START)
        self._section_ids.add(header.section_id)
        self._iterable[header.section_id] = _ITERABLE[header.idstr]
        self._pass_iterable(header.section_id, offset)
        self.setup_extents.append((offset, self.cursor.position - offset))

    def part_of_another(self) -> None:
        """Pass over a PART or END that is no RAM section's. Raises CheckpointError if nothing has started it."""
        offset = self.cursor.position
        section_type = self.cursor.u8("a section header")
        section_id = self.cursor.be32("a section header")
        if section_id not in self._iterable:
            raise CheckpointError(f"section id {section_id} was not started", offset)
        self._pass_iterable(section_id, offset)
        if section_type == SectionType.PART:
            if len(self.setup_extents) == MAX_PARTS:
                raise CheckpointError(f"more than {MAX_PARTS} parts of iterable sections", offset)
            self.setup_extents.append((offset, self.cursor.position - offset))

    def _pass_iterable(self, section_id: int, offset: int) -> None:
        self._iterable[section_id](self.cursor)
        footer = encode_footer(section_id, footers=self.footers)
        if self.cursor.take(len(footer), "a footer") != footer:
            raise CheckpointError(f"the footer of section {section_id} is missing or has another id", offset)

    def device_state(self) -> tuple[Section, ...]:
        """Pass over everything after the RAM section, up to and including EOF and VMDESCRIPTION.

        Raises CheckpointError where the file is wrong, and OpaqueSectionError where only QEMU could tell.
        """
        sections: list[Section] = []
        while True:
            match self.cursor.u8("the device state: it was cut short"):
                case SectionType.EOF:
                    break
                case SectionType.FULL:
                    self.cursor.position -= 1
                    sections.append(self._full_section())
                case SectionType.COMMAND:
                    self.cursor.position -= 1
                    skip_command(self.cursor)
                case SectionType.END if self._iterable:
                    self.cursor.position -= 1
                    self.part_of_another()
                case other:
                    refuse_section(self.cursor, other)
        if self._next_device < len(self._devices):
            name = self._devices[self._next_device].idstr
            raise CheckpointError(
                f"the vmdesc lists {quote_idstr(name)}, which has no section", self.cursor.position
            )
        self._pass_vmdesc()
        return tuple(sections)

    def _full_section(self, *, early: bool = False) -> Section:
        """Pass over the FULL section at the cursor."""
        file_offset = self.cursor.position
        header = read_section_header(self.cursor)
        if header.section_id in self._section_ids:
            raise CheckpointError(
                f"section id {header.section_id} ({quote_idstr(header.idstr)}) occurs twice", file_offset
            )
        self._section_ids.add(header.section_id)
        if len(self._section_ids) > MAX_SECTIONS:
            raise CheckpointError(f"more than {MAX_SECTIONS} sections", file_offset)
        device = self._take_device(header, file_offset)
        guess = early and device is None
        payload_stop = self._first_end(header) if guess else self._payload_stop(header, device)
        self.cursor.position = payload_stop + len(encode_footer(header.section_id, footers=self.footers))
        return Section(
            idstr=header.idstr,
            instance_id=header.instance_id,
            version_id=header.version_id,
            section_id=header.section_id,
            file_offset=file_offset,
            length=self.cursor.position - file_offset,
            payload_offset=header.payload_offset,
            payload_length=payload_stop - header.payload_offset,
        )

    def _take_device(self, header: SectionHeader, file_offset: int) -> Device | None:
        """The vmdesc's entry of the section with this header: they are in the same order."""
        if self.vmdesc is None:
            return None
        if self._next_device == len(self._devices):
            raise CheckpointError(f"section {quote_idstr(header.idstr)} is not in the vmdesc", file_offset)
        device = self._devices[self._next_device]
        if not device.describes(header):
            found = f"section {quote_idstr(header.idstr)} (instance {header.instance_id})"
            listed = f"{quote_idstr(device.idstr)} (instance {device.instance_id})"
            raise CheckpointError(f"{found} stands where the vmdesc lists {listed}", file_offset)
        self._next_device += 1
        return device

    def _payload_stop(self, header: SectionHeader, device: Device | None) -> int:
        """Where the payload ends and the footer begins."""
        if device is not None and device.payload_length is not None:
            payload_stop = header.payload_offset + device.payload_length
            if self._ends_at(payload_stop, encode_footer(header.section_id, footers=self.footers)):
                return payload_stop
        ends = self._scan_for_ends(header) if self.footers else []
        if self.vmdesc is not None:
            if not ends:
                text = f"section {quote_idstr(header.idstr)} is not as long as the vmdesc says"
                raise CheckpointError(text, header.payload_offset)
            return ends[0]
        if len(ends) != 1:
            raise OpaqueSectionError
        return ends[0]

    def _first_end(self, header: SectionHeader) -> int:
        """The first place where the payload may end."""
        footer = encode_footer(header.section_id, footers=self.footers)
        start, source = header.payload_offset, self.cursor.source
        while footer and start < min(source.length, header.payload_offset + MAX_SCAN_LENGTH):
            data = source.pread(start, _SCAN_CHUNK_LENGTH)
            at = data.find(footer)
            while at >= 0:
                if self._may_follow(start + at + len(footer)):
                    return start + at
                at = data.find(footer, at + 1)
            start += max(len(data) - len(footer) + 1, 1)
        raise CheckpointError("an early section's end cannot be told without a vmdesc", header.payload_offset)

    def _ends_at(self, payload_stop: int, footer: bytes) -> bool:
        """Whether the footer stands there, with something after it that may follow."""
        self.cursor.position = payload_stop
        return self.cursor.peek(len(footer)) == footer and self._may_follow(payload_stop + len(footer))

    def _may_follow(self, file_offset: int, *, anything_after_end: bool = False) -> bool:
        """Whether what stands at ``file_offset`` can come after a FULL section (also in a file cut short there)."""
        self.cursor.position = file_offset
        data = self.cursor.peek(_HEADER_LENGTH)
        match data[0] if data else None:
            case SectionType.EOF:
                if self.vmdesc is not None:
                    return file_offset + 1 == self.vmdesc.file_offset
                return len(data) == 1 or data[1] == SectionType.VMDESCRIPTION or anything_after_end
            case SectionType.PART | SectionType.END:
                return int.from_bytes(data[1:5]) in (self._ram_section_id, *self._iterable)
            case SectionType.START:
                started = parse_section_header(data, file_offset)
                return started is not None and started.idstr in _ITERABLE
            case SectionType.FULL:
                return self._may_be_next(parse_section_header(data, file_offset))
            case SectionType.COMMAND:
                return int.from_bytes(data[1:3]) <= _MAX_COMMAND
            case None:
                return self.vmdesc is None
            case _:
                return False

    def _may_be_next(self, header: SectionHeader | None) -> bool:
        """Whether this can be the header of the next FULL section."""
        if header is None:
            return self.vmdesc is None
        if header.section_id in self._section_ids:
            return False
        if self.vmdesc is None:
            return header.idstr.isascii() and header.idstr.isprintable() and header.idstr != ""
        return self._next_device < len(self._devices) and self._devices[self._next_device].describes(header)

    def _scan_for_ends(self, header: SectionHeader) -> list[int]:
        """Where the payload could end, of all the file. Raises CheckpointError where it surely was cut short."""
        if self._scan is None:
            self._scan = _FooterScan(self.cursor.source, header.payload_offset)
        footers = self._scan.footers(header.section_id, header.payload_offset)
        if not footers and self._scan.complete:
            text = f"section {quote_idstr(header.idstr)} has no footer: the file was cut short or is damaged"
            raise CheckpointError(text, header.payload_offset)
        if len(footers) > _MAX_CANDIDATES:
            return []
        ends = [footer for footer in footers if self._may_follow(footer + 5)]
        return ends or [footer for footer in footers if self._may_follow(footer + 5, anything_after_end=True)]

    def _pass_vmdesc(self) -> None:
        """Pass over the VMDESCRIPTION, if there is one; like QEMU, do not mind that the file ends inside it."""
        cursor = self.cursor
        if self.vmdesc is not None and cursor.position != self.vmdesc.file_offset:
            raise CheckpointError("the device state does not end where its vmdesc begins", cursor.position)
        if cursor.peek(1) == bytes([SectionType.VMDESCRIPTION]):
            self.has_vmdesc = True
            header = cursor.peek(5)
            end = cursor.position + 5 + int.from_bytes(header[1:])
            self.vmdesc_cut = len(header) < 5 or end > cursor.source.length
            if not self.vmdesc_cut:
                cursor.position = end


def refuse_section(cursor: Cursor, section_type: int) -> None:
    """Raise CheckpointError for a section that has no place at the cursor, which is one byte after its type."""
    offset = cursor.position - 1
    if section_type == SectionType.START:
        cursor.position = offset
        idstr = read_section_header(cursor).idstr
        raise CheckpointError(f"iterable section {quote_idstr(idstr)} is not supported, only 'ram'", offset)
    if section_type in (SectionType.PART, SectionType.END):
        section_id = cursor.be32("a section header")
        raise CheckpointError(f"a part of section {section_id} has no place here", offset)
    raise CheckpointError(f"section type {section_type:#04x} is unknown or has no place here", offset)


class _FooterScan:
    """Every place from ``start`` on where a footer could stand, found in one pass.

    ``complete`` tells whether all of the file was looked at, or only its first `MAX_SCAN_LENGTH` bytes from there.
    """

    _FOLLOWERS = (
        SectionType.EOF,
        SectionType.START,
        SectionType.PART,
        SectionType.END,
        SectionType.FULL,
        SectionType.COMMAND,
    )

    def __init__(self, source: Source, start: int) -> None:
        self.complete = source.length - start <= MAX_SCAN_LENGTH
        stop = min(source.length, start + MAX_SCAN_LENGTH)
        offsets = [np.empty(0, np.int64)]
        ids = [np.empty(0, np.int64)]
        for position in range(start, stop, _SCAN_CHUNK_LENGTH):
            # A footer is 5 bytes. What follows the last one of a file that was cut short may be taken for EOF.
            length = min(_SCAN_CHUNK_LENGTH, stop - position)
            data = np.frombuffer(source.pread(position, length + 5) + bytes(1), np.uint8)
            at = np.flatnonzero(data[: max(data.size - 5, 0)][:length] == SectionType.FOOTER)
            at = at[np.isin(data[at + 5], self._FOLLOWERS)]
            offsets.append(at + position)
            ids.append(data[at[:, None] + np.arange(1, 5)].view(">u4")[:, 0].astype(np.int64))
        all_ids = np.concatenate(ids)
        order = np.argsort(all_ids, kind="stable")
        self._ids = all_ids[order]
        self._offsets = np.concatenate(offsets)[order]

    def footers(self, section_id: int, start: int) -> list[int]:
        """Where a footer of that section could be, if its payload begins at ``start``; one more than are of use."""
        first, last = np.searchsorted(self._ids, [section_id, section_id + 1])
        offsets = self._offsets[first:last]
        first = np.searchsorted(offsets, start)
        found: list[int] = offsets[first : first + _MAX_CANDIDATES + 1].tolist()
        return found
