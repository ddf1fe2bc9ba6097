"""Pages held in memory."""

import contextlib
import mmap
import os
from collections.abc import Sequence

import trio

from ckptfs.mapped_ram.bitmap import PagesBitmap, Run

_MOVE_LENGTH = 1 << 24


class Layer:
    """Some pages of a RAM block, held in a sparse memfd; ``present`` says which.

    Written through the descriptor, so that a lack of memory is an errno and not a SIGBUS; read through a
    mapping, so that pages go out by FUSE and by O_DIRECT without a copy.
    """

    def __init__(self, idstr: str, page_count: int, page_size: int) -> None:
        self._page_size = page_size
        self.present = PagesBitmap(page_count)
        length = page_count * page_size
        self._fd = os.memfd_create(f"ckptfs:{idstr[:200]}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, length)
            # no mapping can be empty: a block that has no size yet has one of nothing
            self._memory = mmap.mmap(self._fd, length) if length else mmap.mmap(-1, mmap.PAGESIZE)
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._memory)
        with contextlib.suppress(OSError):  # a kernel without huge pages refuses to do without them
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
            self._memory.madvise(mmap.MADV_DONTDUMP)

    def store(self, block_offset: int, data: bytes | memoryview) -> None:
        """Write ``data`` and mark its pages present; pages written in part must be present already.

        Raises OSError (ENOSPC, ENOMEM) when memory runs out; nothing is marked then.
        """
        rest = memoryview(data)
        position = block_offset
        while rest:
            count = os.pwrite(self._fd, rest, position)
            position += count
            rest = rest[count:]
        self.present.set(block_offset // self._page_size, -(-position // self._page_size))

    def view(self, start: int, stop: int) -> memoryview:
        """Return the bytes of pages [start, stop), all of them present; no copy."""
        return self._view[start * self._page_size : stop * self._page_size]

    def discard(self, start: int, stop: int) -> None:
        """Forget pages [start, stop) and give their memory back, as far as it is whole pages of the host."""
        self.present.clear(start, stop)
        first = -(-start * self._page_size // mmap.PAGESIZE) * mmap.PAGESIZE
        last = stop * self._page_size // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._memory.madvise(mmap.MADV_REMOVE, first, last - first)

    def absorb_some(self, upper: "Layer") -> bool:
        """Move up to 16 MiB of ``upper``'s pages into this layer; return whether any were left to move."""
        budget = _MOVE_LENGTH // self._page_size
        for run in _first_runs(upper.present, budget):
            self.store(run.start * self._page_size, upper.view(*run))
            upper.discard(*run)
        return upper.present.any(0, upper.present.page_count)

    def close(self) -> None:
        """Give the memory back (`close_layers` if it may be much); views that are out keep theirs."""
        self._view.release()
        with contextlib.suppress(BufferError):  # views are out
            self._memory.close()
        del self._memory
        os.close(self._fd)  # last: this frees the pages, and holds neither the GIL nor the lock on our mappings


async def close_layers(layers: Sequence[Layer]) -> None:
    """Give much memory back: a gigabyte takes the kernel a tenth of a second, so that is a worker thread's work."""
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(_close, layers)


def _close(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.close()


def _first_runs(bitmap: PagesBitmap, budget: int) -> list[Run]:
    """Return the first runs of set pages, ``budget`` pages at the most."""
    runs = []
    for run in bitmap.runs():
        runs.append(Run(run.start, min(run.stop, run.start + budget)))
        budget -= runs[-1].stop - runs[-1].start
        if budget <= 0:
            break
    return runs
