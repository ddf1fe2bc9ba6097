"""Checksums: of RAM, one for each window of a block, and of all that a mapped-ram file has beside pages.

They are the entries ``checksums`` and ``stream`` of a trailer; docs/format.md has them to the byte. One of RAM is
of what RAM holds, zeros included, and not of how a file stores it: a plain stream has the same as a mapped-ram
file. It is the lower half of XXH3 (64 bits), and `UNKNOWN` stands for none: docs/decisions/checksums.md says why.
They guard against damage, not against people.
"""

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from ckptfs.mapped_ram.bitmap import Run, bitmap_length
from ckptfs.mapped_ram.checkpoint import Checkpoint
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.stream import Source, quote_idstr
from ckptfs.mapped_ram.trailer import Depends, Entry, Trailer

NAME = "checksums"
STREAM_NAME = "stream"
UNKNOWN = 0
"""In the place of a checksum: there is none of this window."""

MIN_WINDOW_LENGTH = 64 << 10
"""Bytes: what a page that changes, or is read alone, has read with it."""

MAX_WINDOW_LENGTH = 1 << 20
_MAX_WINDOWS = 8 << 20
"""Of all blocks, while windows can still be longer: 32 MiB of checksums."""

_HASH = b"XXH3"
_HEADER = struct.Struct(">4sII")
_BLOCK = struct.Struct(">BQ")

