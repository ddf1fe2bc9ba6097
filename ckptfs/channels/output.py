"""Where an export goes: a file that gets its name when it is whole, or a pipe."""

import os
from typing import Protocol

import numpy as np

from ckptfs.channels.backing_file import pwritev_all
from ckptfs.channels.identity import Identity
from ckptfs.channels.target import PathTarget
from ckptfs.errors import StorageError
from ckptfs.migration.outgoing import coalesce, nonzero_pages

_BLOCK_LENGTH = 4096
_ZEROS = memoryview(bytes(1 << 20))


class Output(Protocol):
    """Takes a file's bytes. All methods block: call them in a worker thread."""

    is_stream: bool
    """Whether bytes have to come in order, one piece after another."""

    def write(self, file_offset: int, data: memoryview) -> None:
        """Put ``data`` there; what nobody has put anything at is zeros. Raises StorageError, OSError."""

    def end(self, length: int) -> None:
        """All is written: the file has ``length`` bytes. Raises as `write`, and whatever publishing does."""


class FileOutput:
    """A temporary file beside the final name, with holes for zeros; it is published at the end, or discarded."""

    is_stream = False

    def __init__(self, path: str, forbidden_device: int = -1) -> None:
        """``path`` is absolute, without links; what it names is replaced if it is a regular file.

        Raises CommandError for anything else, or one on the mount with st_dev ``forbidden_device``; OSError.
        """
        self._target = PathTarget(path, 0, Identity.of_daemon(), forbidden_device, any_content=True)

    def write(self, file_offset: int, data: memoryview) -> None:
        """Write all but blocks of zeros."""
        array = np.frombuffer(data, np.uint8)
        tail = array.size % _BLOCK_LENGTH
        mask = nonzero_pages(array[: array.size - tail], _BLOCK_LENGTH)
        for start, stop in coalesce(mask):
            part = data[start * _BLOCK_LENGTH : stop * _BLOCK_LENGTH]
            pwritev_all(self._target.file.fd, [part], file_offset + start * _BLOCK_LENGTH)
        if tail:
            pwritev_all(self._target.file.fd, [data[-tail:]], file_offset + len(data) - tail)

    def allow(self, mode: int) -> None:
        """Give it the rights ``mode``, as far as the umask grants them; otherwise it is the owner's alone."""
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(self._target.file.fd, mode & ~umask)

    def end(self, length: int) -> None:
        """Give it its size and its name."""
        os.ftruncate(self._target.file.fd, length)
        self._target.publish()

    def discard(self) -> None:
        """Give it up, if it was not published."""
        self._target.discard()


def write_file(path: str, data: bytes) -> None:
    """Make a file of these bytes, which has its name once it is whole; the umask says who may read it.

    Raises CommandError for what must not be replaced; StorageError, naming ``path``.
    """
    try:
        output = FileOutput(os.path.realpath(path))
        try:
            output.write(0, memoryview(data))
            output.allow(0o666)
            output.end(len(data))
        finally:
            output.discard()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", error.errno) from None


class StreamOutput:
    """A descriptor that takes bytes one after another: a pipe, a socket, standard output."""

    is_stream = True

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._position = 0

    def write(self, file_offset: int, data: memoryview) -> None:
        """Write zeros up to ``file_offset``, and then ``data``."""
        while self._position < file_offset:
            self._write(_ZEROS[: file_offset - self._position])
        self._write(data)

    def end(self, length: int) -> None:
        """Write the zeros at the end."""
        self.write(length, _ZEROS[:0])

    def discard(self) -> None:
        """What was written is gone."""

    def _write(self, data: memoryview) -> None:
        while data:
            count = os.write(self._fd, data)
            self._position += count
            data = data[count:]
