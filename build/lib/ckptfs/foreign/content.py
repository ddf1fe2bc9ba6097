"""Reading a file, whichever kind it is: a mapped-ram file or a plain stream, with a trailer or without one, or
either behind libvirt's header.

The one place that recognises files. What is none of these is named (`magics`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckptfs.errors import CheckpointError
from ckptfs.foreign.libvirt import SaveImage, read_save_image
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
    ``image`` is what the header of a save image of libvirt says: its domain is in the trailer, as in any checkpoint
    that knows its own, and its run state in the checkpoint.
    """

    checkpoint: Checkpoint
    file_bmaps: Mapping[str, PagesBitmap]
    stream: PrecopyStream | None
    trailer: Trailer
    trailer_problem: str | None
    image: SaveImage | None = None

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


def read_header(source: Source, file_offset: int) -> StreamHeader:
    """Read the beginning of a migration stream. Raises CheckpointError, which names a file of another kind."""
    return _begin(source, file_offset)[1]


def _begin(source: Source, file_offset: int) -> tuple[int, StreamHeader, SaveImage | None]:
    """Where the stream begins, its header, and what libvirt has before it."""
    image = read_save_image(source, file_offset)
    stream_offset = file_offset if image is None else image.stream_offset
    head = source.pread(stream_offset, 8) if stream_offset < source.length else b""
    if head != bytes(8) and not head.startswith(MAGIC.to_bytes(4)):
        what = describe(source, stream_offset)
        if what is not None:
            raise CheckpointError(f"Not a migration stream: {what}", stream_offset)
    return stream_offset, read_stream_header(Cursor(source, stream_offset)), image


def read_content(source: Source, file_offset: int = 0) -> Content:
    """Read the file whose stream, or whose header of libvirt, begins at ``file_offset``.

    Raises CheckpointError, with the position, for one that is not whole and sound; a bad trailer is no such thing.
    """
    stream: PrecopyStream | None = None
    file_bmaps: Mapping[str, PagesBitmap]
    stream_offset, header, image = _begin(source, file_offset)
    if is_mapped_ram(header):
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
    if image is not None:
        trailer = trailer.with_entry(image.domain.entry())
        if checkpoint.run_state is not None:
            checkpoint = replace(checkpoint, run_state=image.run_state)
    return Content(checkpoint, file_bmaps, stream, trailer, problem, image)
