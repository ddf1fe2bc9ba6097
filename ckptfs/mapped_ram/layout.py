"""Laying out a mapped-ram file as QEMU does, by ``mapped_ram_setup_ramblock`` in ``migration/ram.c`` (10.0).

An image says what goes into the file beside bitmaps and pages; its layout says where everything goes. The
only liberty: the RAM section has its START and END, and no PART or command between them, which would hold
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.bitmap import Byteorder, bitmap_length
from ckptfs.mapped_ram.checkpoint import Checkpoint, for_capabilities
from ckptfs.mapped_ram.ram_section import HEADER_LENGTH, encode_block_header
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.stream import (
    DEFAULT_PAGE_SIZE,
    MAPPED_RAM,
    SectionType,
    encode_block,
    encode_eos,
    encode_footer,
    encode_idstr,
    encode_ram_section,
    encode_ram_start,
    encode_stream_header,
    encode_target_page_bits,
    quote_idstr,
)
from ckptfs.mapped_ram.vmdesc import empty_vmdesc

ALIGNMENT = 0x100000
"""QEMU aligns each block's pages to 1 MiB of the file; loading needs only the page size."""


@dataclass(frozen=True)
class Image:
    """A mapped-ram file's metadata.

    ``blocks`` are idstr and used_length in stream order. ``subsections`` are verbatim configuration
    subsections, without the capabilities (always just mapped-ram). ``setup`` holds the early FULL sections,
    and ``device_state`` everything after the RAM section: sections, EOF, VMDESCRIPTION; both verbatim.
    """

    machine: str
    subsections: tuple[bytes, ...]
    ram_section_id: int
    blocks: tuple[tuple[str, int], ...]
    page_size: int
    setup: bytes
    device_state: bytes
    footers: bool = True
    bitmap_byteorder: Byteorder = "little"


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
    """Lay the image out in a file, its stream beginning at ``stream_offset``.

    Every block's pages begin at a multiple of ``alignment`` (itself a multiple of the page size) of the file.
    """
    extents: list[tuple[int, bytes]] = []
    blocks: list[RAMBlock] = []
    extent_offset = stream_offset
    extent = encode_stream_header(image.machine, image.subsections, [MAPPED_RAM])
    extent += encode_ram_start(image.ram_section_id, sum(used_length for _, used_length in image.blocks))
    for idstr, used_length in image.blocks:
        entry = extent + encode_block(idstr, used_length)
        header_offset = extent_offset + len(entry)
        bitmap_offset = header_offset + HEADER_LENGTH
        pages_offset = _round_up(bitmap_offset + bitmap_length(used_length // image.page_size), alignment)
        extents.append((extent_offset, entry + encode_block_header(image.page_size, bitmap_offset, pages_offset)))
        block = RAMBlock(idstr, used_length, image.page_size, pages_offset, bitmap_offset, None, header_offset)
        blocks.append(block)
        extent_offset, extent = pages_offset + used_length, b""
    extent += encode_eos() + encode_footer(image.ram_section_id, footers=image.footers)
    extent += image.setup
    extent += encode_ram_section(SectionType.END, image.ram_section_id, footers=image.footers)
    extent += image.device_state
    extents.append((extent_offset, extent))
    return Layout(extents, tuple(blocks), extent_offset + len(extent))


def image_of(checkpoint: Checkpoint, setup: bytes, device_state: bytes) -> Image:
    """The image that makes the same checkpoint again, whatever kind of stream it came from.

    ``setup`` and ``device_state`` are ``read_setup`` and ``read_device_state`` of it.
    """
    return Image(
        machine=checkpoint.machine,
        subsections=checkpoint.subsections,
        ram_section_id=checkpoint.ram_section_id,
        blocks=tuple((block.idstr, block.used_length) for block in checkpoint.blocks),
        page_size=checkpoint.page_size,
        setup=setup,
        device_state=for_capabilities(device_state, checkpoint, (MAPPED_RAM,)),
        footers=checkpoint.footers,
        bitmap_byteorder=checkpoint.bitmap_byteorder,
    )


def empty_image(blocks: Sequence[tuple[str, int]], page_size: int = DEFAULT_PAGE_SIZE) -> Image:
    """The image of a guest without a machine: RAM alone. ``blocks`` are idstr and used_length.

    Raises CheckpointError for a block that no migration file can hold.
    """
    for idstr, used_length in blocks:
        if not 0 < len(encode_idstr(idstr)) <= 255 or "\0" in idstr:
            raise CheckpointError(f"RAM block name {quote_idstr(idstr)} is not 1 to 255 bytes without a NUL")
        if used_length % page_size:
            raise CheckpointError(f"RAM block {quote_idstr(idstr)}: {used_length} is not a multiple of {page_size}")
    machine = "none"
    return Image(
        machine=machine,
        subsections=() if page_size == DEFAULT_PAGE_SIZE else (encode_target_page_bits(page_size),),
        ram_section_id=1,
        blocks=tuple(blocks),
        page_size=page_size,
        setup=b"",
        device_state=bytes([SectionType.EOF]) + empty_vmdesc(machine, page_size, (MAPPED_RAM,)),
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
