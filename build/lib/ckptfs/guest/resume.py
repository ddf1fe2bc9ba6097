"""A checkpoint file as a machine's memory, without a mount: what QEMU maps of it, and the stream it starts from.

In a mapped-ram file the pages of a block lie one after another from ``pages_offset`` on, and a hole reads as zeros:
just what ``memory-backend-file`` maps with ``offset=`` (QEMU 8.1), read-only and private (``readonly=on,rom=off``,
8.2). Clones of one file share its pages in the kernel's page cache; what each writes is its own. Blocks that are no
memory backends (ROMs, display memory) travel inside the stream.
"""

import errno
import fcntl
import os
from collections.abc import Collection, Mapping

from ckptfs.channels.backing_file import FileSource, pread
from ckptfs.errors import CheckpointError, StateError
from ckptfs.guest.mappable import stale_page
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.checkpoint import Checkpoint, read_device_state, read_setup
from ckptfs.mapped_ram.precopy import vmstate_stream
from ckptfs.mapped_ram.ramblock import RAMBlock

_MAPPING_ALIGNMENT = 4096


def check_mappable(fd: int, blocks: Collection[RAMBlock], file_bmaps: Mapping[str, PagesBitmap]) -> None:
    """Raise StateError, with the way out, unless QEMU may map ``blocks`` as they lie in the file (blocking).

    Nothing guards the file afterwards: who writes into it changes the machines that map it.
    """
    for block in blocks:
        if block.pages_offset is None:
            raise StateError(f"the RAM of {block.idstr} is not in the file (x-ignore-shared)", errno.EINVAL)
        if block.pages_offset % _MAPPING_ALIGNMENT:
            raise StateError(
                f"{block.idstr} begins at byte {block.pages_offset:#x}, where nothing can be mapped: "
                "`ckptfs export FILE OUT --format mapped-ram` makes one that can",
                errno.EINVAL,
            )
        page = stale_page(fd, block, file_bmaps[block.idstr])
        if page is not None:
            raise StateError(
                f"page {page} of {block.idstr} is zeros, but the file has other bytes in its place, as when QEMU"
                " saves a running guest: "
                "`ckptfs export FILE OUT --format mapped-ram` makes a clean one",
                errno.EINVAL,
            )


def vmstate_of(
    fd: int, checkpoint: Checkpoint, file_bmaps: Mapping[str, PagesBitmap], left_out: Collection[str]
) -> bytes:
    """Return the stream from which QEMU starts when it has the blocks ``left_out`` already (blocking).

    Raises CheckpointError for a file that was cut short meanwhile.
    """
    source = FileSource(fd)
    pages = [
        (block.idstr, run.start, _pages(fd, block, run.start, run.stop))
        for block in checkpoint.blocks
        if block.idstr not in left_out and block.idstr in file_bmaps
        for run in file_bmaps[block.idstr].runs()
    ]
    return vmstate_stream(
        checkpoint, left_out, pages, read_setup(source, checkpoint), read_device_state(source, checkpoint)
    )


def _pages(fd: int, block: RAMBlock, start: int, stop: int) -> bytes:
    assert block.pages_offset is not None
    file_offset = block.pages_offset + start * block.page_size
    length = (stop - start) * block.page_size
    data = pread(fd, length, file_offset)
    if len(data) < length:
        raise CheckpointError("the file ends inside a page that it lists", file_offset + len(data))
    return data


def inherited_file(name: str, content: bytes) -> int:
    """Return a descriptor of a sealed file in memory that a program started from here inherits."""
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd
