"""One RAM block of the guest, and where the content of each page is.

Per page, QEMU's two facts decide: ``file_bmap`` (the base has data for it) and ``written`` (a layer of the
overlay has it). Layers are asked from the newest to the oldest, then the base:

=======  =========  ==================  =========================================
written  file_bmap  content is          a read does
=======  =========  ==================  =========================================
0        0          zeros               no I/O, whatever bytes lie in the file
0        1          the base's page     one read of the run through a channel
1        any        the newest layer's  a slice of that layer
=======  =========  ==================  =========================================

A save freezes an epoch by putting an empty layer on top: what lies below it is never written again, so the
channels write out of it without a lock while the guest runs on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from ckptfs.guest.layer import Layer
from ckptfs.guest.pages import PageSource
from ckptfs.guest.turns import Turns
from ckptfs.mapped_ram.bitmap import PagesBitmap


class Content(Enum):
    """Where a page's content is if no layer has it."""

    ZERO = 0
    BASE = 1


class PageState(Enum):
    """The bytes of pages/NAME (interface: one byte a page)."""

    ZERO = 0
    IN_CHECKPOINT = 1
    READ = 2
    WRITTEN = 3


class Segment(NamedTuple):
    """Pages [start, stop) whose content is in one place."""

    source: Layer | Content
    start: int
    stop: int


@dataclass(frozen=True)
class BaseBlock:
    """A RAM block of the base checkpoint: which pages it has data for, and where those are."""

    file_bmap: PagesBitmap
    pages: PageSource


_serials = count()


@dataclass(frozen=True)
class PageStack:
    """The layers over a base, newest first: an immutable list, so that an epoch can keep one."""

    page_count: int
    written: tuple[Layer, ...]
    restored: Layer | None
    base: BaseBlock | None
    serial: int = field(default_factory=_serials.__next__, init=False, compare=False)
    """Every stack has its own."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in the order in which they are asked."""
        return self.written if self.restored is None else (*self.written, self.restored)

    def locate(self, page: int, stop: int) -> Segment:
        """Return the longest segment from ``page`` on, ``stop`` at the most."""
        for layer in self.layers:
            present, end = layer.present.run_at(page, stop)
            if present:
                return Segment(layer, page, end)
            stop = end
        if self.base is not None:
            in_base, stop = self.base.file_bmap.run_at(page, stop)
            if in_base:
                return Segment(Content.BASE, page, stop)
        return Segment(Content.ZERO, page, stop)

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """Split pages [start, stop) into segments."""
        while start < stop:
            segment = self.locate(start, stop)
            yield segment
            start = segment.stop

    def held(self, start: int, stop: int) -> list[tuple[Layer, int, int]]:
        """Those of the segments of pages [start, stop) that layers have: layer, start, stop."""
        if not any(layer.present.any(start, stop) for layer in self.layers):
            return []
        return [
            (segment.source, segment.start, segment.stop)
            for segment in self.segments(start, stop)
            if isinstance(segment.source, Layer)
        ]

    @property
    def changes(self) -> tuple[int, ...]:
        """Another value whenever a page may have become one with data, or lies elsewhere."""
        return (self.serial, *(layer.present.changes for layer in self.layers))

    def with_data(self) -> PagesBitmap:
        """Return the pages that may be other than zero."""
        data = PagesBitmap(self.page_count) if self.base is None else self.base.file_bmap.copy()
        for layer in self.layers:
            data = data.union(layer.present)
        return data


