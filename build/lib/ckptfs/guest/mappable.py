"""Whether RAM can be mapped as it lies in a mapped-ram file: only if every page whose bit is clear reads as zeros.

The bitmap decides what a page holds, not the file's bytes. QEMU leaves stale bytes below clear bits when its guest
ran while it was saved: a page that was written out, and was all zeros when it came again, keeps its former bytes in
the file and loses its bit (migration/ram.c, ram_save_file_bmap, 9.0). Whoever maps the file would see them.

Holes are passed over (lseek(2), SEEK_DATA), so this takes as long as there are bytes below clear bits.
"""

import errno
import os
from collections.abc import Iterator

import numpy as np

from ckptfs.channels.backing_file import pread
from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.migration.outgoing import nonzero_pages

_PIECE_LENGTH = 4 << 20


def stale_page(fd: int, block: RAMBlock, file_bmap: PagesBitmap) -> int | None:
    """Return the first page of ``block`` that the bitmap says is zeros and the file has other bytes for, or None.

    ``fd`` is the file; blocks, raises OSError.
    """
    assert block.pages_offset is not None
    everything = PagesBitmap(block.page_count)
    everything.set(0, block.page_count)
    clear = everything.difference(file_bmap)
    for stored in _stored(fd, block):
        for run in clear.runs(*stored):
            page = _first_nonzero(fd, block, run)
            if page is not None:
                return page
    return None


def _stored(fd: int, block: RAMBlock) -> Iterator[Run]:
    """The pages that are not all in holes of the file."""
    assert block.pages_offset is not None
    position, end = block.pages_offset, block.pages_offset + block.used_length
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                return
            raise
        if start >= end:
            return
        position = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        first = (start - block.pages_offset) // block.page_size
        yield Run(first, -(-(position - block.pages_offset) // block.page_size))


def _first_nonzero(fd: int, block: RAMBlock, run: Run) -> int | None:
    assert block.pages_offset is not None
    piece = _PIECE_LENGTH // block.page_size
    for start in range(run.start, run.stop, piece):
        length = (min(start + piece, run.stop) - start) * block.page_size
        data = np.frombuffer(pread(fd, length, block.pages_offset + start * block.page_size), np.uint8)
        nonzero = nonzero_pages(data, block.page_size)
        if nonzero.any():
            return start + int(nonzero.argmax())
    return None
