"""The checksums of a checkpoint that is being written: the base's where they still hold, or of what goes out.

A window that nobody has written since the base keeps its checksum, also where its pages are read and written anew:
so what was damaged in the base does not become right by being copied. The others are computed by the channels'
threads, out of the memory that they write from.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ckptfs.guest.block import PageStack
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.checksums import UNKNOWN, Checksums
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.trailer import Trailer


class Summing:
    """Checksums as they become known; ``width`` is a window in pages. At first all RAM is zeros."""

    def __init__(self, blocks: Iterable[RAMBlock], page_size: int) -> None:
        self._lengths = {block.idstr: block.used_length for block in blocks}
        self._sums = Checksums.of_zeros(self._lengths)
        self.width = self._sums.width(page_size)

    def forget(self, idstr: str, with_data: PagesBitmap) -> None:
        """Windows with data are not known until they have been written."""
        self._sums.windows[idstr][with_data.any_of_each(self.width)] = UNKNOWN

    def carry(self, idstr: str, stack: PageStack, base: Checksums | None) -> None:
        """Keep those of the base for windows of ``stack`` that nobody has written since."""
        former = None if base is None or stack.base is None else base.windows.get(idstr)
        if base is None or former is None or base.window_length != self._sums.window_length:
            return
        holds = former != UNKNOWN
        for layer in stack.written:
            holds &= ~layer.present.any_of_each(self.width)
        np.copyto(self._sums.windows[idstr], former, where=holds)

    def unknown(self, idstr: str, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Of each page of some windows whether its window is not known yet."""
        sums = self._sums.windows[idstr][start // self.width : -(-stop // self.width)]
        return np.repeat(sums == UNKNOWN, self.width)[: stop - start]

    def note(self, idstr: str, start: int, data: memoryview, whole: npt.NDArray[np.bool_] | None = None) -> None:
        """Compute what is not known of the windows that hold ``data``, from page ``start`` on.

        ``whole`` tells of each page whether ``data`` has it (all: None). Runs in a thread; no two of them have
        pages of one window.
        """
        sums = self._sums.windows[idstr]
        length = self._sums.window_length
        first = start // self.width
        wanted = sums[first : first + -(-len(data) // length)] == UNKNOWN
        if whole is not None:
            wanted &= (
                np.pad(whole, (0, -whole.size % self.width), constant_values=True).reshape(-1, self.width).all(1)
            )
        for window in np.flatnonzero(wanted).tolist():
            part = data[window * length : (window + 1) * length]
            sums[first + window] = next(self._sums.sums_of(part))

    def in_trailer(self, trailer: Trailer) -> Trailer:
        """``trailer`` with these checksums, if there is room for them."""
        return trailer.with_room_for(self._sums.entry(self._lengths))
