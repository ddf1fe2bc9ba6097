"""Reading a mapped-ram migration file (``migration/ram.c``: ``parse_ramblock_mapped_ram``; QEMU 9.0 to 10.2).

Everything that QEMU checks is checked here, and what it forgets: sizes, page size, every region inside the
file and after its own bitmap, bitmap tails, every footer, the vmdesc against the sections. The stream goes on
right after each block's pages, so regions that lie in stream order cannot overlap anything. No page is read.
"""

from dataclasses import dataclass
from typing import Any

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.bitmap import Byteorder, PagesBitmap, bitmap_length
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.sections import (
    OpaqueSectionError,
    Section,
    SectionWalker,
    Vmdesc,
    find_vmdesc,
    refuse_section,
)
from ckptfs.mapped_ram.stream import (
    COMMAND,
    FOOTER,
    IGNORE_SHARED,
    RAM_EOS,
    RAM_IDSTR,
    RAM_INSTANCE_ID,
    RAM_MEM_SIZE,
    RAM_VERSION_ID,
    SECTION_END,
    SECTION_FULL,
    SECTION_PART,
    SECTION_START,
    Cursor,
    Source,
    StreamHeader,
    encode_footer,
    encode_ram_section,
    is_mapped_ram,
    read_section_header,
    read_stream_header,
    skip_command,
)

HEADER_LENGTH = 28
HEADER_VERSION = 1
MAX_BLOCKS = 4096
MAX_TOTAL_LENGTH = 1 << 46
"""64 TiB of RAM, or 2 GiB of bitmaps."""

MAX_DEVICE_STATE_LENGTH = 1 << 30

# Bitmaps are in the byte order of the host that wrote them, and a machine with KVM has that of its host.
_BIG_ENDIAN_MACHINES = ("s390-ccw-virtio",)
_BITMAP_CHUNK_LENGTH = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """What a migration file holds beside its pages.

    ``subsections`` are the configuration's, verbatim, without the capabilities. ``setup_sections`` are the
    early FULL sections (virtio-mem) between the RAM section's START and its next part; ``sections`` the
    device sections after the RAM section. The device state, ``device_state_length`` bytes at
    ``device_state_offset``, is all that follows the RAM section up to and including the vmdesc. If
    ``opaque``, it is there but its sections could not be told apart (no vmdesc, or no footers), and reaches
    to the end of the file.
    """

    stream_offset: int
    machine: str
    subsections: tuple[bytes, ...]
    capabilities: tuple[str, ...]
    page_size: int
    blocks: tuple[RAMBlock, ...]
    ram_section_id: int
    footers: bool
    bitmap_byteorder: Byteorder
    setup_sections: tuple[Section, ...]
    sections: tuple[Section, ...]
    opaque: bool
    device_state_offset: int
    device_state_length: int
    vmdesc: dict[str, Any] | None
    vmdesc_offset: int | None
    run_state: str | None
    """State of the source as the section globalstate has it ("running", "paused", ...), None without one."""

    @property
    def end_offset(self) -> int:
        """Where the stream ends; what follows in the file, if anything, is not part of it."""
        return self.device_state_offset + self.device_state_length

    @property
    def has_device_state(self) -> bool:
        """Whether there is more than RAM in it."""
        return self.opaque or bool(self.sections)

    def block(self, idstr: str) -> RAMBlock:
        """The block of that name; KeyError if there is none."""
        for block in self.blocks:
            if block.idstr == idstr:
                return block
        raise KeyError(idstr)


def read_checkpoint(source: Source, stream_offset: int = 0) -> tuple[Checkpoint, dict[str, PagesBitmap]]:
    """Read the mapped-ram stream at ``stream_offset``: all but the pages, and the file_bmap of each block.

    A block that the file ignores (x-ignore-shared) has no bitmap. Raises CheckpointError, with the position,
    for anything that is not a whole and sound mapped-ram file; only device sections after the RAM may be left
    opaque.
    """
    cursor = Cursor(source, stream_offset)
    header = read_stream_header(cursor)
    if not is_mapped_ram(header):
        text = "a plain migration stream, not mapped-ram: save it with capability mapped-ram on"
        raise CheckpointError(text, stream_offset)
    ram_section_id = read_ram_start(cursor)
    blocks = read_block_list(cursor, header)
    byteorder = _bitmap_byteorder(header.machine)
    bitmaps = {b.idstr: _read_bitmap(source, b, byteorder) for b in blocks if not b.ignored}
    footers = read_ram_end_of_section(cursor, ram_section_id)
    walker = SectionWalker(cursor, find_vmdesc(source, cursor.position), ram_section_id, footers=footers)
    setup_sections = _read_setup_sections(walker)
    _pass_ram_sections(cursor, ram_section_id, footers=footers)
    checkpoint = finish_checkpoint(walker, stream_offset, header, blocks, ram_section_id, setup_sections)
    return checkpoint, bitmaps


