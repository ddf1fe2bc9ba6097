"""Laying out a migration file as QEMU does, by ``mapped_ram_setup_ramblock`` in ``migration/ram.c`` (10.0).

An image says what goes into the file beside bitmaps and pages; the layout of a mapped-ram file says where
everything goes, the frame of a plain one what comes before and after its page records. The only liberty: the RAM
section has its START and END, and no PART or command between them. The trailer, if there is one, comes last.

x-ignore-shared together with mapped-ram is written as QEMU's development tree after 11.1 has it: QEMU 10.2 and
older write such a file and can't read it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.bitmap import Byteorder, bitmap_length
from ckptfs.mapped_ram.checkpoint import Checkpoint
from ckptfs.mapped_ram.ram_section import HEADER_LENGTH, encode_block_header
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.stream import (
    DEFAULT_PAGE_SIZE,
    MAPPED_RAM,
    BytesSource,
    SectionType,
    encode_block,
    encode_eos,
    encode_footer,
    encode_idstr,
    encode_part_header,
    encode_ram_section,
    encode_ram_start,
    encode_stream_header,
    encode_target_page_bits,
    quote_idstr,
    uuid_of,
    with_uuid,
)
from ckptfs.mapped_ram.trailer import NO_TRAILER, Trailer
from ckptfs.mapped_ram.vmdesc import empty_vmdesc, vmdescs, with_configuration

ALIGNMENT = 0x100000
"""QEMU aligns each block's pages to 1 MiB of the file; loading needs only the page size."""


@dataclass(frozen=True)
class Image:
    """A migration stream without its pages.

    ``subsections`` are verbatim configuration subsections, without the ``capabilities``. ``blocks`` are in stream
    order; wherever their pages were before does not matter, and those that are ``ignored`` stay out. ``setup``
    holds the early FULL sections, and ``device_state`` everything after the RAM section: sections, EOF,
    VMDESCRIPTION; both verbatim. ``run_state`` is the one in it, None without one. If ``opaque``, only QEMU knows
    where it ends, and the ``trailer`` stays out.
    """

    machine: str
    subsections: tuple[bytes, ...]
    capabilities: tuple[str, ...]
    ram_section_id: int
    blocks: tuple[RAMBlock, ...]
    page_size: int
    setup: bytes
    device_state: bytes
    footers: bool = True
    bitmap_byteorder: Byteorder = "little"
    opaque: bool = False
    trailer: Trailer = NO_TRAILER
    run_state: str | None = None

    def configured(
        self, capabilities: tuple[str, ...], uuid: UUID | None, ignored: Collection[str] = ()
    ) -> "Image":
        """The same with these capabilities (in QEMU's order) and uuid, leaving out the ``ignored`` blocks.

        All that changes beside the configuration is the vmdesc, which describes it: QEMU does not read that, but
        tools do. Sections stay as they are, byte for byte.
        """
        device_state = self.device_state
        if (capabilities, uuid) != (self.capabilities, uuid_of(self.subsections)):
            found = (
                x for x in vmdescs(BytesSource(device_state), 0) if x.file_offset + x.length == len(device_state)
            )
            if (vmdesc := next(found, None)) is not None:
                device_state = device_state[: vmdesc.file_offset] + with_configuration(
                    vmdesc.description, self.machine, capabilities, has_uuid=uuid is not None
                )
        return replace(
            self,
            subsections=with_uuid(self.subsections, uuid),
            capabilities=capabilities,
            blocks=tuple(replace(block, ignored=block.idstr in ignored) for block in self.blocks),
            device_state=device_state,
        )

    def tail(self) -> bytes:
        """What comes after the RAM section, to the end of the file."""
        return self.device_state + (b"" if self.opaque else self.trailer.encode())

    def header(self) -> bytes:
        """The stream's beginning: header, configuration, and the RAM section's START up to its list of blocks."""
        total = sum(block.used_length for block in self.blocks)
        header = encode_stream_header(self.machine, self.subsections, self.capabilities)
        return header + encode_ram_start(self.ram_section_id, total)


@dataclass(frozen=True)
class Layout:
    """Where an image's parts go: file offsets and bytes in ``extents``, pages and bitmaps by ``blocks``.

    The file is ``end_offset`` bytes long, and a hole wherever nothing is put.
    """

    extents: list[tuple[int, bytes]]
    blocks: tuple[RAMBlock, ...]
    end_offset: int

    @property
    def header(self) -> tuple[int, bytes]:
        """The first extent: a file without it is plainly no migration stream, so it may be written last."""
        return self.extents[0]


