"""A directory in which what was fetched of objects is kept, for all mounts of this host.

::

    DIR/HASH/head      the object's first bytes, with the map of the tar in them
    DIR/HASH/data      the file, as far as it was fetched
    DIR/HASH/chunks    the CRC-32 of what is stored of each chunk; 0: it is not here

HASH stands for one version of one object, so nothing here grows old. A chunk counts if its checksum is right when
it is first looked at: after a power cut, only some of it may be there. Who uses an entry has its data locked
(flock, shared). Whole entries make room for new chunks: first what was opened longest ago, never what is in use.
"""

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import zlib
from collections.abc import Sequence

import numpy as np

from ckptfs.channels.backing_file import pread
from ckptfs.channels.stores.kept import CHUNK, Piece, refuse_foreign_directory, write_pieces
from ckptfs.channels.version import ObjectVersion
from ckptfs.foreign.sparse_tar import SparseMap

log = logging.getLogger(__name__)


class Cache:
    """The cache in ``directory``, which may hold ``size`` bytes; None: as many as there is room for."""

    def __init__(self, directory: str, size: int | None) -> None:
        """Make the directory if need be. Raises OSError, and StorageError if others may read or write it."""
        os.makedirs(directory, 0o700, exist_ok=True)
        refuse_foreign_directory(directory)
        self.directory = directory
        self.size = size

    def place(self, endpoint: str, url: str, version: ObjectVersion) -> str:
        """The directory of an entry."""
        key = "\0".join((endpoint, url, version.etag, version.version or ""))
        return os.path.join(self.directory, hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest())

    def has_room(self, length: int) -> bool:
        """Whether ``length`` more bytes fit, once older entries have gone that nobody uses."""
        if self.size is None:
            return True
        used = {place: _stored(place) for place in self._places()}
        for place in sorted(used, key=_opened_at):
            if sum(used.values()) + length <= self.size:
                break
            if _remove_unused(place):
                del used[place]
        return sum(used.values()) + length <= self.size

    def _places(self) -> list[str]:
        return [entry.path for entry in os.scandir(self.directory) if entry.is_dir(follow_symlinks=False)]


def read_head(place: str) -> bytes | None:
    """The first bytes of an entry's object; None if it is not here."""
    try:
        with open(os.path.join(place, "head"), "rb") as file:
            return file.read()
    except OSError:
        return None


class Entry:
    """The chunks of one version of an object in the cache."""

    def __init__(self, cache: Cache, place: str, head: bytes, layout: SparseMap) -> None:
        """Open it, and make it if need be (blocking). Raises OSError."""
        self._cache = cache
        self._layout = layout
        self._full = False
        self.fd = _lock_shared(place)
        count = max(-(-layout.length // CHUNK), 1)
        try:
            os.ftruncate(self.fd, layout.length)
            with open(os.open(os.path.join(place, "chunks"), os.O_RDWR | os.O_CREAT, 0o600), "r+b") as chunks:
                chunks.truncate(count * 4)
                self._crcs = np.frombuffer(mmap.mmap(chunks.fileno(), count * 4), "<u4")
            self._sound = np.zeros(count, np.bool_)
            temporary = os.path.join(place, f"head.{os.getpid()}")
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(head)
            os.rename(temporary, os.path.join(place, "head"))
        except BaseException:
            os.close(self.fd)
            raise

    def has(self, chunk: int) -> bool:
        """Whether it is here, and sound."""
        if not self._sound[chunk] and self._crcs[chunk]:
            extents = self._layout.extents(chunk * CHUNK, (chunk + 1) * CHUNK)
            parts = [memoryview(pread(self.fd, stop - start, start)) for start, stop in extents]
            self._sound[chunk] = _checksum(parts) == self._crcs[chunk]
        return bool(self._sound[chunk])

    def keep(self, chunk: int, pieces: Sequence[Piece]) -> bool:
        """Write it, and then its checksum."""
        length = sum(len(piece.data) for piece in pieces)
        if not self._cache.has_room(length) or not write_pieces(self.fd, pieces):
            if not self._full:
                log.warning("%s is full: what is fetched now is not kept", self._cache.directory)
            self._full = True
            return False
        self._crcs[chunk] = _checksum([piece.data for piece in pieces])
        self._sound[chunk] = True
        return True

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)


def _checksum(parts: Sequence[memoryview]) -> int:
    """The CRC-32 of all parts together, never 0."""
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum or 1


def _lock_shared(place: str) -> int:
    """Open an entry's data, and see that nobody takes it away."""
    path = os.path.join(place, "data")
    while True:
        os.makedirs(place, 0o700, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # somebody has made room just now
        fcntl.flock(fd, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                return fd
        os.close(fd)


def _remove_unused(place: str) -> bool:
    """Remove an entry that nobody has open; return whether that is so."""
    try:
        fd = os.open(os.path.join(place, "data"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(place)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _stored(place: str) -> int:
    try:
        return os.stat(os.path.join(place, "data")).st_blocks * 512
    except OSError:
        return 0


def _opened_at(place: str) -> float:
    try:
        return os.stat(os.path.join(place, "head")).st_mtime
    except OSError:
        return 0.0