def read_setup(source: Source, checkpoint: Checkpoint) -> bytes:
    """The early FULL sections' bytes, verbatim."""
    if not checkpoint.setup_sections:
        return b""
    first, last = checkpoint.setup_sections[0], checkpoint.setup_sections[-1]
    return _read_verbatim(source, first.file_offset, last.file_offset + last.length - first.file_offset)


def read_device_state(source: Source, checkpoint: Checkpoint) -> bytes:
    """The device state's bytes, verbatim: ``device_state_length`` of them."""
    return _read_verbatim(source, checkpoint.device_state_offset, checkpoint.device_state_length)


def with_run_state(device_state: bytes, checkpoint: Checkpoint, run_state: str) -> bytes:
    """The checkpoint's device state, with another run state ("running", "paused") in its globalstate.

    Raises CheckpointError if it has no section globalstate.
    """
    section = _globalstate(checkpoint.sections)
    if section is None:
        raise CheckpointError("no section globalstate, so the run state cannot be set")
    name = run_state.encode("ascii")
    start = section.payload_offset - checkpoint.device_state_offset
    state = (len(name) + 1).to_bytes(4) + name.ljust(_RUN_STATE_LENGTH, b"\0")
    return device_state[:start] + state + device_state[start + len(state) :]


def read_ram_start(cursor: Cursor) -> int:
    """Read the header of the RAM section's START, with commands before it, and give its section id."""
    while True:
        offset = cursor.position
        section_type = cursor.u8("the stream, before the RAM section")
        if section_type == COMMAND:
            cursor.position = offset
            skip_command(cursor)
            continue
        if section_type != SECTION_START:
            raise CheckpointError(f"section type {section_type:#04x} before the RAM section", offset)
        cursor.position = offset
        header = read_section_header(cursor)
        if header.idstr != RAM_IDSTR:
            raise CheckpointError(f"iterable section {header.idstr!r} is not supported, only 'ram'", offset)
        if (header.instance_id, header.version_id) != (RAM_INSTANCE_ID, RAM_VERSION_ID):
            what = f"instance {header.instance_id}, version {header.version_id}"
            raise CheckpointError(f"RAM section is {what}: only 0 and 4 are supported", offset)
        return header.section_id


def read_block_list(cursor: Cursor, header: StreamHeader) -> tuple[RAMBlock, ...]:
    """Read the RAM section's list of blocks, with the mapped-ram headers if the stream has them."""
    what = "the list of RAM blocks"
    offset = cursor.position
    word = cursor.be64(what)
    flags = word % header.page_size
    total = word - flags
    if flags != RAM_MEM_SIZE:
        raise CheckpointError(f"RAM flags {flags:#x} where the list of blocks should begin", offset)
    if total > MAX_TOTAL_LENGTH:
        raise CheckpointError(f"{total} bytes of RAM are more than {MAX_TOTAL_LENGTH}", offset)
    blocks: dict[str, RAMBlock] = {}
    left = total
    while left:
        offset = cursor.position
        idstr = cursor.idstr(what)
        if not idstr or "\0" in idstr or idstr in blocks:
            raise CheckpointError(f"RAM block name {idstr!r} is empty, unusable or occurs twice", offset)
        if len(blocks) == MAX_BLOCKS:
            raise CheckpointError(f"more than {MAX_BLOCKS} RAM blocks", offset)
        used_length = cursor.be64(what)
        if used_length % header.page_size:
            text = (
                f"RAM block {idstr!r}: used_length {used_length:#x} is not a multiple of {header.page_size}"
            )
            raise CheckpointError(text, offset)
        if used_length > left:
            text = f"RAM block {idstr!r}: used_length {used_length:#x} goes beyond the total of {total:#x}"
            raise CheckpointError(text, offset)
        read_block = _read_mapped_ram_block if is_mapped_ram(header) else _read_plain_block
        blocks[idstr] = read_block(cursor, header, idstr, used_length)
        left -= used_length
    return tuple(blocks.values())


def read_ram_end_of_section(cursor: Cursor, ram_section_id: int) -> bool:
    """Read EOS and footer of the RAM section's START, and tell whether this stream has footers."""
    offset = cursor.position
    eos = cursor.be64("the RAM section")
    if eos != RAM_EOS:
        raise CheckpointError(f"Unexpected RAM flags {eos:#x} after the list of RAM blocks", offset)
    if cursor.peek(1) != bytes([FOOTER]):
        return False
    offset = cursor.position
    if cursor.take(5, "a footer") != encode_footer(ram_section_id, footers=True):
        raise CheckpointError("the footer of the RAM section has another section id", offset)
    return True


