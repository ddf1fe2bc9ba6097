"""The plan of a save: which pages go out together, and which of them are zero."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ckptfs.mapped_ram.bitmap import PagesBitmap, Run

WINDOW_LENGTH = 1 << 20
"""Bytes of RAM that a payload carries at the most: 256 pages of 4 KiB."""

_SEGMENT_PAGES = 1 << 18


def page_windows(pages: PagesBitmap, page_size: int) -> Iterator[Run]:
    """Cut a block into aligned windows of `WINDOW_LENGTH`, and give those with set pages.

    Each reaches from its first set page to its last one. Windows share no byte of a bitmap.
    """
    width = WINDOW_LENGTH // page_size
    for first in range(0, pages.page_count, _SEGMENT_PAGES):
        stop = min(first + _SEGMENT_PAGES, pages.page_count)
        if not pages.any(first, stop):
            continue
        bits = pages.expand(first, stop)
        windows = np.pad(bits, (0, -bits.size % width)).reshape(-1, width)
        used = np.flatnonzero(windows.any(axis=1))
        windows = windows[used]
        starts = first + used * width + windows.argmax(axis=1)
        stops = first + (used + 1) * width - windows[:, ::-1].argmax(axis=1)
        yield from map(Run, starts.tolist(), stops.tolist())


def nonzero_pages(data: npt.NDArray[np.uint8], page_size: int) -> npt.NDArray[np.bool_]:
    """Tell for each page of ``data`` (whole pages, 8-byte aligned) whether any byte of it is not zero.

    Four words of each page are looked at first: only pages that are zero there are read as a whole.
    """
    words = data.view(np.uint64).reshape(-1, page_size // 8)
    quarter = words.shape[1] // 4
    nonzero = np.asarray((words[:, ::quarter] != 0).any(axis=1))
    suspects = np.flatnonzero(~nonzero)
    if len(suspects):
        nonzero[suspects] = words.any(axis=1) if len(suspects) == len(words) else words[suspects].any(axis=1)
    return nonzero


def coalesce(mask: npt.NDArray[np.bool_]) -> list[Run]:
    """Return the runs of True."""
    if len(mask) and mask.all():
        return [Run(0, len(mask))]
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [Run(start, stop) for start, stop in edges.reshape(-1, 2).tolist()]
