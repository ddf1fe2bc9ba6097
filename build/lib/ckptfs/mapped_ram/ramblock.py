"""A RAM block, as the RAM section's START part lists it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RAMBlock:
    """One block of guest RAM, and where a migration file keeps it.

    ``used_length`` is in bytes; offsets are absolute in the file. ``header_offset``, ``bitmap_offset`` and
    ``pages_offset`` are None in a plain stream. ``address`` is the guest address that x-ignore-shared adds,
    else None. An ``ignored`` block's pages are not in the file at all (x-ignore-shared: they stay in a shared
    memory backend); its bitmap_offset and pages_offset are None.
    """

    idstr: str
    used_length: int
    page_size: int
    pages_offset: int | None
    bitmap_offset: int | None
    address: int | None
    header_offset: int | None
    ignored: bool = False

    @property
    def page_count(self) -> int:
        """Target pages in the block."""
        return self.used_length // self.page_size