def finish_checkpoint(
    walker: SectionWalker,
    stream_offset: int,
    header: StreamHeader,
    blocks: tuple[RAMBlock, ...],
    ram_section_id: int,
    setup_sections: tuple[Section, ...],
) -> Checkpoint:
    """Read the device state, at the walker's cursor, and put everything together."""
    cursor, vmdesc = walker.cursor, walker.vmdesc
    source, device_state_offset = cursor.source, cursor.position
    _check_vmdesc(vmdesc, header)
    opaque = False
    try:
        sections = walker.device_state()
        end_offset = cursor.position
    except OpaqueSectionError:
        sections, end_offset, opaque = (), source.length, True
    return Checkpoint(
        stream_offset=stream_offset,
        machine=header.machine,
        subsections=header.subsections,
        capabilities=header.capabilities,
        page_size=header.page_size,
        blocks=blocks,
        ram_section_id=ram_section_id,
        footers=walker.footers,
        bitmap_byteorder=_bitmap_byteorder(header.machine),
        setup_sections=setup_sections,
        sections=sections,
        opaque=opaque,
        device_state_offset=device_state_offset,
        device_state_length=end_offset - device_state_offset,
        vmdesc=None if vmdesc is None else vmdesc.description,
        vmdesc_offset=None if vmdesc is None else vmdesc.file_offset,
        run_state=_read_run_state(source, sections),
    )


def _read_verbatim(source: Source, file_offset: int, length: int) -> bytes:
    if length > MAX_DEVICE_STATE_LENGTH:
        raise CheckpointError(
            f"{length} bytes of device state are more than {MAX_DEVICE_STATE_LENGTH}", file_offset
        )
    data = source.pread(file_offset, length)
    if len(data) < length:
        raise CheckpointError("the file was cut short since it was opened", file_offset + len(data))
    return data


def _read_plain_block(cursor: Cursor, header: StreamHeader, idstr: str, used_length: int) -> RAMBlock:
    address = cursor.be64("a RAM block's address") if IGNORE_SHARED in header.capabilities else None
    return RAMBlock(idstr, used_length, header.page_size, None, None, address, None)


