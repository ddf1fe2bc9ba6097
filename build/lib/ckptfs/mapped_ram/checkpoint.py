"""Reading a mapped-ram migration file, as QEMU 9.0 to 10.2 write it, without reading a page."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from uuid import UUID

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.bitmap import Byteorder, PagesBitmap, bitmap_length
from ckptfs.mapped_ram.ram_section import read_block_list, read_ram_start, read_ram_start_end
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.sections import OpaqueSectionError, Section, SectionWalker, refuse_section
from ckptfs.mapped_ram.stream import (
    RAM_EOS,
    Cursor,
    SectionType,
    Source,
    StreamHeader,
    encode_ram_section,
    is_mapped_ram,
    quote_idstr,
    read_stream_header,
    skip_command,
    uuid_of,
)
from ckptfs.mapped_ram.vmdesc import Vmdesc, vmdescs

MAX_DEVICE_STATE_LENGTH = 1 << 30

# Bitmaps are in the byte order of the host that wrote them. A machine that KVM runs has that of its host, but TCG
# runs any machine on any host.
_BIG_ENDIAN_MACHINES = ("s390-ccw-virtio",)
_BITMAP_CHUNK_LENGTH = 1 << 20
_RUN_STATE_LENGTH = 32
_MAX_VMDESCS = 4
_SAMPLED_PAGES = 64


@dataclass(frozen=True)
class Checkpoint:
    """What a migration stream holds beside its pages.

    ``subsections`` are the configuration's, verbatim, without the capabilities. ``setup_sections`` are the
    early FULL sections (virtio-mem) between the RAM section's START and its next part; ``setup_extents`` where they
    and the parts of other iterable sections (s390x) are, offset and length; ``sections`` the device sections after
    the RAM section. The device state, ``device_state_length`` bytes at ``device_state_offset``, is all that follows
    the RAM section up to and including the vmdesc, but without that if the file ends inside it (``vmdesc_cut``). If
    ``opaque``, there is device state but its sections could not be told apart, and it is taken to reach to the end
    of the file. ``run_state`` is the source's, as the section globalstate has it ("running", "paused", ...), or as
    whoever wrote the file says beside the stream; None without that section. ``vmdesc`` is None also where there is
    one (``has_vmdesc``) that can't be read.
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
    setup_extents: tuple[tuple[int, int], ...]
    sections: tuple[Section, ...]
    opaque: bool
    device_state_offset: int
    device_state_length: int
    vmdesc: dict[str, Any] | None
    vmdesc_offset: int | None
    has_vmdesc: bool
    vmdesc_cut: bool
    run_state: str | None

    @property
    def end_offset(self) -> int:
        """Where the stream ends; what follows in the file, if anything, is not part of it."""
        return self.device_state_offset + self.device_state_length

    @property
    def uuid(self) -> UUID | None:
        """The guest's, if it was saved with capability validate-uuid."""
        return uuid_of(self.subsections)

    @property
    def has_device_state(self) -> bool:
        """Whether there is more than RAM in it."""
        return self.opaque or bool(self.sections)


def read_checkpoint(source: Source, stream_offset: int = 0) -> tuple[Checkpoint, dict[str, PagesBitmap]]:
    """Read the mapped-ram stream at ``stream_offset``: all but the pages, and the file_bmap of each block.

    A block that the file ignores (x-ignore-shared) has no bitmap. Raises CheckpointError, with the position,
    for anything that is not a whole and sound mapped-ram file; only the sections after the RAM may be left
    opaque.
    """
    cursor = Cursor(source, stream_offset)
    header = read_stream_header(cursor)
    if not is_mapped_ram(header):
        text = "a plain migration stream, not mapped-ram: save it with capability mapped-ram on"
        raise CheckpointError(text, stream_offset)
    ram_section_id = read_ram_start(cursor)
    blocks = read_block_list(cursor, header)
    stored = [block for block in blocks if not block.ignored]
    byteorder = _bitmap_byteorder(source, header, stored)
    bitmaps = {block.idstr: _read_bitmap(source, block, byteorder) for block in stored}
    footers = read_ram_start_end(cursor, ram_section_id)
    start = cursor.position

    def read_with(vmdesc: Vmdesc | None) -> Checkpoint:
        cursor.position = start
        walker = SectionWalker(cursor, vmdesc, ram_section_id, footers=footers)
        setup_sections = walker.setup_sections()
        _pass_ram_sections(cursor, walker, ram_section_id)
        return finish_checkpoint(walker, stream_offset, header, blocks, ram_section_id, setup_sections, byteorder)

    return first_sound(vmdescs(source, start), read_with), bitmaps


