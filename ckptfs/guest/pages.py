"""Where a base keeps its pages, and how a channel reads a run of them."""

from dataclasses import dataclass
from typing import Protocol

from ckptfs.channels.channels import Channel, Channels
from ckptfs.mapped_ram.bitmap import Run
from ckptfs.mapped_ram.precopy import PrecopyStream


class PageSource(Protocol):
    """The pages of one block in one file."""

    @property
    def channels(self) -> Channels:
        """Those on the file."""
        ...

    def read(self, channel: Channel, view: memoryview, run: Run) -> None:
        """Fill ``view`` with the pages of ``run``, all of which have data (blocking).

        Raises StorageError or CheckpointError if the file has less than it listed, OSError.
        """

    def place(self, run: Run) -> int | None:
        """Where in the file the pages of ``run`` lie one after another; None if they do not."""


@dataclass(frozen=True)
class MappedPages:
    """Every page at its place, ``pages_offset`` + page * ``page_size``: mapped-ram, and plain RAM files."""

    channels: Channels
    pages_offset: int
    page_size: int

    def read(self, channel: Channel, view: memoryview, run: Run) -> None:
        """One read for the whole run."""
        channel.pread_exactly(view, self.place(run))

    def place(self, run: Run) -> int:
        """They do."""
        return self.pages_offset + run.start * self.page_size


@dataclass(frozen=True)
class RecordedPages:
    """Every page behind its newest record in a plain stream; they are never aligned."""

    channels: Channels
    stream: PrecopyStream
    idstr: str

    def read(self, channel: Channel, view: memoryview, run: Run) -> None:
        """One read for each stretch of records."""
        pages = self.stream.read_pages(channel, self.idstr, run.start, run.stop)
        view[:] = pages.reshape(-1).data

    def place(self, run: Run) -> None:
        """Each has a record of its own."""
