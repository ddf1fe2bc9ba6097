"""Opening a checkpoint to look at it, without a mount.

::

    with open_file("/ckpt/vm1") as opened:
        opened.checkpoint.machine, opened.file_bmaps["pc.ram"].count()
        machine = opened.trailer.machine            # a SavedMachine: program, arguments ...; None if not known
        problem = opened.distrust()                 # why not to run what it says; None if nothing speaks against it
"""

import errno
import os
import re
import stat
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from ckptfs.channels.backing_file import FileSource
from ckptfs.channels.bulk import BulkReader, new_array
from ckptfs.errors import CheckpointError, StorageError
from ckptfs.foreign.content import Content, read_content
from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.mapped_ram.checkpoint import Checkpoint
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.trailer import Trailer
from ckptfs.migration.address import ObjectAddress
from ckptfs.migration.store import StoreOptions

_OBJECT = re.compile("(s3|gs|az|https?)://")


@dataclass(frozen=True)
class Opened:
    """A checkpoint in a file that is open for reading, until ``close`` or the end of a ``with``."""

    path: str
    fd: int
    mode: int
    """As in stat(2): a regular file's, or a block device's."""
    length: int
    """In bytes."""
    content: Content
    of_store: bool = False
    """Whether it is a copy of an object."""
    _bulk: BulkReader = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_bulk", BulkReader(self.fd))

    @property
    def checkpoint(self) -> Checkpoint:
        """What it holds beside its pages."""
        return self.content.checkpoint

    @property
    def file_bmaps(self) -> dict[str, PagesBitmap]:
        """The pages with data of each block that is in the file, by idstr."""
        return dict(self.content.file_bmaps)

    @property
    def trailer(self) -> Trailer:
        """What ckptfs remembers of it; empty where that is nothing, or damaged (``content.trailer_problem``)."""
        return self.content.trailer

    def read_pages(self, block: RAMBlock, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Pages ``start`` to ``stop`` of a block, one after another (blocking): those without data are zeros.

        The bitmap decides what a page holds: below a clear bit there may be old bytes in the file. Raises
        StorageError or CheckpointError where the file has become shorter, OSError.
        """
        page_size, file_bmap = block.page_size, self.content.file_bmaps[block.idstr]
        if not file_bmap.any(start, stop):
            return np.zeros((stop - start) * page_size, np.uint8)
        if self.content.stream is not None:
            return self.content.stream.read_pages(FileSource(self.fd), block.idstr, start, stop).reshape(-1)
        assert block.pages_offset is not None
        pages = new_array((stop - start) * page_size)
        runs = list(file_bmap.runs(start, stop))
        first, last = runs[0].start, runs[-1].stop
        part = pages[(first - start) * page_size : (last - start) * page_size]
        # One read, over holes and old bytes: that costs less than a read for each run.
        self._bulk.pread_exactly(part, block.pages_offset + first * page_size)
        position = start
        for run in (*runs, Run(stop, stop)):
            pages[(position - start) * page_size : (run.start - start) * page_size] = 0
            position = run.stop
        return pages

    def distrust(self) -> str | None:
        """Why a command line out of this file is not to be run: others than the caller or root have a say in it.

        None if they have not: nobody else can write the file, and the machine ran as one of the two; a process can
        make its own command line be anything. Judged by the open file: it does not matter who can rename it.
        """
        if self.of_store:
            return "comes from a store, and others may have written it"
        status = os.fstat(self.fd)
        if status.st_uid not in (0, os.geteuid()):
            return f"belongs to user {status.st_uid}, who could have put any command into it"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write it (mode {stat.S_IMODE(status.st_mode):#o}): chmod go-w"
        machine = self.trailer.machine
        if machine is not None and machine.uid not in (0, os.geteuid()):
            return f"its machine ran as user {machine.uid}, who could have given it any command"
        return None

    def close(self) -> None:
        """Close the file."""
        self._bulk.close()
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_file(path: str, stream_offset: int = 0, *, whole: bool = True) -> Opened:
    """Open the checkpoint whose stream begins at ``stream_offset`` of the file at ``path``, and read it (blocking).

    ``path`` may be the URL of an object. All of that is fetched, unless ``whole`` is False: then the pages are not.

    Raises CheckpointError, naming file and byte, if it is not whole and sound, or of another kind; StorageError for
    what is no file; OSError.
    """
    if _OBJECT.match(path):
        return _open_object(path, whole)
    fd = open_regular(path)
    try:
        source = FileSource(fd)
        return Opened(path, fd, os.fstat(fd).st_mode, source.length, read_content(source, stream_offset))
    except CheckpointError as error:
        os.close(fd)
        raise error.of_file(path) from None
    except BaseException:
        os.close(fd)
        raise


def _open_object(url: str, whole: bool) -> Opened:
    """The store is the one that the environment tells of."""
    from ckptfs.channels.stores.object_file import open_object  # slow to import, and files do without

    file = open_object(ObjectAddress(url), StoreOptions())
    try:
        content = read_content(file.source())
        if whole:
            file.bring_all()
        return Opened(url, file.fd, os.fstat(file.fd).st_mode, file.length, content, of_store=True)
    except CheckpointError as error:
        file.close()
        raise error.of_file(url) from None
    except BaseException:
        file.close()
        raise


def open_regular(path: str) -> int:
    """Open a regular file or a block device for reading; StorageError (EINVAL) for anything else, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # NONBLOCK: a FIFO must not hang us
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise StorageError(f"{path}: is not a regular file, so it is no checkpoint", errno.EINVAL)
    except BaseException:
        os.close(fd)
        raise
    return fd
