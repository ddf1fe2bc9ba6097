"""Pages as a picture: what each part of memory holds, in cells of one colour, by address.

Cells are pages, or as many of them as fit the room. A cell's colour is mixed of what its pages are, and half of it
is that of a written or a different page, if there is one: so a single page can be seen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ckptfs.api.blocks import Block
from ckptfs.api.compare import common_blocks, compare
from ckptfs.api.memory import Memory, MountedMemory
from ckptfs.errors import CkptfsError, CommandError
from ckptfs.physical.memory_map import Region

Cells = npt.NDArray[np.uint8]

_NEIGHBOURS = 16 << 20
"""Regions that are no farther apart than this are shown in one piece: a PC's legacy hole is no gap."""

_SMALL = 1 << 20
"""Blocks below this size (ROMs, tables) are not shown beside main memory."""


class Kind(IntEnum):
    """What a page is; the first four are the numbers of pages/."""

    ZERO = 0
    STORED = 1
    READ = 2
    WRITTEN = 3
    EQUAL = 4
    DIFFERENT = 5
    NOTHING = 6


COLOURS: dict[Kind, tuple[int, int, int]] = {
    Kind.ZERO: (28, 32, 44),
    Kind.STORED: (64, 110, 180),
    Kind.READ: (80, 190, 120),
    Kind.WRITTEN: (240, 120, 50),
    Kind.EQUAL: (64, 110, 180),
    Kind.DIFFERENT: (235, 70, 70),
    Kind.NOTHING: (120, 120, 120),
}
"""Red, green, blue."""

WORDS = {
    Kind.ZERO: "zeros",
    Kind.STORED: "in the checkpoint",
    Kind.READ: "read",
    Kind.WRITTEN: "written",
    Kind.EQUAL: "equal",
    Kind.DIFFERENT: "different",
    Kind.NOTHING: "no RAM",
}

_PALETTE = np.array([COLOURS[kind] for kind in Kind], np.float64)
_RARE = [Kind.WRITTEN, Kind.DIFFERENT]
_LEAST = 0.55
"""What a cell has of a rare kind if a single page is of it."""


@dataclass(frozen=True)
class Part:
    """A piece of memory without a gap: the `Kind` of each page from ``start`` on."""

    name: str
    start: int
    page_size: int
    kinds: Cells


@dataclass(frozen=True)
class Row:
    """One line of cells; ``address`` is that of the first, ``name`` is set in the first row of a part."""

    address: int
    name: str | None
    colours: npt.NDArray[np.uint8]
    """(cells, 3), red, green, blue; fewer than the picture is wide only in the last row of a part."""
    kinds: Cells
    """The `Kind` that counts most in each cell."""


@dataclass(frozen=True)
class Picture:
    """A picture of ``columns`` cells in rows; a cell stands for ``cell_length`` bytes."""

    title: str
    columns: int
    cell_length: int
    rows: tuple[Row, ...]
    kinds: Mapping[Kind, int]
    """How many pages there are of each kind that it shows."""


def parts_of(memory: Memory, other: Memory | None = None) -> list[Part]:
    """The parts of one memory, or of what differs between two, in the order of their addresses.

    Where RAM lies is asked of the first; where that is not known, each block is a part by itself. Raises
    CommandError for what a map by the user has wrong.
    """
    kinds = _states(memory) if other is None else _differences(memory, other)
    try:
        regions: Sequence[Region] = memory.physical.regions
    except CommandError:
        raise
    except (CkptfsError, OSError):
        regions = ()
    shown = [region for region in regions if region.idstr in kinds]
    parts = [_joined(cluster, memory.blocks, kinds) for cluster in _clusters(shown)]
    rest = [idstr for idstr in kinds if all(region.idstr != idstr for region in shown)]
    large = [idstr for idstr in rest if not parts or len(memory.blocks[idstr]) >= _SMALL]
    return parts + [Part(idstr, 0, memory.blocks[idstr].page_size, kinds[idstr]) for idstr in large]