def first_sound(candidates: Iterable[Vmdesc], read_with: Callable[[Vmdesc | None], Checkpoint]) -> Checkpoint:
    """The checkpoint as the first vmdesc describes it that fits; without any, as it can be told without one.

    Raises CheckpointError if none of them fits. But the stream may have none, and what follows it may have one.
    """
    error = None
    for vmdesc in islice(candidates, _MAX_VMDESCS):
        try:
            return read_with(vmdesc)
        except CheckpointError as misfit:
            error = error or misfit
    if error is None:
        return read_with(None)
    try:
        checkpoint = read_with(None)
    except CheckpointError:
        raise error from None
    if checkpoint.opaque or checkpoint.has_vmdesc:
        raise error
    return checkpoint


def finish_checkpoint(
    walker: SectionWalker,
    stream_offset: int,
    header: StreamHeader,
    blocks: tuple[RAMBlock, ...],
    ram_section_id: int,
    setup_sections: tuple[Section, ...],
    bitmap_byteorder: Byteorder,
) -> Checkpoint:
    """Read the device state at the walker's cursor, and put everything together."""
    source, vmdesc = walker.cursor.source, walker.vmdesc
    device_state_offset = walker.cursor.position
    _check_page_size(vmdesc, header)
    opaque = False
    try:
        sections = walker.device_state()
        end_offset = walker.cursor.position
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
        bitmap_byteorder=bitmap_byteorder,
        setup_sections=setup_sections,
        setup_extents=tuple(walker.setup_extents),
        sections=sections,
        opaque=opaque,
        device_state_offset=device_state_offset,
        device_state_length=end_offset - device_state_offset,
        vmdesc=None if vmdesc is None else vmdesc.description,
        vmdesc_offset=None if vmdesc is None else vmdesc.file_offset,
        has_vmdesc=walker.has_vmdesc,
        vmdesc_cut=walker.vmdesc_cut,
        run_state=_read_run_state(source, sections),
    )


def read_setup(source: Source, checkpoint: Checkpoint) -> bytes:
    """All other sections that stand inside of the RAM section, verbatim and one after another."""
    _check_length(sum(length for _, length in checkpoint.setup_extents), checkpoint.device_state_offset)
    return b"".join(_read_verbatim(source, *extent) for extent in checkpoint.setup_extents)


def read_device_state(source: Source, checkpoint: Checkpoint) -> bytes:
    """The device state, ``device_state_length`` bytes: verbatim, but for the run state that the checkpoint has."""
    state = _read_verbatim(source, checkpoint.device_state_offset, checkpoint.device_state_length)
    if checkpoint.run_state in (None, _read_run_state(source, checkpoint.sections)):
        return state
    assert checkpoint.run_state is not None
    return with_run_state(state, checkpoint, checkpoint.run_state)


def with_run_state(device_state: bytes, checkpoint: Checkpoint, run_state: str) -> bytes:
    """The checkpoint's device state, with another run state ("running", "paused") in its globalstate.

    "running" makes QEMU start the guest when it has loaded it. Raises CheckpointError without a globalstate.
    """
    section = _globalstate(checkpoint.sections)
    if section is None:
        raise CheckpointError("there is no section globalstate, so the run state cannot be set")
    name = run_state.encode("ascii")
    start = section.payload_offset - checkpoint.device_state_offset
    state = (len(name) + 1).to_bytes(4) + name.ljust(_RUN_STATE_LENGTH, b"\0")
    return device_state[:start] + state + device_state[start + len(state) :]


def _read_bitmap(source: Source, block: RAMBlock, byteorder: Byteorder) -> PagesBitmap:
    """A block's file_bmap, read in pieces so that the holes of a large one take no memory."""
    assert block.bitmap_offset is not None
    bitmap = PagesBitmap(block.page_count)
    length = bitmap_length(block.page_count)
    for byte_offset in range(0, length, _BITMAP_CHUNK_LENGTH):
        chunk_length = min(_BITMAP_CHUNK_LENGTH, length - byte_offset)
        data = source.pread(block.bitmap_offset + byte_offset, chunk_length)
        if len(data) < chunk_length:
            text = f"the file ends inside the bitmap of RAM block {quote_idstr(block.idstr)}"
            raise CheckpointError(text, block.bitmap_offset)
        try:
            bitmap.load(byte_offset, data, byteorder)
        except ValueError as error:
            text = f"bitmap of RAM block {quote_idstr(block.idstr)}: {error}"
            raise CheckpointError(text, block.bitmap_offset) from None
    return bitmap