Sums = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Checksums:
    """``windows`` has a block's checksums by idstr: one for every ``window_length`` bytes, and for what is left."""

    window_length: int
    windows: Mapping[str, Sums]

    @classmethod
    def of_zeros(cls, lengths: Mapping[str, int], window_length: int = MIN_WINDOW_LENGTH) -> "Checksums":
        """Those of blocks that are all zeros; ``lengths`` has their used_length by idstr.

        Windows are longer than ``window_length`` where there would be too many of them.
        """
        while window_length < MAX_WINDOW_LENGTH and sum(lengths.values()) > _MAX_WINDOWS * window_length:
            window_length *= 2
        windows = {}
        for idstr, length in lengths.items():
            whole, rest = divmod(length, window_length)
            windows[idstr] = np.full(whole + (rest > 0), _checksum_of_zeros(window_length), np.uint32)
            if rest:
                windows[idstr][-1] = _checksum_of_zeros(rest)
        return cls(window_length, windows)

    @classmethod
    def parse(cls, payload: bytes, lengths: Mapping[str, int]) -> "Checksums | None":
        """What an entry tells of the blocks of ``lengths``; None if it can't be understood."""
        try:
            kind, window_length, count = _HEADER.unpack_from(payload)
            position = _HEADER.size
            found = []
            for _ in range(min(count, len(payload))):
                name_length, length = _BLOCK.unpack_from(payload, position)
                position += _BLOCK.size + name_length
                idstr = payload[position - name_length : position].decode("utf-8", "surrogateescape")
                found.append((idstr, length))
        except struct.error:
            return None
        is_power = window_length & (window_length - 1) == 0
        if kind != _HASH or not is_power or not MIN_WINDOW_LENGTH <= window_length <= MAX_WINDOW_LENGTH:
            return None
        windows = {}
        for idstr, length in found:
            stop = position + -(-length // window_length) * 4
            if stop > len(payload):
                return None
            if lengths.get(idstr) == length:
                windows[idstr] = np.frombuffer(payload[position:stop], ">u4").astype(np.uint32)
            position = stop
        return cls(window_length, windows) if position == len(payload) else None

    def entry(self, lengths: Mapping[str, int]) -> Entry:
        """The entry that tells them; ``lengths`` are used_lengths as in `of_zeros`."""
        parts = [_HEADER.pack(_HASH, self.window_length, len(self.windows))]
        for idstr in self.windows:
            name = idstr.encode("utf-8", "surrogateescape")
            parts.append(_BLOCK.pack(len(name), lengths[idstr]) + name)
        parts += [sums.astype(">u4").tobytes() for sums in self.windows.values()]
        return Entry(NAME, b"".join(parts), Depends.RAM)

    def width(self, page_size: int) -> int:
        """Pages of a window."""
        return self.window_length // page_size

    def around(self, run: Run, page_size: int, page_count: int) -> Run:
        """The pages of all windows that ``run`` touches."""
        width = self.width(page_size)
        return Run(run.start // width * width, min(-(-run.stop // width) * width, page_count))

    def wrong(self, idstr: str, run: Run, data: memoryview, page_size: int) -> list[Run]:
        """The windows of ``run``, which is all of some windows and holds ``data``, that are not what they were."""
        sums = self.windows.get(idstr)
        if sums is None:
            return []
        width = self.width(page_size)
        first = run.start // width
        wrong = []
        for window, found in enumerate(self.sums_of(data), first):
            if sums[window] not in (UNKNOWN, found):
                wrong.append(Run(window * width, min((window + 1) * width, run.stop)))
        return wrong

    def sums_of(self, data: memoryview) -> Iterator[int]:
        """The checksums of windows that hold ``data``; the last may be shorter than the others."""
        for start in range(0, len(data), self.window_length):
            yield checksum(data[start : start + self.window_length])

    def known(self, idstrs: Collection[str]) -> tuple[int, int]:
        """How many windows of these blocks have a checksum, and how many there are."""
        sums = [self.windows[idstr] for idstr in idstrs if idstr in self.windows]
        return sum(int(np.count_nonzero(x)) for x in sums), sum(x.size for x in sums)


def checksums_in(trailer: Trailer, blocks: Iterable[RAMBlock]) -> Checksums | None:
    """What a checkpoint's trailer tells of its blocks; None if that is nothing."""
    payload = trailer.get(NAME)
    return None if payload is None else Checksums.parse(payload, {x.idstr: x.used_length for x in blocks})


class Part(NamedTuple):
    """Bytes [start, stop) of a mapped-ram file that are no pages; ``name`` says what they are."""

    name: str
    start: int
    stop: int


def parts_beside_pages(checkpoint: Checkpoint) -> list[Part]:
    """All that a mapped-ram file has beside pages, in its order: headers, bitmaps, sections."""
    parts = []
    position, name = checkpoint.stream_offset, "the stream's header"
    for block in checkpoint.blocks:
        if block.bitmap_offset is not None and block.pages_offset is not None:
            bitmap_stop = block.bitmap_offset + bitmap_length(block.page_count)
            parts.append(Part(name, position, block.bitmap_offset))
            parts.append(Part(f"the bitmap of {quote_idstr(block.idstr)}", block.bitmap_offset, bitmap_stop))
            position, name = block.pages_offset + block.used_length, "a block's header"
    parts.append(Part("what comes after RAM: device state and vmdesc", position, checkpoint.end_offset))
    return parts


def stream_entry(parts: Iterable[bytes]) -> Entry:
    """The entry for parts that hold these bytes."""
    sums = b"".join(checksum(memoryview(part)).to_bytes(4) for part in parts)
    return Entry(STREAM_NAME, _HASH + sums, Depends.FILE)


def wrong_parts(source: Source, checkpoint: Checkpoint, trailer: Trailer) -> list[Part]:
    """The parts of a mapped-ram file that are not what they were; none where the trailer does not tell."""
    payload, parts = trailer.get(STREAM_NAME), parts_beside_pages(checkpoint)
    if payload is None or payload[:4] != _HASH or len(payload) != 4 + 4 * len(parts):
        return []
    sums = [int.from_bytes(payload[at : at + 4]) for at in range(4, len(payload), 4)]
    contents = (source.pread(part.start, part.stop - part.start) for part in parts)
    return [
        part
        for part, former, data in zip(parts, sums, contents, strict=True)
        if checksum(memoryview(data)) != former
    ]


def checksum(data: memoryview) -> int:
    """The checksum of a window; never `UNKNOWN`. Lets other threads run meanwhile."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF or 1


@lru_cache(maxsize=64)
def _checksum_of_zeros(length: int) -> int:
    return checksum(memoryview(bytes(length)))
