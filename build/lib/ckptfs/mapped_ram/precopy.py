"""Plain migration streams: page records one after the other, instead of pages at fixed offsets (QEMU 9.0 to 10.2).

That is what QEMU saves without capability mapped-ram, and with x-ignore-shared, where only small blocks have
records. Reading builds an index of where each page's newest content lies. Writing makes records for many pages at
once, for a whole checkpoint or for the small stream from which QEMU starts on RAM that it maps from elsewhere.

A record is be64 block_offset | flags, then u8 and idstr unless it CONTINUEs the block before, then a page's
bytes, or one zero byte for a ZERO page (``ram_load_precopy`` in ``migration/ram.c``).
"""

import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.checkpoint import Checkpoint, finish_checkpoint, first_sound
from ckptfs.mapped_ram.layout import frame, image_of
from ckptfs.mapped_ram.ram_section import read_block_list, read_ram_start, read_ram_start_end
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.sections import Section, SectionWalker, refuse_section
from ckptfs.mapped_ram.stream import (
    RAM_CONTINUE,
    RAM_EOS,
    RAM_PAGE,
    RAM_ZERO,
    Cursor,
    SectionType,
    Source,
    encode_footer,
    encode_idstr,
    is_mapped_ram,
    quote_idstr,
    read_stream_header,
    skip_command,
)
from ckptfs.mapped_ram.vmdesc import Vmdesc, last_vmdesc, vmdescs

MAX_INDEXED_LENGTH = 1 << 40
"""A larger block's pages are not indexed: 1 TiB needs up to 2 GiB of index."""
_CHUNK_LENGTH = 1 << 20  # fits a cache of the processor: the pages are read, but not looked at
_FIRST_STRETCH = 16  # records
_LONGEST_STRETCH = 1 << 16


class PageBytes(Protocol):
    """Whatever the stream's bytes can be read from, by position."""

    def pread(self, file_offset: int, length: int) -> bytes:
        """The bytes at ``file_offset``: ``length`` of them, or fewer only where the file ends."""