def draw(title: str, parts: Sequence[Part], columns: int, most_rows: int) -> Picture:
    """Scale parts into ``columns`` cells and, if that can be, no more than ``most_rows`` rows."""
    parts = [part for part in parts if part.kinds.size]
    cell_length = max([part.page_size for part in parts], default=1)
    while len(parts) < sum(_row_count(part, cell_length * columns) for part in parts) > most_rows:
        cell_length *= 2
    rows = tuple(row for part in parts for row in _rows(part, columns, cell_length))
    counts = sum((np.bincount(part.kinds, minlength=len(Kind)) for part in parts), np.zeros(len(Kind), np.int64))
    kinds: dict[Kind, int] = {kind: int(counts[kind]) for kind in Kind if counts[kind] and kind != Kind.NOTHING}
    return Picture(title, columns, cell_length, rows, kinds)


def _states(memory: Memory) -> dict[str, Cells]:
    if isinstance(memory, MountedMemory):
        return memory.states()
    return {idstr: block.with_data.expand(0, block.page_count) for idstr, block in memory.blocks.items()}


def _differences(memory: Memory, other: Memory) -> dict[str, Cells]:
    return {block.idstr: _compared(block, against) for block, against in common_blocks(memory, other)}


def _compared(block: Block, against: Block) -> Cells:
    """A page that only one of them has is different."""
    kinds = np.full(block.page_count, Kind.DIFFERENT, np.uint8)
    difference = compare(block, against).pages
    count = difference.page_count
    common = block.with_data.resized(count).union(against.with_data.resized(count)).expand(0, count)
    kinds[:count] = np.where(common, Kind.EQUAL, Kind.ZERO)
    kinds[:count][difference.expand(0, count) != 0] = Kind.DIFFERENT
    return kinds


def _clusters(regions: Sequence[Region]) -> Iterator[list[Region]]:
    if not regions:
        return
    cluster = [regions[0]]
    for former, region in pairwise(regions):
        if region.start - former.stop > _NEIGHBOURS:
            yield cluster
            cluster = []
        cluster.append(region)
    yield cluster


def _joined(cluster: Sequence[Region], blocks: Mapping[str, Block], kinds: Mapping[str, Cells]) -> Part:
    page_size = min(blocks[region.idstr].page_size for region in cluster)
    start = cluster[0].start
    joined = np.full((cluster[-1].stop - start) // page_size, Kind.NOTHING, np.uint8)
    for region in cluster:
        size = blocks[region.idstr].page_size
        pages = kinds[region.idstr][region.block_offset // size : (region.block_offset + region.length) // size]
        first = (region.start - start) // page_size
        joined[first : first + region.length // page_size] = np.repeat(pages, size // page_size)
    names = dict.fromkeys(region.idstr for region in cluster)
    return Part(", ".join(names), start, page_size, joined)


def _row_count(part: Part, row_length: int) -> int:
    return -(-part.kinds.size * part.page_size // row_length)


def _rows(part: Part, columns: int, cell_length: int) -> Iterator[Row]:
    shares = _shares(part.kinds, cell_length // part.page_size)
    colours = np.rint(shares @ _PALETTE).astype(np.uint8)
    kinds = shares.argmax(axis=1).astype(np.uint8)
    for first in range(0, len(colours), columns):
        cells = slice(first, first + columns)
        name = part.name if first == 0 else None
        yield Row(part.start + first * cell_length, name, colours[cells], kinds[cells])


def _shares(kinds: Cells, pages: int) -> npt.NDArray[np.float64]:
    """How much each kind counts in each cell of so many pages, 1 altogether; one rare page counts for half."""
    starts = np.arange(0, kinds.size, pages)
    counts = np.stack([np.add.reduceat(kinds == kind, starts, dtype=np.float64) for kind in Kind], axis=1)
    shares: npt.NDArray[np.float64] = counts / counts.sum(axis=1, keepdims=True)
    rare = shares[:, _RARE].sum(axis=1, keepdims=True)
    shown = np.where(rare > 0, np.maximum(rare, _LEAST), 0)
    others = np.divide(1 - shown, 1 - rare, out=np.zeros_like(rare), where=rare < 1)
    factors = np.repeat(others, len(Kind), axis=1)
    factors[:, _RARE] = np.divide(shown, rare, out=np.zeros_like(rare), where=rare > 0)
    shares *= factors
    return shares
