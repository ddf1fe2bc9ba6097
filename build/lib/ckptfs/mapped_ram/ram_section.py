"""The RAM section's START: its list of blocks, with their mapped-ram headers (QEMU 9.0 to 10.2).

``parse_ramblocks`` and ``parse_ramblock_mapped_ram`` in ``migration/ram.c``; what they forget to check is
checked here.
"""

import struct

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.bitmap import bitmap_length
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.sections import refuse_section
from ckptfs.mapped_ram.stream import (
    IGNORE_SHARED,
    RAM_EOS,
    RAM_IDSTR,
    RAM_INSTANCE_ID,
    RAM_MEM_SIZE,
    RAM_VERSION_ID,
    Cursor,
    SectionType,
    StreamHeader,
    encode_footer,
    is_mapped_ram,
    quote_idstr,
    read_section_header,
    skip_command,
)

HEADER_LENGTH = 28
HEADER_VERSION = 1
MAX_BLOCKS = 4096
MAX_TOTAL_LENGTH = 1 << 46
"""64 TiB of RAM, or 2 GiB of bitmaps."""
_MAX_HOST_PAGE_SIZE = 1 << 30


def read_ram_start(cursor: Cursor) -> int:
    """Read the header of the RAM section's START, with commands before it, and give its section id."""
    while cursor.peek(1) == bytes([SectionType.COMMAND]):
        skip_command(cursor)
    offset = cursor.position
    section_type = cursor.u8("the stream, before the RAM section")
    if section_type != SectionType.START:
        refuse_section(cursor, section_type)
    cursor.position = offset
    header = read_section_header(cursor)
    if header.idstr != RAM_IDSTR:
        raise CheckpointError(f"iterable section {quote_idstr(header.idstr)} is not supported, only 'ram'", offset)
    if (header.instance_id, header.version_id) != (RAM_INSTANCE_ID, RAM_VERSION_ID):
        what = f"instance {header.instance_id}, version {header.version_id}"
        raise CheckpointError(f"the RAM section is {what}: only 0 and 4 are supported", offset)
    return header.section_id


def read_block_list(cursor: Cursor, header: StreamHeader) -> tuple[RAMBlock, ...]:
    """Read the list of blocks, with the mapped-ram headers if the stream has them.

    Leaves the cursor after the last block's pages. The stream goes on right after each block's pages, so
    regions that lie in stream order, each after its own bitmap, cannot overlap anything.
    """
    what = "the list of RAM blocks"
    offset = cursor.position
    word = cursor.be64(what)
    flags = word % header.page_size
    total = word - flags
    if flags != RAM_MEM_SIZE:
        raise CheckpointError(f"Unexpected RAM flags {flags:#x} where the list of blocks should begin", offset)
    if total > MAX_TOTAL_LENGTH:
        raise CheckpointError(f"{total:#x} bytes of RAM are more than {MAX_TOTAL_LENGTH:#x}", offset)
    blocks: dict[str, RAMBlock] = {}
    left = total
    while left:
        offset = cursor.position
        idstr = cursor.idstr(what)
        if not idstr or "\0" in idstr:
            raise CheckpointError("a RAM block's name is empty or holds a NUL byte: the list is damaged", offset)
        if idstr in blocks:
            raise CheckpointError(f"RAM block {quote_idstr(idstr)} is listed twice", offset)
        if len(blocks) == MAX_BLOCKS:
            raise CheckpointError(f"more than {MAX_BLOCKS} RAM blocks", offset)
        name = f"RAM block {quote_idstr(idstr)}"
        used_length = cursor.be64(what)
        if used_length % header.page_size:
            text = f"{name}: used_length {used_length:#x} is not a multiple of {header.page_size}"
            raise CheckpointError(text, offset)
        if used_length > left:
            text = f"{name}: used_length {used_length:#x} goes beyond the total of {total:#x}"
            raise CheckpointError(text, offset)
        _pass_host_page_size(cursor, header)
        address = cursor.be64(what) if IGNORE_SHARED in header.capabilities else None
        if is_mapped_ram(header):
            blocks[idstr] = _read_mapped_ram_block(cursor, header, idstr, used_length, address)
        else:
            blocks[idstr] = RAMBlock(idstr, used_length, header.page_size, None, None, address, None)
        left -= used_length
    return tuple(blocks.values())