def _read_mapped_ram_block(cursor: Cursor, header: StreamHeader, idstr: str, used_length: int) -> RAMBlock:
    """Read a block's mapped-ram header, and jump over its bitmap and pages."""
    what = f"the mapped-ram header of RAM block {idstr!r}"
    name = f"RAM block {idstr!r}"
    _pass_host_page_size(cursor, header)
    address = cursor.be64(what) if IGNORE_SHARED in header.capabilities else None
    header_offset = cursor.position
    version = cursor.be32(what)
    page_size = cursor.be64(what)
    bitmap_offset = cursor.be64(what)
    pages_offset = cursor.be64(what)
    if version > HEADER_VERSION:
        raise CheckpointError(f"{name}: mapped-ram header version {version} is not supported", header_offset)
    if page_size != header.page_size:
        text = f"{name}: page_size {page_size} does not fit the target page of {header.page_size} bytes"
        raise CheckpointError(text, header_offset + 4)
    if IGNORE_SHARED in header.capabilities and bitmap_offset == pages_offset == 0:
        return RAMBlock(idstr, used_length, page_size, None, None, address, header_offset, ignored=True)
    if bitmap_offset != header_offset + HEADER_LENGTH:
        text = f"{name}: bitmap_offset {bitmap_offset:#x} is not right after the header"
        raise CheckpointError(text, header_offset + 12)
    if pages_offset % page_size:
        raise CheckpointError(
            f"{name}: region of pages has bad alignment ({pages_offset:#x})", header_offset + 20
        )
    if pages_offset < bitmap_offset + bitmap_length(used_length // page_size):
        text = f"{name}: pages_offset {pages_offset:#x} lies before the end of the bitmap"
        raise CheckpointError(text, header_offset + 20)
    if pages_offset + used_length > cursor.source.length:
        text = (
            f"pages reach to {pages_offset + used_length:#x}, but the file ends at {cursor.source.length:#x}"
        )
        raise CheckpointError(f"{name}: {text}", header_offset + 20)
    cursor.position = pages_offset + used_length
    return RAMBlock(idstr, used_length, page_size, pages_offset, bitmap_offset, address, header_offset)


def _pass_host_page_size(cursor: Cursor, header: StreamHeader) -> None:
    """Pass over the be64 that precedes the header of a block of huge pages if the source had postcopy-ram on.

    Nothing announces it; but no header is valid with it read as its beginning, nor 8 bytes before its own.
    """
    at_header = 8 if IGNORE_SHARED in header.capabilities else 0
    expected = header.page_size.to_bytes(8)
    data = cursor.peek(at_header + 8 + 12)
    if data[at_header + 4 : at_header + 12] != expected and data[at_header + 12 :] == expected:
        host_page_size = int.from_bytes(data[:8])
        if host_page_size > header.page_size and host_page_size.bit_count() == 1:
            cursor.position += 8


def _read_bitmap(source: Source, block: RAMBlock, byteorder: Byteorder) -> PagesBitmap:
    """A block's file_bmap, read in pieces so that the holes of a large one take no memory."""
    assert block.bitmap_offset is not None
    bitmap = PagesBitmap(block.page_count)
    length = bitmap_length(block.page_count)
    for byte_offset in range(0, length, _BITMAP_CHUNK_LENGTH):
        chunk_length = min(_BITMAP_CHUNK_LENGTH, length - byte_offset)
        data = source.pread(block.bitmap_offset + byte_offset, chunk_length)
        if len(data) < chunk_length:
            raise CheckpointError(
                f"the file ends inside the bitmap of RAM block {block.idstr!r}", block.bitmap_offset
            )
        try:
            bitmap.load(byte_offset, data, byteorder)
        except ValueError as error:
            raise CheckpointError(
                f"bitmap of RAM block {block.idstr!r}: {error}", block.bitmap_offset
            ) from None
    return bitmap


def _read_setup_sections(walker: SectionWalker) -> tuple[Section, ...]:
    """Pass over early FULL sections; their ends must be known, since the RAM section goes on after them."""
    cursor = walker.cursor
    sections: list[Section] = []
    while cursor.peek(1) == bytes([SECTION_FULL]):
        offset = cursor.position
        try:
            sections.append(walker.full_section())
        except OpaqueSectionError:
            raise CheckpointError("an early section's end cannot be told without a vmdesc", offset) from None
    return tuple(sections)


def _pass_ram_sections(cursor: Cursor, ram_section_id: int, *, footers: bool) -> None:
    """Pass over the RAM section's PARTs, which hold nothing in mapped-ram, commands, and its END."""
    part = encode_ram_section(SECTION_PART, ram_section_id, footers=footers)
    end = encode_ram_section(SECTION_END, ram_section_id, footers=footers)
    many = part * 512
    while True:
        if cursor.peek(len(many)) == many:
            cursor.position += len(many)
        elif cursor.peek(len(part)) == part:
            cursor.position += len(part)
        elif cursor.peek(len(end)) == end:
            cursor.position += len(end)
            return
        elif cursor.peek(1) == bytes([COMMAND]):
            skip_command(cursor)
        else:
            _refuse_ram_section(cursor, ram_section_id)


def _refuse_ram_section(cursor: Cursor, ram_section_id: int) -> None:
    """Say what is wrong with what stands where a PART or END of the RAM section should."""
    offset = cursor.position
    section_type = cursor.u8("the RAM section: it was cut short")
    if section_type not in (SECTION_PART, SECTION_END):
        refuse_section(cursor, section_type)
    section_id = cursor.be32("a section header")
    if section_id != ram_section_id:
        raise CheckpointError(f"section id {section_id} was not started", offset)
    flags = cursor.be64("the RAM section")
    if flags != RAM_EOS:
        raise CheckpointError(f"Unexpected RAM flags {flags:#x} in a mapped-ram stream", offset + 5)
    cursor.take(5, "a footer")
    raise CheckpointError("the footer of a RAM section is missing or has another section id", offset + 13)


def _check_vmdesc(vmdesc: Vmdesc | None, header: StreamHeader) -> None:
    if vmdesc is None:
        return
    page_size = vmdesc.description.get("page_size", header.page_size)
    if page_size != header.page_size:
        text = f"the vmdesc's page_size {page_size!r} is not the target page of {header.page_size} bytes"
        raise CheckpointError(text, vmdesc.file_offset)


_RUN_STATE_LENGTH = 32


def _globalstate(sections: tuple[Section, ...]) -> Section | None:
    """The section that holds be32 length and 32 bytes of run state (``migration/global_state.c``)."""
    for section in reversed(sections):
        if section.idstr == "globalstate" and section.payload_length >= 4 + _RUN_STATE_LENGTH:
            return section
    return None


def _read_run_state(source: Source, sections: tuple[Section, ...]) -> str | None:
    section = _globalstate(sections)
    if section is None:
        return None
    name, _, _ = source.pread(section.payload_offset + 4, _RUN_STATE_LENGTH).partition(b"\0")
    return name.decode("ascii", "replace") or None


def _bitmap_byteorder(machine: str) -> Byteorder:
    return "big" if machine.startswith(_BIG_ENDIAN_MACHINES) else "little"


__all__ = [
    "Checkpoint",
    "Section",
    "read_checkpoint",
    "read_device_state",
    "read_setup",
    "with_run_state",
]
