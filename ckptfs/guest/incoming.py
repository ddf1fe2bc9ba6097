"""Bringing pages in before anybody asks for them.

Readers always go first: these payloads are not urgent, and no more of them wait than there are channels.
"""

from collections.abc import Iterator

import trio

from ckptfs.guest.base import Base
from ckptfs.guest.block import GuestBlock
from ckptfs.guest.outgoing import Progress
from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.migration.outgoing import page_chunks


async def restore_blocks(base: Base, blocks: list[GuestBlock], channel_count: int, progress: Progress) -> None:
    """Read every page that only the base has into a layer of its own, ``restored``.

    After it the backing file is not needed any more. A page that can't be read raises BadPagesError, after
    all other pages of its block's chunks under way have come in.
    """
    chunks = ((block, run) for block in blocks for run in _missing(block))

    async def restore_chunks() -> None:
        for block, run in chunks:
            restored = block.stack.restored
            assert restored is not None
            await base.read_into(block.idstr, run, restored.view(*run), block.page_size)
            restored.present.set(*run)
            block.received.set(*run)
            progress.normal_pages += run.stop - run.start
            progress.remaining_pages -= run.stop - run.start

    for block in blocks:
        block.hold_restored()
    progress.remaining_pages = sum(_missing_pages(block).count() for block in blocks)
    progress.total_pages = sum(block.page_count for block in blocks)
    async with trio.open_nursery() as nursery:
        for _ in range(channel_count):
            nursery.start_soon(restore_chunks)


def _missing(block: GuestBlock) -> Iterator[Run]:
    """The pages that the base has and no layer holds for good, in runs no longer than a chunk."""
    for runs in page_chunks(_missing_pages(block)):
        yield from runs


def _missing_pages(block: GuestBlock) -> PagesBitmap:
    base, restored = block.stack.base, block.stack.restored
    assert base is not None
    assert restored is not None
    return base.file_bmap.difference(restored.present)
