"""Page-aligned buffers, as O_DIRECT wants them."""

import mmap
import weakref
from typing import Any

import numpy as np

BUFFER_LENGTH = (1 << 20) + (64 << 10)
"""Length of one buffer in bytes: the largest read that FUSE sends (1 MiB), at any offset inside a 64 KiB page."""


class AlignedBuffers:
    """A pool of page-aligned buffers of `BUFFER_LENGTH` bytes.

    A buffer comes back by itself when the last memoryview on it is gone: pyfuse3 copies a reply out after
    the handler has returned, so no handler could give it back. At most ``keep`` idle ones are held.
    """

    def __init__(self, keep: int = 16) -> None:
        self._keep = keep
        self._idle: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
        self._loans: dict[int, tuple[weakref.ref[Any], np.ndarray[Any, np.dtype[np.uint8]]]] = {}

    def take(self, length: int) -> memoryview:
        """Return ``length`` writable bytes (0 < length <= BUFFER_LENGTH) at a page-aligned address."""
        if not 0 < length <= BUFFER_LENGTH:
            raise ValueError(f"a buffer holds 1 to {BUFFER_LENGTH} bytes, not {length}")
        try:
            whole = self._idle.pop()  # threads take buffers, too: no look before it
        except IndexError:
            whole = np.frombuffer(mmap.mmap(-1, BUFFER_LENGTH), np.uint8)
        loan = whole[:length]
        # memoryviews hold `loan` itself, so its death is the end of every view on the buffer
        end = weakref.ref(loan, self._give_back)
        self._loans[id(end)] = end, whole  # an array has no hash, so neither has a reference to it
        return loan.data

    def _give_back(self, end: weakref.ref[Any]) -> None:
        _, whole = self._loans.pop(id(end))
        if len(self._idle) < self._keep:
            self._idle.append(whole)