@dataclass(frozen=True)
class PrecopyStream:
    """A plain stream: ``checkpoint`` holds all that is not pages, ``page_offsets`` where those are.

    That is, by idstr, the file offset of each page's newest content, 0 for a page of zeros. A block without
    any record is not in ``page_offsets``: with x-ignore-shared, that is one whose content stays in its shared
    memory backend.
    """

    checkpoint: Checkpoint
    page_offsets: dict[str, npt.NDArray[np.uint64]]

    def file_bmap(self, idstr: str) -> PagesBitmap:
        """The pages of a block in ``page_offsets`` that the stream has content for; all others are zeros."""
        offsets = self.page_offsets[idstr]
        bitmap = PagesBitmap(offsets.size)
        bitmap.set_mask(0, offsets != 0)
        return bitmap

    def read_pages(self, source: PageBytes, idstr: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Pages ``start`` to ``stop`` of a block in ``page_offsets``: an array of (pages, page_size) bytes.

        Raises CheckpointError if the file has become shorter.
        """
        page_size = self.checkpoint.page_size
        stride = 8 + page_size
        pages = np.zeros((stop - start, page_size), np.uint8)
        offsets = self.page_offsets[idstr][start:stop].astype(np.int64)
        # Records that follow each other in the file are read at once.
        breaks = np.flatnonzero(np.diff(offsets) != stride) + 1
        edges = [0, *breaks.tolist(), offsets.size] if offsets.size else []
        for first, last in pairwise(edges):
            offset = int(offsets[first])
            if offset == 0:
                continue
            length = (last - first) * stride  # with the 8 bytes of the next record, or of the EOS
            data = source.pread(offset, length)
            if len(data) < length:
                raise CheckpointError("the file was cut short since it was opened", offset + len(data))
            pages[first:last] = np.frombuffer(data, np.uint8).reshape(-1, stride)[:, :page_size]
        return pages


def read_precopy(source: Source, stream_offset: int = 0) -> PrecopyStream:
    """Read the plain stream at ``stream_offset`` and index its pages.

    One pass over the file in chunks of 1 MiB, and 8 bytes of memory a page. Raises CheckpointError, with the
    position, for anything that is not a whole and sound stream, and for a mapped-ram one.
    """
    cursor = Cursor(source, stream_offset)
    header = read_stream_header(cursor)
    if is_mapped_ram(header):
        raise CheckpointError("this is a mapped-ram stream, not a plain one", stream_offset)
    ram_section_id = read_ram_start(cursor)
    blocks = read_block_list(cursor, header)
    footers = read_ram_start_end(cursor, ram_section_id)
    setup_offset = cursor.position

    def walk_setup(vmdesc: Vmdesc | None) -> tuple[SectionWalker, tuple[Section, ...]]:
        cursor.position = setup_offset
        walker = SectionWalker(cursor, vmdesc, ram_section_id, footers=footers)
        return walker, walker.setup_sections()

    first, _ = walk_setup(None if footers else last_vmdesc(source, setup_offset))
    early = len(first.setup_extents)
    index = _PageIndex(source, blocks, header.page_size)
    ram_stop = index.read_ram_sections(first, ram_section_id)

    def read_with(vmdesc: Vmdesc | None) -> Checkpoint:
        walker, setup_sections = walk_setup(vmdesc)
        walker.setup_extents += first.setup_extents[early:]
        cursor.position = ram_stop
        return finish_checkpoint(
            walker, stream_offset, header, blocks, ram_section_id, setup_sections, sys.byteorder
        )

    return PrecopyStream(first_sound(vmdescs(source, ram_stop), read_with), index.page_offsets)


def vmstate_stream(
    checkpoint: Checkpoint,
    left_out: Collection[str],
    pages: Iterable[tuple[str, int, bytes]],
    setup: bytes,
    device_state: bytes,
) -> bytes:
    """The plain stream from which QEMU starts on RAM that it already has: ``-incoming file:``, no capability.

    It lists all blocks, with page records for those not in ``left_out`` only: QEMU does not touch what has no
    record, so those keep what their memory backends hold. ``pages`` are runs of the other blocks' content:
    idstr, first page, bytes.

    All their other pages get ZERO records, though a mapped-ram load would not touch them. QEMU's own precopy
    sends these too: ROM blocks are not empty before the load (the destination has built its own ACPI tables),
    and a clear bit in the checkpoint means zeros, not whatever happens to be there.

    ``setup`` and ``device_state`` are the checkpoint's, verbatim, or as ``with_run_state`` made them. Raises
    CheckpointError for a run outside its block or of no such block.
    """
    blocks = {block.idstr: block for block in checkpoint.blocks}
    sent = {idstr: PagesBitmap(block.page_count) for idstr, block in blocks.items() if idstr not in left_out}
    records: list[memoryview] = []
    for idstr, start, data in pages:
        count, rest = divmod(len(data), checkpoint.page_size)
        if idstr not in sent or rest or not 0 <= start <= start + count <= sent[idstr].page_count:
            raise CheckpointError(f"RAM block {quote_idstr(idstr)} has no pages {start} to {start + count} to send")
        sent[idstr].set(start, start + count)
        content = np.frombuffer(data, np.uint8).reshape(count, checkpoint.page_size)
        records += page_records(idstr, np.arange(start, start + count), content)
    for idstr, bitmap in sent.items():
        zero_pages = np.flatnonzero(bitmap.expand(0, bitmap.page_count) == 0)
        records += zero_records(idstr, zero_pages, checkpoint.page_size)
    before, after = frame(image_of(checkpoint, setup, device_state).configured((), checkpoint.uuid))
    return b"".join([before, *records, after])


def page_records(idstr: str, pages: npt.NDArray[np.int64], content: npt.NDArray[np.uint8]) -> list[memoryview]:
    """The PAGE records of these pages of a block, in pieces; ``content`` is an array of (pages, page_size) bytes.

    The first one names the block, so that it does not matter what comes before.
    """
    return _records(idstr, RAM_PAGE, pages, content.shape[1], content)


def zero_records(idstr: str, pages: npt.NDArray[np.int64], page_size: int) -> list[memoryview]:
    """The ZERO records of these pages of a block."""
    return _records(idstr, RAM_ZERO, pages, page_size, np.zeros((1, 1), np.uint8))


def _records(
    idstr: str, kind: int, pages: npt.NDArray[np.int64], page_size: int, content: npt.NDArray[np.uint8]
) -> list[memoryview]:
    if not pages.size:
        return []
    records = np.empty((pages.size, 8 + content.shape[1]), np.uint8)
    records[:, :8] = (pages * page_size | kind | RAM_CONTINUE).astype(">u8").view(np.uint8).reshape(-1, 8)
    records[:, 8:] = content
    name = encode_idstr(idstr)
    first = (int(pages[0]) * page_size | kind).to_bytes(8) + bytes([len(name)]) + name
    return [memoryview(first), records.reshape(-1)[8:].data]


class _PageIndex:
    """Builds ``page_offsets`` from the records of the RAM section's PARTs and END.

    Most records are like the one before: the next page of the same block, or the next page of zeros. Such
    stretches are recognised and indexed by numpy; a record that is different is parsed by itself.
    """

    def __init__(self, source: Source, blocks: tuple[RAMBlock, ...], page_size: int) -> None:
        self.page_offsets: dict[str, npt.NDArray[np.uint64]] = {}
        self._source = source
        self._blocks = {block.idstr: block for block in blocks}
        self._page_size = page_size
        self._block: RAMBlock | None = None
        self._offsets = np.empty(0, np.uint64)
        self._cursor = Cursor(source, 0, _CHUNK_LENGTH)

    def read_ram_sections(self, walker: SectionWalker, ram_section_id: int) -> int:
        """Index everything from the walker's position up to the RAM section's END, and tell where that ends.

        A stream that QEMU wrote with background-snapshot has no END: it ends where the device state begins
        (bg_migration_thread in migration/migration.c, 6.0 to 10.2).
        """
        cursor = self._cursor
        cursor.position = walker.cursor.position
        footer = encode_footer(ram_section_id, footers=walker.footers)
        section_type = None
        while section_type != SectionType.END:
            offset = cursor.position
            section_type = cursor.u8("the RAM section: it was cut short")
            if section_type == SectionType.COMMAND:
                cursor.position = offset
                skip_command(cursor)
                continue
            if section_type in (SectionType.FULL, SectionType.EOF):
                return offset
            if section_type not in (SectionType.PART, SectionType.END):
                refuse_section(cursor, section_type)
            section_id = cursor.be32("a section header")
            if section_id != ram_section_id:
                walker.cursor.position = offset
                walker.part_of_another()
                cursor.position, section_type = walker.cursor.position, None
                continue
            self._index_records()
            if cursor.take(len(footer), "a footer") != footer:
                text = "the footer of a RAM section is missing or has another section id"
                raise CheckpointError(text, cursor.position - len(footer))
        return cursor.position

    def _index_records(self) -> None:
        """Index the records of one section, and pass over its EOS."""
        cursor = self._cursor
        while True:
            offset = cursor.position
            word = cursor.be64("the records of RAM pages")
            flags = word % self._page_size
            if word == RAM_EOS:
                return
            kind = flags & ~RAM_CONTINUE
            if kind not in (RAM_PAGE, RAM_ZERO):
                raise CheckpointError(f"Unexpected RAM flags {flags:#x} in a plain stream", offset)
            if not flags & RAM_CONTINUE:
                self._start_block(cursor.idstr("the records of RAM pages"), offset)
            page = self._page(word - flags, offset)
            content_offset = cursor.position
            if kind == RAM_PAGE:
                cursor.skip(self._page_size, "a RAM page")
                self._offsets[page] = content_offset
            else:
                if cursor.u8("the records of RAM pages"):
                    raise CheckpointError("a page of zeros has another value", content_offset)
                self._offsets[page] = 0
            self._index_stretch(kind)

    def _index_stretch(self, kind: int) -> None:
        """Index the records at the cursor for as long as they are all of this kind, and of the same block."""
        cursor = self._cursor
        stride = 8 + (self._page_size if kind == RAM_PAGE else 1)
        expected = kind | RAM_CONTINUE
        count = _FIRST_STRETCH
        while int.from_bytes(cursor.peek(8)) % self._page_size == expected:
            records = np.frombuffer(cursor.peek(count * stride), np.uint8)
            records = records[: records.size // stride * stride].reshape(-1, stride)
            words = records[:, :8].copy().view(">u8")[:, 0].astype(np.uint64)
            regular = words & np.uint64(self._page_size - 1) == expected
            if kind == RAM_ZERO:
                regular &= records[:, 8] == 0
            length = int(regular.argmin()) if not regular.all() else regular.size
            if length == 0:
                return
            first = cursor.position
            block_offsets = words[:length] - np.uint64(expected)
            self._page(int(block_offsets.max()), first)
            pages = block_offsets // np.uint64(self._page_size)
            offsets = np.arange(first + 8, first + 8 + length * stride, stride, dtype=np.uint64)
            if kind == RAM_ZERO:
                self._offsets[pages] = 0
            else:  # A page may come twice: its newest content is the one farthest on in the file.
                np.maximum.at(self._offsets, pages, offsets)
            cursor.position += length * stride
            count = min(8 * count, _CHUNK_LENGTH // stride, _LONGEST_STRETCH)

    def _start_block(self, idstr: str, file_offset: int) -> None:
        block = self._blocks.get(idstr)
        if block is None:
            raise CheckpointError(
                f"a page of RAM block {quote_idstr(idstr)}, which is not in the list of blocks", file_offset
            )
        if block.used_length > MAX_INDEXED_LENGTH:
            text = f"{block.used_length:#x} bytes are too many for a plain stream, use mapped-ram"
            raise CheckpointError(f"RAM block {quote_idstr(idstr)}: {text}", file_offset)
        self._block = block
        if idstr not in self.page_offsets:
            self.page_offsets[idstr] = np.zeros(block.page_count, np.uint64)
        self._offsets = self.page_offsets[idstr]

    def _page(self, block_offset: int, file_offset: int) -> int:
        """The page at ``block_offset`` of the block at hand; ``file_offset`` is the record's."""
        if self._block is None:
            raise CheckpointError("the first record of a RAM page names no block", file_offset)
        if block_offset >= self._block.used_length:
            text = f"page at {block_offset:#x} is outside of RAM block {quote_idstr(self._block.idstr)}"
            raise CheckpointError(text, file_offset)
        return block_offset // self._page_size
