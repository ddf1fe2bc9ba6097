"""Writes that have to wait are carried out in the order in which they came, where they overlap.

The kernel may have two WRITEs of one page on their way, that of write(2) and, newer, one that writes back what was
stored to the page through a mapping. Whichever has to wait here (for `cont`, or for the storage), the newer comes
last.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio


@dataclass(eq=False)
class _Turn:
    start: int
    stop: int
    over: trio.Event = field(default_factory=trio.Event)


class Turns:
    """Who waits to write into a block; ranges are bytes [start, stop)."""

    def __init__(self) -> None:
        self._waiting: list[_Turn] = []

    def any_before(self, start: int, stop: int) -> bool:
        """Whether a write of this range has to wait for another."""
        return any(turn.start < stop and start < turn.stop for turn in self._waiting)

    @asynccontextmanager
    async def taken(self, start: int, stop: int) -> AsyncIterator[None]:
        """Within this it is the turn of a write of this range."""
        earlier = [turn for turn in self._waiting if turn.start < stop and start < turn.stop]
        turn = _Turn(start, stop)
        self._waiting.append(turn)
        try:
            for other in earlier:
                await other.over.wait()
            yield
        finally:
            self._waiting.remove(turn)
            turn.over.set()
