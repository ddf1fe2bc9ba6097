"""Comparing RAM: which pages differ, by block.

Pages that neither side has data for are equal, and not read. All others are read in windows, by a few threads:
numpy and the kernel let go of the GIL, so it goes as fast as the disk, or memory.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from ckptfs.api.blocks import Block
from ckptfs.api.memory import Memory
from ckptfs.errors import CommandError
from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.migration.outgoing import page_windows

_WORKERS = 4
_AHEAD = 16
"""Windows that are under way, or compared and not taken yet."""


@dataclass(frozen=True)
class Difference:
    """The pages of a block that differ. A page that one side does not have is none of them."""

    idstr: str
    page_size: int
    pages: PagesBitmap
    lengths: tuple[int, int]
    """Bytes of the block on either side."""

    def __bool__(self) -> bool:
        return self.lengths[0] != self.lengths[1] or self.pages.any(0, self.pages.page_count)


def common_blocks(a: Memory, b: Memory) -> list[tuple[Block, Block]]:
    """The blocks that both have. Raises CommandError where their pages are not of one size."""
    pairs = [(block, b.blocks[idstr]) for idstr, block in a.blocks.items() if idstr in b.blocks]
    for one, other in pairs:
        if one.page_size != other.page_size:
            raise CommandError(
                f"{one.idstr} has pages of {one.page_size} bytes in {a.path}, and of {other.page_size} in {b.path}"
            )
    return pairs


def compare(a: Block, b: Block, seen: Callable[[int], None] = lambda _: None) -> Difference:
    """Compare two blocks of one page size; ``seen`` is told how many more pages were.

    Raises what reading them does.
    """
    difference = Difference(a.idstr, a.page_size, PagesBitmap(min(a.page_count, b.page_count)), (len(a), len(b)))
    for window, differs in compared(a, b):
        difference.pages.set_mask(window.start, differs)
        seen(window.stop - window.start)
    return difference


def compared(a: Block, b: Block) -> Iterator[tuple[Run, npt.NDArray[np.bool_]]]:
    """Compare window after window: which of its pages differ. Pages in no window are zeros on both sides."""
    with ThreadPoolExecutor(_WORKERS) as workers:
        windows = page_windows(with_data(a, b), a.page_size)
        begun = ((window, workers.submit(_differing, a, b, window)) for window in windows)
        under_way = deque(islice(begun, _AHEAD))
        try:
            while under_way:
                window, future = under_way.popleft()
                under_way.extend(islice(begun, 1))
                yield window, future.result()
        finally:
            workers.shutdown(cancel_futures=True)


def with_data(a: Block, b: Block) -> PagesBitmap:
    """The pages of both blocks that either has data for."""
    count = min(a.page_count, b.page_count)
    return a.with_data.resized(count).union(b.with_data.resized(count))


def _differing(a: Block, b: Block, window: Run) -> npt.NDArray[np.bool_]:
    one, other = (block.read_pages(*window).view(np.uint64) for block in (a, b))
    differs: npt.NDArray[np.bool_] = (one != other).reshape(window.stop - window.start, -1).any(axis=1)
    return differs
