"""Reading a file, whichever kind it is: a mapped-ram file or a plain stream, with a trailer or without one.

The one place that recognises files. What is none of these is named (`magics`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ckptfs.errors import CheckpointError
from ckptfs.foreign.magics import describe
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.checkpoint import Checkpoint, read_checkpoint
from ckptfs.mapped_ram.precopy import PrecopyStream, read_precopy
from ckptfs.mapped_ram.stream import (
    IGNORE_SHARED,
    MAGIC,
    Cursor,
    Source,
    StreamHeader,
    is_mapped_ram,
    read_stream_header,
)
from ckptfs.mapped_ram.trailer import NO_TRAILER, Trailer, read_trailer


@dataclass(frozen=True)
class Content:
    """What a file holds, but for its pages.

    ``file_bmaps`` are the pages with data of each block that is in the file. ``stream`` tells where a plain stream
    has its pages; it is None for a mapped-ram file. ``trailer_problem`` says why a trailer can't be read.
    """

    checkpoint: Checkpoint
    file_bmaps: Mapping[str, PagesBitmap]
    stream: PrecopyStream | None
    trailer: Trailer
    trailer_problem: str | None

    @property
    def kind(self) -> str:
        """``mapped-ram`` or ``precopy``."""
        return "mapped-ram" if self.stream is None else "precopy"


def _recorded(stream: PrecopyStream) -> dict[str, PagesBitmap]:
    """The pages with data of each block of a plain stream.

    With x-ignore-shared, a block without any record is in a shared file, and not in this one.
    """
    all_here = IGNORE_SHARED not in stream.checkpoint.capabilities
    file_bmaps = {block.idstr: PagesBitmap(block.page_count) for block in stream.checkpoint.blocks if all_here}
    return file_bmaps | {idstr: stream.file_bmap(idstr) for idstr in stream.page_offsets}


def read_header(source: Source, stream_offset: int) -> StreamHeader:
    """Read the beginning of a migration stream. Raises CheckpointError, which names a file of another kind."""
    head = source.pread(stream_offset, 8) if stream_offset < source.length else b""
    if head != bytes(8) and not head.startswith(MAGIC.to_bytes(4)):
        what = describe(source, stream_offset)
        if what is not None:
            raise CheckpointError(f"Not a migration stream: {what}", stream_offset)
    return read_stream_header(Cursor(source, stream_offset))


def read_content(source: Source, stream_offset: int = 0) -> Content:
    """Read the file whose stream begins at ``stream_offset``.

    Raises CheckpointError, with the position, for one that is not whole and sound; a bad trailer is no such thing.
    """
    stream: PrecopyStream | None = None
    file_bmaps: Mapping[str, PagesBitmap]
    if is_mapped_ram(read_header(source, stream_offset)):
        checkpoint, file_bmaps = read_checkpoint(source, stream_offset)
    else:
        stream = read_precopy(source, stream_offset)
        checkpoint = stream.checkpoint
        file_bmaps = _recorded(stream)
    trailer, problem = NO_TRAILER, None
    try:
        trailer = read_trailer(source, checkpoint.end_offset)
    except CheckpointError as error:
        problem = str(error)
    return Content(checkpoint, file_bmaps, stream, trailer, problem)
