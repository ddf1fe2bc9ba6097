"""How the readers of RAM fare: who waits for the storage, what could not be read, and when all was there."""

from collections.abc import Mapping
from types import MappingProxyType

import trio

from ckptfs.guest.base import BadPagesError

BAD_PAGES_KEPT = 64


class Readers:
    """Counts and times of reads from the base; moments are on trio's clock, None until they come."""

    def __init__(self) -> None:
        self._waiting = 0
        self._first_byte_at: float | None = None
        self._full_at: float | None = None
        self._bad_pages: dict[tuple[str, int], str] = {}

    @property
    def waiting(self) -> int:
        """Reads that wait for the backing storage just now."""
        return self._waiting

    @property
    def first_byte_at(self) -> float | None:
        """When the first page was served from the base."""
        return self._first_byte_at

    @property
    def full_at(self) -> float | None:
        """When the last page was restored."""
        return self._full_at

    @property
    def bad_pages(self) -> Mapping[tuple[str, int], str]:
        """The first `BAD_PAGES_KEPT` pages, by idstr and number, that somebody asked for in vain, and why."""
        return MappingProxyType(self._bad_pages)

    def wait(self) -> "Readers":
        """A read waits as long as this lasts (a generator would cost several times as much for every read)."""
        return self

    def __enter__(self) -> None:
        self._waiting += 1

    def __exit__(self, *error: object) -> None:
        self._waiting -= 1

    def note_served(self) -> None:
        """A page of the base was served."""
        if self._first_byte_at is None:
            self._first_byte_at = trio.current_time()

    def note_full(self) -> None:
        """All of RAM is in memory."""
        self._full_at = trio.current_time()

    def note_bad_pages(self, error: BadPagesError) -> None:
        """Somebody asked for pages that can't be read."""
        for page in error.pages[: BAD_PAGES_KEPT - len(self._bad_pages)]:
            self._bad_pages[error.idstr, page] = str(error)
