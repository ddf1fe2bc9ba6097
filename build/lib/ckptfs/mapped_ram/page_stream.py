"""A plain migration stream while it comes: bytes in, pages out, and everything else kept for the end.

QEMU writes such a stream into a pipe (background-snapshot, or precopy while the guest runs): pages in any order,
perhaps more than once, and then the device state. Nothing waits for the end but that: pages are handed on as they
come, and what is left over, ``rest``, is the same stream without its pages. `precopy.read_precopy` reads it.

Records of one kind that follow each other are told apart by numpy, without looking at the pages.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.ram_section import read_block_list, read_ram_start, read_ram_start_end
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.stream import (
    RAM_CONTINUE,
    RAM_EOS,
    RAM_PAGE,
    RAM_ZERO,
    BytesSource,
    Cursor,
    SectionType,
    StreamHeader,
    decode_idstr,
    encode_footer,
    is_mapped_ram,
    quote_idstr,
    read_stream_header,
)

MAX_HEAD_LENGTH = 16 << 20
"""Bytes up to the end of the list of blocks, or of an early section."""

BATCH_LENGTH = 1 << 20
_LONGEST_BATCH = 1 << 16


@dataclass(frozen=True)
class PageBatch:
    """Pages of one block, each of them once: their numbers, and an array of (pages, page_size) bytes.

    ``content`` is None for pages of zeros.
    """

    idstr: str
    pages: npt.NDArray[np.int64]
    content: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class Head:
    """What a stream begins with: all that has to be known to lay out a file of its pages."""

    header: StreamHeader
    ram_section_id: int
    footers: bool
    blocks: tuple[RAMBlock, ...]


class PageStream:
    """Takes a stream apart; ``head`` is None until that much has come."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.rest = bytearray()
        self._buffer = b""
        self._position = 0
        self._passed = 0  # bytes of the stream before the buffer
        self._blocks: dict[str, RAMBlock] = {}
        self._block: RAMBlock | None = None
        self._step = self._take_head
        self._has_pages = False
        self._ends = False
        self._batch: PageBatch | None = None

    def feed(self, data: bytes | bytearray) -> Iterator[PageBatch]:
        """Take more of the stream, and give the pages that are whole by now; to be iterated to its end.

        Raises CheckpointError, with the position in the stream, for what is no sound stream of pages.
        """
        self._passed += self._position
        self._buffer = self._buffer[self._position :] + data
        self._position = 0
        while self._step():
            if self._batch is not None:
                yield self._batch
                self._batch = None

    def _take_head(self) -> bool:
        """Stream header, configuration, and the RAM section's START, once all of it is there."""
        cursor = Cursor(BytesSource(self._buffer), 0)
        try:
            header = read_stream_header(cursor)
            if is_mapped_ram(header):
                raise CheckpointError("this is a mapped-ram stream, not a plain one", 0)
            ram_section_id = read_ram_start(cursor)
            blocks = read_block_list(cursor, header)
            footers = read_ram_start_end(cursor, ram_section_id)
        except CheckpointError:
            if len(self._buffer) > MAX_HEAD_LENGTH:
                raise
            return False  # it goes on, or `read_precopy` says at the end what is wrong with it
        if cursor.position >= len(self._buffer):
            return False  # whether there is a footer can't be told yet
        self.head = Head(header, ram_section_id, footers, blocks)
        self._blocks = {block.idstr: block for block in blocks}
        self._keep(cursor.position)
        self._step = self._take_section
        return True

    def _take_section(self) -> bool:
        """A section's header; whatever comes after the pages is the device state."""
        assert self.head is not None
        kind, ram_section_id = self._buffer[self._position : self._position + 1], self.head.ram_section_id
        if not kind:
            return False
        if kind[0] in (SectionType.PART, SectionType.END):
            return self._take_ram_section(kind[0])
        if kind[0] == SectionType.COMMAND:
            header = self._peek(5)
            return header is not None and self._keep(5 + int.from_bytes(header[3:]))
        if kind[0] == SectionType.FULL and not self._has_pages:  # virtio-mem: it ends where the pages begin
            ram = bytes([SectionType.PART]) + ram_section_id.to_bytes(4)
            found = self._buffer.find(ram, self._position)
            while found >= 0 and self._buffer[found - 5] != SectionType.FOOTER:
                found = self._buffer.find(ram, found + 1)
            if found < 0 and len(self._buffer) - self._position > MAX_HEAD_LENGTH:
                raise self._error("an early section does not end")
            return found >= 0 and self._keep(found - self._position)
        self._step = self._take_rest
        return True

    def _take_ram_section(self, kind: int) -> bool:
        assert self.head is not None
        header = self._peek(5)
        if header is None:
            return False
        if int.from_bytes(header[1:]) != self.head.ram_section_id:
            raise self._error("another iterable section than the RAM: such a machine can't be captured like this")
        self._ends = kind == SectionType.END
        self._has_pages = True
        self._step = self._take_records
        return self._keep(5)

    def _take_records(self) -> bool:
        """Some records of pages, or the section's end."""
        assert self.head is not None
        page_size = self.head.header.page_size
        header = self._peek(8)
        if header is None:
            return False
        word = int.from_bytes(header)
        if word == RAM_EOS:
            footer = encode_footer(self.head.ram_section_id, footers=self.head.footers)
            end = self._peek(8 + len(footer))
            if end is None:
                return False
            if end[8:] != footer:
                raise self._error("the footer of a RAM section is missing or has another section id")
            self._step = self._take_rest if self._ends else self._take_section
            return self._keep(8 + len(footer))
        kind = word % page_size & ~RAM_CONTINUE
        if kind not in (RAM_PAGE, RAM_ZERO):
            raise self._error(f"Unexpected RAM flags {word % page_size:#x} in a plain stream")
        stride = 8 + (page_size if kind == RAM_PAGE else 1)
        if not word & RAM_CONTINUE:
            return self._take_first(word, kind, stride)
        available = (len(self._buffer) - self._position) // stride
        count = min(available, BATCH_LENGTH // page_size if kind == RAM_PAGE else _LONGEST_BATCH)
        if not count:
            return False
        records = np.frombuffer(self._buffer, np.uint8, count * stride, self._position).reshape(count, stride)
        words = records[:, :8].copy().view(">u8")[:, 0].astype(np.int64)
        alike = words & (page_size - 1) == (kind | RAM_CONTINUE)
        count = int(alike.argmin()) if not alike.all() else count
        self._hand_on(kind, words[:count] // page_size, records[:count, 8:])
        self._position += count * stride
        return True

    def _take_first(self, word: int, kind: int, stride: int) -> bool:
        """A record that names its block."""
        assert self.head is not None
        named = self._peek(9)
        whole = None if named is None else self._peek(stride + 1 + named[8])
        if whole is None:
            return False
        idstr = decode_idstr(whole[9 : 9 + whole[8]])
        self._block = self._blocks.get(idstr)
        if self._block is None:
            raise self._error(f"a page of RAM block {quote_idstr(idstr)}, which is not in the list of blocks")
        page_size = self.head.header.page_size
        content = np.frombuffer(whole, np.uint8, offset=9 + whole[8]).reshape(1, -1)
        self._hand_on(kind, np.array([word // page_size], np.int64), content)
        self._position += len(whole)
        return True

    def _hand_on(self, kind: int, pages: npt.NDArray[np.int64], content: npt.NDArray[np.uint8]) -> None:
        if self._block is None:
            raise self._error("the first record of a RAM page names no block")
        if int(pages.min()) < 0 or int(pages.max()) >= self._block.page_count:
            raise self._error(f"a page is outside of RAM block {quote_idstr(self._block.idstr)}")
        if kind == RAM_ZERO and content.any():
            raise self._error("a page of zeros has another value")
        self._batch = PageBatch(self._block.idstr, pages, None if kind == RAM_ZERO else content)

    def _take_rest(self) -> bool:
        """All that comes after the pages."""
        self._keep(len(self._buffer) - self._position)
        return False

    def _peek(self, length: int) -> bytes | None:
        """The next bytes, or None if they have not come yet."""
        data = self._buffer[self._position : self._position + length]
        return data if len(data) == length else None

    def _keep(self, length: int) -> bool:
        """Pass over what is no page; False, with nothing done, if it has not come yet."""
        data = self._peek(length)
        if data is None:
            return False
        self.rest += data
        self._position += length
        return True

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(text, self._passed + self._position)
