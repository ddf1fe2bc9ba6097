"""Bringing pages in before anybody asks for them.

Readers always go first: these payloads are not urgent, and no more of them wait than there are channels.
"""

from collections.abc import Iterator

import trio

from ckptfs.guest.base import Base
from ckptfs.guest.block import GuestBlock
from ckptfs.guest.layer import Layer
from ckptfs.mapped_ram.bitmap import Run
from ckptfs.migration.outgoing import page_chunks


async def restore_blocks(base: Base, blocks: list[GuestBlock], channel_count: int) -> None:
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

    for block in blocks:
        block.hold_restored()
    async with trio.open_nursery() as nursery:
        for _ in range(channel_count):
            nursery.start_soon(restore_chunks)


def _missing(block: GuestBlock) -> Iterator[Run]:
    """The runs of pages that the base has and no layer holds for good, cut into chunks."""
    base, restored = block.stack.base, block.stack.restored
    assert base is not None
    assert isinstance(restored, Layer)
    for runs in page_chunks(base.file_bmap.difference(restored.present)):
        yield from runs