class GuestBlock:
    """A RAM block: its name, its size in pages, and the stack that holds its content."""

    def __init__(self, idstr: str, page_count: int, page_size: int, base: BaseBlock | None = None) -> None:
        self.idstr = idstr
        self.page_count = page_count
        self.page_size = page_size
        self.received = PagesBitmap(page_count)
        self.turns = Turns()
        self.stack = PageStack(page_count, (Layer(idstr, page_count, page_size),), None, base)
        self._stored: tuple[tuple[int, ...], int] = (), 0
        self._counts: tuple[tuple[int, ...], dict[PageState, int]] = (), {}

    @property
    def used_length(self) -> int:
        """Size in bytes."""
        return self.page_count * self.page_size

    @property
    def written(self) -> PagesBitmap:
        """The pages written since the base checkpoint."""
        return _union(self.page_count, self.stack.written)

    def freeze(self) -> PageStack:
        """Begin an epoch: return the stack as it is now; from here on writes go into a layer above it."""
        frozen = self.stack
        fresh = Layer(self.idstr, self.page_count, self.page_size)
        self.stack = replace(frozen, written=(fresh, *frozen.written))
        return frozen

    def drop_layer(self, layer: Layer) -> None:
        """Take an empty layer out of the stack."""
        self.stack = replace(self.stack, written=tuple(x for x in self.stack.written if x is not layer))

    def rebase(self, frozen: PageStack, base: BaseBlock, *, keep_restored: bool) -> tuple[Layer, ...]:
        """Put a base below the pages written since ``frozen``, which is all in it now.

        Return the layers that are not needed any more, for the caller to close.
        """
        newer = self.stack.written[: len(self.stack.written) - len(frozen.written)]
        received = base.file_bmap if keep_restored else _union(self.page_count, frozen.written)
        self.received = self.received.union(received)
        self.stack = PageStack(self.page_count, newer, frozen.restored if keep_restored else None, base)
        return frozen.written if keep_restored else frozen.layers

    def replace(
        self, carried: PageStack, fresh: "GuestBlock", base: BaseBlock, *, keep_restored: bool
    ) -> list[Layer]:
        """Put what the machine handed over in the place of all there is; it is in ``base`` now.

        ``fresh`` is an empty block, or this one, and gives its layer for what is written from now on. Return the
        layers that are not needed any more, for the caller to close.
        """
        (layer,), (top,) = carried.written, fresh.stack.written
        dropped = [former for former in self.stack.layers if former is not top]
        self.received = base.file_bmap.copy() if keep_restored else PagesBitmap(self.page_count)
        self.stack = PageStack(self.page_count, (top,), layer if keep_restored else None, base)
        return dropped if keep_restored else [*dropped, layer]

    def forget_base(self) -> None:
        """The checkpoint has this block no more: what it had of it is zeros from now on."""
        self.received.clear_all()
        self.stack = replace(self.stack, restored=None, base=None)

    def reset(self, layer: Layer) -> tuple[Layer, ...]:
        """Drop every page written since the base; ``layer`` is empty, and for what is written from now on.

        Return the layers that are not needed any more, for the caller to close.
        """
        dropped = self.stack.written
        self.stack = replace(self.stack, written=(layer,))
        return dropped

    def store(self, block_offset: int, data: bytes | memoryview) -> None:
        """Write into the newest layer; pages written in part must be in it (`Layer.store`)."""
        self.stack.written[0].store(block_offset, data)

    def give_size(self, page_count: int) -> None:
        """Give a block that has had no pages its size."""
        layer = Layer(self.idstr, page_count, self.page_size)
        (former,) = self.stack.written
        former.close()
        self.page_count = page_count
        self.received = PagesBitmap(page_count)
        self.stack = PageStack(page_count, (layer,), None, None)

    def hold_restored(self) -> None:
        """Begin to hold pages of the base in memory (`restore_blocks`)."""
        if self.stack.restored is None:
            layer = Layer(self.idstr, self.page_count, self.page_size)
            self.stack = replace(self.stack, restored=layer)

    def page_states(self, start: int, stop: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """Return one `PageState` value a page."""
        states = np.zeros(stop - start, np.uint8)
        if self.stack.base is not None:
            in_file = self.stack.base.file_bmap.expand(start, stop)
            states[:] = in_file * (PageState.IN_CHECKPOINT.value + self.received.expand(start, stop))
        for layer in self.stack.written:
            states[layer.present.expand(start, stop) == 1] = PageState.WRITTEN.value
        return states

    def stored_pages(self) -> int:
        """Return how many pages may be other than zero; a TiB is counted only if something has changed."""
        changes = self.stack.changes
        if self._stored[0] != changes:
            self._stored = changes, self.stack.with_data().count()
        return self._stored[1]

    def page_counts(self) -> dict[PageState, int]:
        """Return how many pages are in each state; counted as `stored_pages` are."""
        changes = (*self.stack.changes, self.received.changes)
        if self._counts[0] != changes:
            self._counts = changes, self._count_pages()
        return self._counts[1]

    def _count_pages(self) -> dict[PageState, int]:
        written = self.written
        written_count = written.count()
        if self.stack.base is None:
            return _counts(self.page_count - written_count, 0, 0, written_count)
        in_file = self.stack.base.file_bmap.difference(written)
        in_file_count = in_file.count()
        unread_count = in_file.difference(self.received).count()
        return _counts(
            self.page_count - in_file_count - written_count,
            unread_count,
            in_file_count - unread_count,
            written_count,
        )

    def close(self) -> None:
        """Give all memory back."""
        for layer in self.stack.layers:
            layer.close()


def _union(page_count: int, layers: tuple[Layer, ...]) -> PagesBitmap:
    union = layers[0].present if layers else PagesBitmap(page_count)
    for layer in layers[1:]:
        union = union.union(layer.present)
    return union


def _counts(zero: int, in_checkpoint: int, read: int, written: int) -> dict[PageState, int]:
    return {
        PageState.ZERO: zero,
        PageState.IN_CHECKPOINT: in_checkpoint,
        PageState.READ: read,
        PageState.WRITTEN: written,
    }