def read_ram_start_end(cursor: Cursor, ram_section_id: int) -> bool:
    """Read EOS and footer of the RAM section's START, and tell whether this stream has footers."""
    offset = cursor.position
    eos = cursor.be64("the RAM section")
    if eos != RAM_EOS:
        raise CheckpointError(f"Unexpected RAM flags {eos:#x} after the list of RAM blocks", offset)
    if cursor.peek(1) != bytes([SectionType.FOOTER]):
        return False
    offset = cursor.position
    if cursor.take(5, "a footer") != encode_footer(ram_section_id, footers=True):
        raise CheckpointError("the footer of the RAM section has another section id", offset)
    return True


def encode_block_header(page_size: int, bitmap_offset: int, pages_offset: int) -> bytes:
    """QEMU's ``MappedRamHeader``: 28 bytes, its offsets absolute in the file."""
    return struct.pack(">IQQQ", HEADER_VERSION, page_size, bitmap_offset, pages_offset)


def _pass_host_page_size(cursor: Cursor, header: StreamHeader) -> None:
    """Pass over the be64 that follows used_length of a block of huge pages if the source had postcopy-ram on.

    Nothing announces it, but it is unmistakable: a mapped-ram header begins with its version, as the upper
    half of a be64, and anything else that may follow is the EOS or begins with the length of a name. QEMU
    refuses postcopy-ram with x-ignore-shared.
    """
    if IGNORE_SHARED in header.capabilities:
        return
    word = int.from_bytes(cursor.peek(8))
    if word.bit_count() == 1 and header.page_size < word <= _MAX_HOST_PAGE_SIZE:
        cursor.position += 8


def _read_mapped_ram_block(
    cursor: Cursor, header: StreamHeader, idstr: str, used_length: int, address: int | None
) -> RAMBlock:
    """Read a block's mapped-ram header, and jump over its bitmap and pages."""
    name = f"RAM block {quote_idstr(idstr)}"
    header_offset = cursor.position
    data = cursor.take(HEADER_LENGTH, f"the mapped-ram header of {name}")
    version, page_size, bitmap_offset, pages_offset = struct.unpack(">IQQQ", data)
    if version > HEADER_VERSION:
        raise CheckpointError(f"{name}: mapped-ram header version {version} is not supported", header_offset)
    if page_size != header.page_size:
        text = f"{name}: page_size {page_size} does not fit the target page of {header.page_size} bytes"
        raise CheckpointError(text, header_offset + 4)
    if address is not None and bitmap_offset == pages_offset == 0:
        return RAMBlock(idstr, used_length, page_size, None, None, address, header_offset, ignored=True)
    if bitmap_offset != cursor.position:
        text = f"{name}: bitmap_offset {bitmap_offset:#x} is not right after the header"
        raise CheckpointError(text, header_offset + 12)
    if pages_offset % page_size:
        raise CheckpointError(f"{name}: region of pages has bad alignment ({pages_offset:#x})", header_offset + 20)
    if pages_offset < bitmap_offset + bitmap_length(used_length // page_size):
        text = f"{name}: pages_offset {pages_offset:#x} lies before the end of the bitmap"
        raise CheckpointError(text, header_offset + 20)
    end = pages_offset + used_length
    if end > cursor.source.length:
        text = f"{name}: its pages reach to {end:#x}, but the file ends at {cursor.source.length:#x}"
        raise CheckpointError(text, header_offset + 20)
    cursor.position = end
    return RAMBlock(idstr, used_length, page_size, pages_offset, bitmap_offset, address, header_offset)
