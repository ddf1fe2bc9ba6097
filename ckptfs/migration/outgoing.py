"""The plan of a save: which pages go out together, and which of them are zero."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ckptfs.mapped_ram.bitmap import PagesBitmap, Run

CHUNK_PAGES = 256
"""Pages of one payload (1 MiB of 4 KiB pages); a multiple of 64: channels share no word of a bitmap."""


def page_chunks(pages: PagesBitmap) -> Iterator[tuple[Run, ...]]:
    """Cut the set pages into chunks: the runs inside one aligned window of `CHUNK_PAGES`, in order."""
    chunk: list[Run] = []
    for run in pages.runs():
        start = run.start
        while start < run.stop:
            stop = min(run.stop, (start // CHUNK_PAGES + 1) * CHUNK_PAGES)
            if chunk and chunk[0].start // CHUNK_PAGES != start // CHUNK_PAGES:
                yield tuple(chunk)
                chunk = []
            chunk.append(Run(start, stop))
            start = stop
    if chunk:
        yield tuple(chunk)


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
