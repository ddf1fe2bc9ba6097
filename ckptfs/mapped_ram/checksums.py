"""Checksums: of RAM, one for each window of a block, and of all that a mapped-ram file has beside pages.

They are the entries ``checksums`` and ``stream`` of a trailer; docs/format.md has them to the byte. One of RAM is
of what RAM holds, zeros included, and not of how a file stores it: a plain stream has the same as a mapped-ram
file. It is the lower half of XXH3 (64 bits), and `UNKNOWN` stands for none: docs/decisions/checksums.md says why.
They guard against damage, not against people.
"""

import struct
from collections.abc import Collection, Iterable, Mapping
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
ZEROS, UNKNOWN = 0, 1
"""In the place of a checksum: all of this window is zeros; there is no checksum of it."""

MIN_WINDOW_LENGTH = 64 << 10
"""Bytes: what a page that changes, or is read alone, has read with it."""

MAX_WINDOW_LENGTH = 1 << 20
_MAX_WINDOWS = 8 << 20
"""Of all blocks, while windows can still be longer: 32 MiB of checksums."""

_MAX_BLOCKS = 4096

_HASH = b"XXH3"
_HEADER = struct.Struct(">4sII")
_BLOCK = struct.Struct(">BQI")

Sums = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Checksums:
    """``windows`` has a block's checksums by idstr: one for every ``window_length`` bytes, and for what is left.

    Memory is touched only where there is more than zeros.
    """

    window_length: int
    windows: Mapping[str, Sums]

    @classmethod
    def of_zeros(cls, lengths: Mapping[str, int], window_length: int = MIN_WINDOW_LENGTH) -> "Checksums":
        """Those of blocks that are all zeros; ``lengths`` has their used_length by idstr.

        Windows are longer than ``window_length`` where there would be too many of them.
        """
        while window_length < MAX_WINDOW_LENGTH and sum(lengths.values()) > _MAX_WINDOWS * window_length:
            window_length *= 2
        return cls(window_length, {idstr: _zeros(length, window_length) for idstr, length in lengths.items()})

    @classmethod
    def parse(cls, payload: bytes, lengths: Mapping[str, int]) -> "Checksums | None":
        """What an entry tells of the blocks of ``lengths``; None if it can't be understood."""
        try:
            kind, window_length, count = _HEADER.unpack_from(payload)
            is_power = window_length & (window_length - 1) == 0
            if kind != _HASH or not is_power or not MIN_WINDOW_LENGTH <= window_length <= MAX_WINDOW_LENGTH:
                return None
            position, windows = _HEADER.size, {}
            for _ in range(min(count, _MAX_BLOCKS)):
                name_length, length, run_count = _BLOCK.unpack_from(payload, position)
                position += _BLOCK.size + name_length
                idstr = payload[position - name_length : position].decode("utf-8", "surrogateescape")
                runs = _numbers(payload, position, 2 * run_count).astype(np.int64).reshape(-1, 2)
                position += 8 * run_count
                known = _numbers(payload, position, int(runs[:, 1].sum()))
                position += 4 * known.size
                if lengths.get(idstr) == length:
                    windows[idstr] = _spread(runs, known, _zeros(length, window_length))
        except (struct.error, ValueError):
            return None
        return cls(window_length, windows) if position == len(payload) else None

    def entry(self, lengths: Mapping[str, int]) -> Entry:
        """The entry that tells them; ``lengths`` are used_lengths as in `of_zeros`."""
        parts = [_HEADER.pack(_HASH, self.window_length, len(self.windows))]
        for idstr, sums in self.windows.items():
            name = idstr.encode("utf-8", "surrogateescape")
            edges = np.flatnonzero(np.diff(sums != ZEROS, prepend=False, append=False)).reshape(-1, 2)
            runs = np.stack([edges[:, 0], edges[:, 1] - edges[:, 0]], axis=1)
            parts.append(_BLOCK.pack(len(name), lengths[idstr], len(runs)) + name)
            parts += [runs.astype(">u4").tobytes(), sums[sums != ZEROS].astype(">u4").tobytes()]
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
        for window, found in enumerate(sums_of(data, self.window_length), first):
            if sums[window] not in (UNKNOWN, found):
                wrong.append(Run(window * width, min((window + 1) * width, run.stop)))
        return wrong

    def known(self, idstrs: Collection[str]) -> tuple[int, int]:
        """How many windows of these blocks have a checksum, and how many there are."""
        sums = [self.windows[idstr] for idstr in idstrs if idstr in self.windows]
        return sum(int(np.count_nonzero(x != UNKNOWN)) for x in sums), sum(x.size for x in sums)


def _zeros(length: int, window_length: int) -> Sums:
    """The checksums of a block of zeros."""
    return np.zeros(-(-length // window_length), np.uint32)


def _numbers(payload: bytes, position: int, count: int) -> Sums:
    """Numbers of 4 bytes. Raises ValueError where there are not so many."""
    if count > (len(payload) - position) // 4:
        raise ValueError(count)
    return np.frombuffer(payload, ">u4", count, position).astype(np.uint32)


def _spread(runs: npt.NDArray[np.int64], known: Sums, sums: Sums) -> Sums:
    """Put ``known`` where ``runs`` (first window and count, each) say. Raises ValueError for runs that can't be."""
    starts, counts = runs[:, 0], runs[:, 1]
    stops = starts + counts
    if len(runs) and (not counts.all() or (starts[1:] < stops[:-1]).any() or stops[-1] > sums.size):
        raise ValueError("runs")
    sums[np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(known.size)] = known
    return sums


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


def sums_of(data: memoryview, window_length: int) -> list[int]:
    """The checksums of windows that hold ``data``; the last may be shorter than the others."""
    return [checksum(data[start : start + window_length]) for start in range(0, len(data), window_length)]


def checksum(data: memoryview) -> int:
    """The checksum of a window: `ZEROS` if it is all zeros, never `UNKNOWN`. Lets other threads run meanwhile."""
    found: int = xxhash.xxh3_64_intdigest(data)
    if found == _hash_of_zeros(len(data)):
        return ZEROS
    found &= 0xFFFFFFFF
    return found if found > UNKNOWN else found + 2


@lru_cache(maxsize=64)
def _hash_of_zeros(length: int) -> int:
    return xxhash.xxh3_64_intdigest(bytes(length))
