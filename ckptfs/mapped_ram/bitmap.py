"""One bit a page: the only place that knows bit order.

A file_bmap in a mapped-ram file is QEMU's own ``unsigned long`` bitmap (``include/qemu/bitmap.h``): page *i*
is bit ``i % 64`` of word ``i // 64``, and the words have the byte order of the host that wrote them. In
memory the words are always little-endian, so that page *i* is also bit ``i & 7`` of byte ``i >> 3``.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Byteorder = Literal["little", "big"]

SEGMENT_WORDS = 1 << 14
"""Runs are looked for in segments of this many words: 128 KiB of bitmap, 1 Mi pages."""


_FEW_PAGES = 256


class Run(NamedTuple):
    """Pages ``start`` up to but not including ``stop``."""

    start: int
    stop: int


def bitmap_length(page_count: int) -> int:
    """Bytes of a bitmap of ``page_count`` pages: whole 64-bit words, as QEMU pads it on a 64-bit host."""
    return (page_count + 63) // 64 * 8


class PagesBitmap:
    """A bitmap of ``page_count`` pages, all clear at first.

    Memory is touched only where bits get set: an empty bitmap of a 1 TiB block costs next to nothing. Methods
    that take ``start`` and ``stop`` raise IndexError unless ``0 <= start <= stop <= page_count``. Several
    threads may change one bitmap as long as their ranges share no byte.
    """

    __slots__ = ("_bytes", "_view", "_words", "changes", "page_count")

    def __init__(self, page_count: int) -> None:
        self.page_count = page_count
        self.changes = 0
        """Grows whenever a bit may have changed: what was worked out from them holds as long as it stays."""
        self._words: npt.NDArray[np.uint64] = np.zeros(bitmap_length(page_count) // 8, dtype="<u8")
        self._bytes: npt.NDArray[np.uint8] = self._words.view(np.uint8)
        self._view = memoryview(self._bytes.data)  # several times faster than numpy for a single byte

    @classmethod
    def from_bytes(cls, data: bytes, page_count: int, byteorder: Byteorder = "little") -> "PagesBitmap":
        """The bitmap that ``data`` holds, all of it.

        Raises ValueError if ``data`` is not exactly ``bitmap_length(page_count)`` bytes, or sets a bit past
        the last page.
        """
        bitmap = cls(page_count)
        if len(data) != bitmap._bytes.size:
            raise ValueError(f"a bitmap of {page_count} pages is {bitmap._bytes.size} bytes, not {len(data)}")
        bitmap.load(0, data, byteorder)
        return bitmap

    def load(self, byte_offset: int, data: bytes, byteorder: Byteorder = "little") -> None:
        """Overwrite the words from ``byte_offset`` on; offset and length are multiples of 8.

        Clear words are not written, so that a bitmap read piece by piece from a hole stays without memory.
        Raises ValueError if a bit past the last page is set.
        """
        self.changes += 1
        first = byte_offset // 8
        words = np.frombuffer(data, dtype="<u8" if byteorder == "little" else ">u8")
        target = self._words[first : first + words.size]
        if words.any() or target.any():
            target[:] = words
        if first + words.size == self._words.size and self._tail():
            raise ValueError(f"a bit past the last page ({self.page_count - 1}) is set")

    def to_bytes(self, byteorder: Byteorder = "little") -> bytes:
        """The bitmap as a host of that byte order keeps it: ``bitmap_length(page_count)`` bytes."""
        return self._words.tobytes() if byteorder == "little" else self._words.astype(">u8").tobytes()

    def set(self, start: int, stop: int) -> None:
        """Set the bits of pages ``start`` to ``stop``."""
        self._check(start, stop)
        if start == stop:
            return
        self.changes += 1
        first, head, last, tail = _bytes_of(start, stop)
        if first == last:
            self._view[first] |= head & tail
            return
        self._view[first] |= head
        self._bytes[first + 1 : last] = 0xFF
        self._view[last] |= tail

    def add(self, other: "PagesBitmap", start: int, stop: int) -> None:
        """Set those of the pages ``start`` to ``stop`` that are set in ``other``, which has the same page_count."""
        self._check(start, stop)
        if start == stop:
            return
        self.changes += 1
        first, head, last, tail = _bytes_of(start, stop)
        if first == last:
            self._view[first] |= other._view[first] & head & tail
            return
        self._view[first] |= other._view[first] & head
        self._bytes[first + 1 : last] |= other._bytes[first + 1 : last]
        self._view[last] |= other._view[last] & tail

    def clear(self, start: int, stop: int) -> None:
        """Clear the bits of pages ``start`` to ``stop``."""
        self._check(start, stop)
        if start == stop:
            return
        self.changes += 1
        first, head, last, tail = _bytes_of(start, stop)
        if first == last:
            self._view[first] &= ~(head & tail) & 0xFF
            return
        self._view[first] &= ~head & 0xFF
        self._bytes[first + 1 : last] = 0
        self._view[last] &= ~tail & 0xFF

    def set_mask(self, start: int, mask: npt.NDArray[np.bool_]) -> None:
        """Set page ``start + i`` wherever ``mask[i]``, and leave all others.

        Touches no byte outside the range when ``start`` and the mask's length are multiples of 8.
        """
        self._check(start, start + mask.size)
        self.changes += 1
        aligned = start & ~7
        if aligned != start:
            mask = np.concatenate([np.zeros(start - aligned, dtype=np.bool_), mask])
        packed = np.packbits(mask, bitorder="little")
        self._bytes[aligned >> 3 : (aligned >> 3) + packed.size] |= packed

    def clear_all(self) -> None:
        """Clear every bit."""
        self.changes += 1
        self._words[:] = 0

    def test(self, page: int) -> bool:
        """Whether the page's bit is set."""
        self._check(page, page + 1)
        return bool(self._view[page >> 3] >> (page & 7) & 1)

    def any(self, start: int, stop: int) -> bool:
        """Whether at least one of the pages is set."""
        return start != stop and self.run_at(start, stop) != (False, stop)

    def all(self, start: int, stop: int) -> bool:
        """Whether every one of the pages is set (true of no pages)."""
        return start == stop or self.run_at(start, stop) == (True, stop)

    def count(self, start: int = 0, stop: int | None = None) -> int:
        """How many of the pages are set."""
        stop = self.page_count if stop is None else stop
        self._check(start, stop)
        if start == stop:
            return 0
        first, last = start // 64, (stop - 1) // 64
        before = int(self._words[first]) & ~(_ALL_BITS << start % 64)
        after = int(self._words[last]) & ~(_ALL_BITS >> -stop % 64)
        whole = int(np.bitwise_count(self._words[first : last + 1]).sum(dtype=np.int64))
        return whole - before.bit_count() - after.bit_count()

    def any_of_each(self, width: int) -> npt.NDArray[np.bool_]:
        """For every ``width`` pages, and for what is left of them at the end, whether any is set."""
        if width in (16, 32, 64):  # as numbers of that many bits: a tenth of the time
            words = self._words.view(np.dtype(f"<u{width // 8}"))
            return np.asarray(words[: -(-self.page_count // width)] != 0)
        result = np.zeros(-(-self.page_count // width), np.bool_)
        segment = width * max(1, SEGMENT_WORDS * 64 // width)
        for start in range(0, self.page_count, segment):
            stop = min(start + segment, self.page_count)
            if self.any(start, stop):
                bits = np.pad(self.expand(start, stop), (0, (start - stop) % width))
                result[start // width : -(-stop // width)] = bits.reshape(-1, width).any(axis=1)
        return result

    def run_at(self, page: int, stop: int) -> tuple[bool, int]:
        """Whether ``page`` is set, and where the uniform run that begins there ends (``stop`` at the latest).

        Looks at some 500 pages first, and at more and more at a time as long as they are uniform. Raises
        IndexError for an empty range.
        """
        self._check(page, stop)
        if page == stop:
            raise IndexError(f"no page in [{page}, {stop})")
        if stop - page == 1:
            return bool(self._view[page >> 3] >> (page & 7) & 1), stop
        byte_stop = (stop + 7) >> 3
        position = min((page >> 3) + 64, byte_stop)
        near = int.from_bytes(self._view[page >> 3 : position], "little") >> (page & 7)
        is_set = bool(near & 1)
        differs = ~near if is_set else near
        end = page + _lowest_bit(differs) if differs else stop
        if end < 8 * position:
            return is_set, min(end, stop)
        uniform, length = 0xFF if is_set else 0, 512
        while position < byte_stop:
            segment = self._bytes[position : min(position + length, byte_stop)] != uniform
            index = int(segment.argmax())
            if segment[index]:
                position += index
                return is_set, min(8 * position + _lowest_bit(self._view[position] ^ uniform), stop)
            position, length = position + segment.size, min(8 * length, 8 * SEGMENT_WORDS)
        return is_set, stop

    def runs(self, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """The runs of set pages, in order, found a segment at a time as they are asked for.

        Bits that change in a part already passed are not seen. The cost is a few passes over the words of the
        range, and one step for each run.
        """
        stop = self.page_count if stop is None else stop
        self._check(start, stop)
        if stop - start <= _FEW_PAGES:
            yield from self._few_runs(start, stop)
            return
        run_start = -1  # the start of a run that reaches into the segment at hand
        for first in range(start // 64, (stop + 63) // 64, SEGMENT_WORDS):
            last = min(first + SEGMENT_WORDS, (stop + 63) // 64)
            words = self._words[first:last]
            if run_start < 0 and not words.any():
                continue
            if 64 * first < start or 64 * last > stop:
                words = words.copy()
                words[0] &= np.uint64(_ALL_BITS << max(start - 64 * first, 0) & _ALL_BITS)
                words[-1] &= np.uint64(_ALL_BITS >> max(64 * last - stop, 0))
            edges = _edges(words, carry=run_start >= 0) + 64 * first
            for edge in edges.tolist():
                if run_start < 0:
                    run_start = edge
                else:
                    yield Run(run_start, edge)
                    run_start = -1
        if run_start >= 0:
            yield Run(run_start, stop)

    def _few_runs(self, start: int, stop: int) -> Iterator[Run]:
        """The runs in a window as small as one read: a step for each costs less than a pass of numpy."""
        while start < stop:
            is_set, end = self.run_at(start, stop)
            if is_set:
                yield Run(start, end)
            start = end

    def expand(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """A fresh array of ``stop - start`` bytes: 1 for a set page, 0 for a clear one."""
        self._check(start, stop)
        bits = np.unpackbits(self._bytes[start >> 3 : (stop + 7) >> 3], bitorder="little")
        return bits[start & 7 : (start & 7) + stop - start]

    def copy(self) -> "PagesBitmap":
        """An independent bitmap of the same pages."""
        return self.resized(self.page_count)

    def union(self, other: "PagesBitmap") -> "PagesBitmap":
        """The pages that are set in this bitmap or in ``other``, which has the same page_count."""
        result = self.copy()
        result._words |= other._words
        return result

    def difference(self, other: "PagesBitmap") -> "PagesBitmap":
        """The pages that are set in this bitmap and not in ``other``, which has the same page_count."""
        result = self.copy()
        result._words &= ~other._words
        return result

    def resized(self, page_count: int) -> "PagesBitmap":
        """A copy with another page_count: further pages are clear, pages past the end are forgotten."""
        result = PagesBitmap(page_count)
        common = min(self._words.size, result._words.size)
        for first in range(0, common, SEGMENT_WORDS):
            segment = self._words[first : min(first + SEGMENT_WORDS, common)]
            if segment.any():
                result._words[first : first + segment.size] = segment
        if result._words.size:
            result._words[-1] &= ~np.uint64(result._tail())
        return result

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PagesBitmap):
            return NotImplemented
        return self.page_count == other.page_count and bool(np.array_equal(self._words, other._words))

    __hash__ = None  # type: ignore[assignment]  # a bitmap is mutable

    def __repr__(self) -> str:
        return f"<PagesBitmap {self.count()} of {self.page_count} pages>"

    def _tail(self) -> int:
        """The last word's bits past the last page."""
        used = self.page_count % 64
        return int(self._words[-1]) >> used << used if used else 0

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.page_count:
            raise IndexError(f"pages [{start}, {stop}) are not within {self.page_count}")


_ALL_BITS = (1 << 64) - 1


def _bytes_of(start: int, stop: int) -> tuple[int, int, int, int]:
    """The first and the last byte of a range that is not empty, each with the mask of its bits inside."""
    last = stop - 1
    return start >> 3, 0xFF << (start & 7) & 0xFF, last >> 3, 0xFF >> (7 - (last & 7))


def _edges(words: npt.NDArray[np.uint64], *, carry: bool) -> npt.NDArray[np.int64]:
    """The pages whose bit differs from the page's before; ``carry`` is the bit before the first word."""
    before = words << np.uint64(1)
    before[1:] |= words[:-1] >> np.uint64(63)
    before[0] |= np.uint64(carry)
    differs = words ^ before
    changed = np.flatnonzero(differs)
    bits = np.unpackbits(differs[changed].astype("<u8").view(np.uint8), bitorder="little").reshape(-1, 64)
    word, bit = np.nonzero(bits)
    return changed[word] * 64 + bit


def _lowest_bit(value: int) -> int:
    return (value & -value).bit_length() - 1