def _pass_ram_sections(cursor: Cursor, walker: SectionWalker, ram_section_id: int) -> None:
    """Pass over PARTs, which hold nothing of RAM in mapped-ram, commands, and the RAM section's END."""
    part = encode_ram_section(SectionType.PART, ram_section_id, footers=walker.footers)
    end = encode_ram_section(SectionType.END, ram_section_id, footers=walker.footers)
    many = part * 512
    while cursor.peek(len(end)) != end:
        if cursor.peek(len(many)) == many:
            cursor.position += len(many)
        elif cursor.peek(len(part)) == part:
            cursor.position += len(part)
        elif cursor.peek(1) == bytes([SectionType.COMMAND]):
            skip_command(cursor)
        else:
            _pass_other_part(cursor, walker, ram_section_id)
    cursor.position += len(end)


def _pass_other_part(cursor: Cursor, walker: SectionWalker, ram_section_id: int) -> None:
    """Pass over another section's PART, or say what is wrong with what stands where RAM should go on."""
    offset = cursor.position
    section_type = cursor.u8("the RAM section: it was cut short")
    if section_type not in (SectionType.PART, SectionType.END):
        refuse_section(cursor, section_type)
    section_id = cursor.be32("a section header")
    if section_id != ram_section_id:
        cursor.position = offset
        walker.part_of_another()
        return
    flags = cursor.be64("the RAM section")
    if flags != RAM_EOS:
        raise CheckpointError(f"Unexpected RAM flags {flags:#x} in a mapped-ram stream", offset + 5)
    cursor.take(5, "a footer")
    raise CheckpointError("the footer of a RAM section is missing or has another section id", offset + 13)


def _check_page_size(vmdesc: Vmdesc | None, header: StreamHeader) -> None:
    if vmdesc is None:
        return
    page_size = vmdesc.description.get("page_size", header.page_size)
    if page_size != header.page_size:
        text = f"the vmdesc's page_size is not the target page of {header.page_size} bytes"
        raise CheckpointError(text, vmdesc.file_offset)


def _globalstate(sections: tuple[Section, ...]) -> Section | None:
    """The section that begins with be32 length and 32 bytes of run state (``migration/global_state.c``)."""
    for section in sections:
        if section.idstr == "globalstate" and section.payload_length >= 4 + _RUN_STATE_LENGTH:
            return section
    return None


def _read_run_state(source: Source, sections: tuple[Section, ...]) -> str | None:
    section = _globalstate(sections)
    if section is None:
        return None
    name, _, _ = source.pread(section.payload_offset + 4, _RUN_STATE_LENGTH).partition(b"\0")
    return name.decode("ascii") if name.replace(b"-", b"").isalnum() else None


def _read_verbatim(source: Source, file_offset: int, length: int) -> bytes:
    _check_length(length, file_offset)
    data = source.pread(file_offset, length)
    if len(data) < length:
        raise CheckpointError("the file was cut short since it was opened", file_offset + len(data))
    return data


def _check_length(length: int, file_offset: int) -> None:
    if length > MAX_DEVICE_STATE_LENGTH:
        text = f"{length} bytes of device state are more than {MAX_DEVICE_STATE_LENGTH}"
        raise CheckpointError(text, file_offset)


def _bitmap_byteorder(source: Source, header: StreamHeader, blocks: Sequence[RAMBlock]) -> Byteorder:
    """The byte order of the bitmaps' words: that of the host, which the file does not name but shows.

    QEMU sets the bit of a page when it writes one that is not zeros. So where the two orders differ, the right one
    has content below its bits. Only machines that may come from a big-endian host are in question.
    """
    if not header.machine.startswith(_BIG_ENDIAN_MACHINES):
        return "little"
    big = little = 0
    for block in blocks:
        try:
            as_big = _read_bitmap(source, block, "big")
        except CheckpointError:  # a bit past the last page
            return "little"
        try:
            as_little = _read_bitmap(source, block, "little")
        except CheckpointError:
            return "big"
        big += _pages_with_content(source, block, as_big.difference(as_little))
        little += _pages_with_content(source, block, as_little.difference(as_big))
    return "little" if little > big else "big"


def _pages_with_content(source: Source, block: RAMBlock, pages: PagesBitmap) -> int:
    """How many of the first ones of these pages are not zeros in the file."""
    assert block.pages_offset is not None
    count = 0
    for run in islice(pages.runs(), _SAMPLED_PAGES):
        count += any(source.pread(block.pages_offset + run.start * block.page_size, block.page_size))
    return count


__all__ = [
    "Checkpoint",
    "Section",
    "finish_checkpoint",
    "first_sound",
    "read_checkpoint",
    "read_device_state",
    "read_setup",
    "with_run_state",
]
