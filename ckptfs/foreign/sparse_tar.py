"""A file with holes as an object: a GNU sparse tar of one member, which ``tar -xSf -`` turns into the same file.

::

    pax header | ustar header | map of extents | data of all extents, one after another | two blocks of zeros

An object can't have holes, and a mapped-ram file is full of them. Format: GNU tar's manual, "Storing Sparse Files",
PAX format 1.0. What lies between two positions of the file lies together in the object, too, without its holes.
"""

import io
import tarfile
from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.stream import Source

BLOCK = tarfile.BLOCKSIZE
_MAGIC_OFFSET = 257
_HEAD_LENGTH_MAX = 64 << 20
"""Bytes of headers and map: of two million extents."""

JOINED = 64 << 10
"""Holes shorter than this are stored as zeros: an extent costs a read."""


class Extent(NamedTuple):
    """Bytes [start, stop) of a file, which are stored."""

    start: int
    stop: int


class SparseMap:
    """Which bytes of a file an object has, and where: those of ``extents`` in order, from ``data_offset`` on."""

    def __init__(self, length: int, extents: npt.NDArray[np.int64], data_offset: int) -> None:
        """``extents`` is an array of rows (start, stop); ``length`` that of the file, all in bytes."""
        self.length = length
        self.data_offset = data_offset
        self._starts, self._stops = extents[:, 0], extents[:, 1]
        self._stored = np.concatenate(([0], np.cumsum(self._stops - self._starts)))
        """Bytes that are stored before each extent, and in the end all."""

    @classmethod
    def dense(cls, length: int) -> "SparseMap":
        """That of an object which is the file as it stands."""
        return cls(length, np.array([[0, length]], np.int64), 0)

    @property
    def stored_length(self) -> int:
        """Bytes of all extents."""
        return int(self._stored[-1])

    def stored_before(self, file_offset: int) -> int:
        """How many bytes are stored of what lies before a position of the file."""
        index = int(np.searchsorted(self._starts, file_offset, "right")) - 1
        if index < 0:
            return 0
        within = min(file_offset, int(self._stops[index])) - int(self._starts[index])
        return int(self._stored[index]) + within

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """The parts of bytes [start, stop) of the file that are stored."""
        first = int(np.searchsorted(self._stops, start, "right"))
        last = int(np.searchsorted(self._starts, stop, "left"))
        for a, b in zip(self._starts[first:last].tolist(), self._stops[first:last].tolist(), strict=True):
            yield Extent(max(a, start), min(b, stop))

    def file_extents(self, start: int, stop: int) -> Iterator[Extent]:
        """The parts of the file of which stored bytes [start, stop) are."""
        index = int(np.searchsorted(self._stored, start, "right")) - 1
        while start < stop:
            begin = int(self._starts[index]) + start - int(self._stored[index])
            count = min(stop, int(self._stored[index + 1])) - start
            if count:
                yield Extent(begin, begin + count)
            start += count
            index += 1


def join_extents(extents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Take what is near to one another together, and as many as fit in a map."""
    joined = JOINED
    while True:
        gaps = extents[1:, 0] - extents[:-1, 1] >= joined
        firsts, lasts = np.concatenate(([True], gaps)), np.concatenate((gaps, [True]))
        if not len(extents) or firsts.sum() < 1 << 20:
            break
        joined *= 2
    if not len(extents):
        return extents
    return np.column_stack((extents[firsts, 0], extents[lasts, 1]))


def sparse_head(name: str, length: int, extents: npt.NDArray[np.int64], mtime: int) -> tuple[bytes, SparseMap]:
    """All of the tar before its data, for a file of ``length`` bytes, and where everything is in the tar."""
    rows = extents.tolist()
    if not rows or rows[-1][1] < length:
        rows.append([length, length])  # as GNU tar does: the file has its length, though it ends with a hole
    lines = [str(len(rows)), *(f"{start}\n{stop - start}" for start, stop in rows)]
    sparse_map = _padded("".join(line + "\n" for line in lines).encode())
    stored = sum(stop - start for start, stop in rows)
    member = tarfile.TarInfo(f"GNUSparseFile.0/{name}")
    member.size, member.mtime, member.mode = len(sparse_map) + stored, mtime, 0o600
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(length),
    }
    head = member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + sparse_map
    return head, SparseMap(length, np.array(rows, np.int64), len(head))


def end_of_tar(stored_length: int) -> bytes:
    """What comes behind so many bytes of data."""
    return bytes(-stored_length % BLOCK + 2 * BLOCK)


def is_tar(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a tar archive (POSIX.1-2017, pax, ustar interchange format)."""
    return head.startswith(b"ustar", _MAGIC_OFFSET)


def read_sparse_head(source: Source) -> SparseMap:
    """Where the first member of a tar has its content, sparse or not.

    Raises CheckpointError for one that is cut short, or lies.
    """
    try:
        with tarfile.open(fileobj=_Bounded(source), mode="r:", ignore_zeros=False) as archive:
            member = archive.next()
            sparse = None if member is None else cast("list[tuple[int, int]] | None", member.sparse)
    except (tarfile.TarError, ValueError, EOFError, RecursionError) as error:
        raise CheckpointError(f"its tar header can't be read: {error}", 0) from None
    if member is None or not member.isreg():
        raise CheckpointError("a tar archive, but its first member is no file", 0)
    length = member.size
    rows = [(0, length)] if sparse is None else [(start, start + count) for start, count in sparse if count]
    if any(not 0 <= start <= stop <= length for start, stop in rows) or length >= 1 << 63:
        raise CheckpointError("the map of its tar header has an extent outside of the file", 0)
    extents = np.array(rows, np.int64).reshape(-1, 2)
    if (extents[1:, 0] < extents[:-1, 1]).any():
        raise CheckpointError("the map of its tar header has extents that overlap", 0)
    found = SparseMap(length, extents, member.offset_data)
    if member.offset_data + found.stored_length > source.length:
        raise CheckpointError(
            f"is cut short: {source.length} bytes, and its tar header tells of "
            f"{member.offset_data + found.stored_length}",
            source.length,
        )
    return found


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


class _Bounded(io.RawIOBase):
    """A source as the file that tarfile reads, up to the length that a head may have."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset if whence == io.SEEK_SET else self._position + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        if size > _HEAD_LENGTH_MAX or self._position + size > _HEAD_LENGTH_MAX:
            raise ValueError("it is too long")
        if self._position >= self._source.length:
            return b""
        data = self._source.pread(self._position, max(size, 0))
        self._position += len(data)
        return data
