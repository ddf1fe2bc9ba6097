"""Bringing pages in before anybody asks for them.

Readers always go first: these payloads are not urgent, and no more of them wait than there are channels.
"""

import numpy as np
import trio

from ckptfs.guest.base import Base
from ckptfs.guest.block import GuestBlock
from ckptfs.guest.outgoing import Progress
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.migration.outgoing import page_windows


async def restore_blocks(base: Base, blocks: list[GuestBlock], channel_count: int, progress: Progress) -> None:
    """Read every page that only the base has into a layer of its own, ``restored``.

    After it the backing file is not needed any more. A page that can't be read raises BadPagesError.
    """
    for block in blocks:
        block.hold_restored()
    missing = [(block, _missing_pages(block)) for block in blocks]
    progress.remaining_pages = sum(pages.count() for _, pages in missing)
    progress.total_pages = sum(block.page_count for block in blocks)
    windows = (
        (block, pages, window) for block, pages in missing for window in page_windows(pages, block.page_size)
    )

    async def restore_windows() -> None:
        for block, pages, window in windows:
            restored = block.stack.restored
            assert restored is not None
            await base.read_into(block.idstr, list(pages.runs(*window)), restored.view, block.page_size)
            mask = pages.expand(*window).view(np.bool_)
            restored.present.set_mask(window.start, mask)
            block.received.set_mask(window.start, mask)
            progress.normal_pages += int(mask.sum())
            progress.remaining_pages -= int(mask.sum())

    async with trio.open_nursery() as nursery:
        for _ in range(channel_count):
            nursery.start_soon(restore_windows)


def _missing_pages(block: GuestBlock) -> PagesBitmap:
    base, restored = block.stack.base, block.stack.restored
    assert base is not None
    assert restored is not None
    return base.file_bmap.difference(restored.present)
