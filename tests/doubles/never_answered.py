"""mount.ckptfs that never answers a READ of `PLACE`: `python never_answered.py DEADLINE SPEC DIR ...`.

So the lock of a page is never free, whatever the daemon does. DEADLINE, in seconds, is that of an eviction and of a
flush.
"""

import sys

import trio

from ckptfs.fuse import page_cache, settling
from ckptfs.guest.block import GuestBlock
from ckptfs.guest.guest import Guest

PLACE = 1 << 20


async def _read(guest: Guest, block: GuestBlock, block_offset: int, length: int) -> memoryview:
    if block_offset <= PLACE < block_offset + length:
        await trio.sleep_forever()
    return await _READ(guest, block, block_offset, length)


if __name__ == "__main__":
    _READ = Guest.read
    Guest.read = _read  # type: ignore[method-assign]
    page_cache.KERNEL_DEADLINE = settling.SETTLE_DEADLINE = float(sys.argv.pop(1))
    from ckptfs.cli.mount import main

    sys.exit(main())