def layout(image: Image, stream_offset: int = 0, alignment: int = ALIGNMENT) -> Layout:
    """Lay a mapped-ram image out in a file, its stream beginning at ``stream_offset``.

    Every block's pages begin at a multiple of ``alignment`` (itself a multiple of the page size) of the file.
    """
    extents: list[tuple[int, bytes]] = []
    blocks: list[RAMBlock] = []
    extent_offset = stream_offset
    extent = image.header()
    for block in image.blocks:
        extent += encode_block(block, image.capabilities)
        header_offset = extent_offset + len(extent)
        if block.ignored:
            extent += encode_block_header(image.page_size, 0, 0)
            blocks.append(replace(block, pages_offset=None, bitmap_offset=None, header_offset=header_offset))
            continue
        bitmap_offset = header_offset + HEADER_LENGTH
        pages_offset = _round_up(bitmap_offset + bitmap_length(block.page_count), alignment)
        extents.append((extent_offset, extent + encode_block_header(image.page_size, bitmap_offset, pages_offset)))
        blocks.append(
            replace(block, pages_offset=pages_offset, bitmap_offset=bitmap_offset, header_offset=header_offset)
        )
        extent_offset, extent = pages_offset + block.used_length, b""
    extent += encode_eos() + encode_footer(image.ram_section_id, footers=image.footers)
    extent += image.setup
    extent += encode_ram_section(SectionType.END, image.ram_section_id, footers=image.footers)
    extent += image.tail()
    extents.append((extent_offset, extent))
    return Layout(extents, tuple(blocks), extent_offset + len(extent))


def frame(image: Image) -> tuple[bytes, bytes]:
    """What comes before and after the page records of a plain stream, which are all in the RAM section's END."""
    section_id, footers = image.ram_section_id, image.footers
    ram_end = encode_eos() + encode_footer(section_id, footers=footers)
    blocks = b"".join(encode_block(block, image.capabilities) for block in image.blocks)
    before = image.header() + blocks + ram_end + image.setup + encode_part_header(SectionType.END, section_id)
    return before, ram_end + image.tail()


def image_of(checkpoint: Checkpoint, setup: bytes, device_state: bytes, trailer: Trailer = NO_TRAILER) -> Image:
    """The image that makes the same file again, but for its pages; see `Image.configured`.

    ``setup`` and ``device_state`` are ``read_setup`` and ``read_device_state`` of it.
    """
    return Image(
        machine=checkpoint.machine,
        subsections=checkpoint.subsections,
        capabilities=checkpoint.capabilities,
        ram_section_id=checkpoint.ram_section_id,
        blocks=checkpoint.blocks,
        page_size=checkpoint.page_size,
        setup=setup,
        device_state=device_state,
        footers=checkpoint.footers,
        bitmap_byteorder=checkpoint.bitmap_byteorder,
        opaque=checkpoint.opaque,
        trailer=trailer,
        run_state=checkpoint.run_state,
    )


def empty_image(blocks: Sequence[tuple[str, int]], page_size: int = DEFAULT_PAGE_SIZE) -> Image:
    """The image of a guest without a machine: RAM alone, mapped-ram. ``blocks`` are idstr and used_length.

    Raises CheckpointError for a block that no migration file can hold.
    """
    for idstr, used_length in blocks:
        if not 0 < len(encode_idstr(idstr)) <= 255 or "\0" in idstr:
            raise CheckpointError(f"RAM block name {quote_idstr(idstr)} is not 1 to 255 bytes without a NUL")
        if used_length == 0:  # QEMU's list of blocks ends when their lengths add up: it would not see a last one
            raise CheckpointError(
                f"RAM block {quote_idstr(idstr)} has no pages: give it a size (truncate -s SIZE), or rm it"
            )
        if used_length % page_size:
            raise CheckpointError(f"RAM block {quote_idstr(idstr)}: {used_length} is not a multiple of {page_size}")
    machine = "none"
    return Image(
        machine=machine,
        subsections=() if page_size == DEFAULT_PAGE_SIZE else (encode_target_page_bits(page_size),),
        capabilities=(MAPPED_RAM,),
        ram_section_id=1,
        blocks=tuple(RAMBlock(idstr, length, page_size, None, None, None, None) for idstr, length in blocks),
        page_size=page_size,
        setup=b"",
        device_state=bytes([SectionType.EOF]) + empty_vmdesc(machine, page_size, (MAPPED_RAM,)),
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
