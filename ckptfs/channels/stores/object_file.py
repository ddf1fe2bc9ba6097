"""An object as a backing file: a local sparse file that is filled when it is read, a chunk at a time.

What is asked for is one version of the object, for as long as the mount lasts: if that is gone, reads fail, and
pages of two versions are never mixed. A chunk that several want is fetched once. One that could not be had is not
asked for again within a second, as the kernel and the search for bad pages would ask for each page of it.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ckptfs.channels.backing_file import DirectIO, OpenedFile, pread_exactly
from ckptfs.channels.identity import Identity
from ckptfs.channels.stores import credentials
from ckptfs.channels.stores.cache import Cache, Entry, read_head
from ckptfs.channels.stores.client import Object, ObjectGoneError
from ckptfs.channels.stores.kept import CHUNK, Kept, Piece, Unnamed
from ckptfs.channels.version import ObjectVersion, Version
from ckptfs.channels.working_set import (
    SUFFIX,
    WORKING_SET_LENGTH_MAX,
    ByteRange,
    format_working_set,
    join,
    parse_working_set,
)
from ckptfs.errors import StateError, StorageError
from ckptfs.foreign.sparse_tar import BLOCK, SparseMap, is_tar, read_sparse_head
from ckptfs.mapped_ram.stream import Source
from ckptfs.migration.address import WEB, ObjectAddress
from ckptfs.migration.store import StoreOptions

CHUNKS_OF_A_GET = 4
_FAILURE_LASTS = 1.0
"""Seconds in which a chunk that could not be fetched is not asked for again."""
_CHUNKS_OF_A_HEAD = 1 << 10
"""That may be found in an object's first bytes; the rest is holes."""

_THREADS = 8
"""That fetch, where all of an object is wanted."""


@dataclass
class _Fetch:
    """Chunks [start, stop) that a thread fetches; ``loose`` are those that could not be kept."""

    start: int
    stop: int
    ended: threading.Event = field(default_factory=threading.Event)
    loose: dict[int, memoryview] = field(default_factory=dict)
    error: StorageError | None = None


class ObjectFile:
    """A version of an object, open for reading. Its methods block, and any thread may call them."""

    def __init__(self, object_: Object, version: ObjectVersion, layout: SparseMap, kept: Kept) -> None:
        """``layout`` says where the object has the file's bytes."""
        self.url = object_.url
        self.version = version
        self.length = layout.length
        self._object = object_
        self._layout = layout
        self._kept = kept
        self._lock = threading.Lock()
        self._under_way: dict[int, _Fetch] = {}
        self._failed: dict[int, tuple[float, StorageError]] = {}
        self._gone: StorageError | None = None

    @property
    def fd(self) -> int:
        """The local file, which has holes where nothing was fetched."""
        return self._kept.fd

    def open_pages(self, direct_io: DirectIO) -> tuple[int, bool]:
        """Open the local file once more; pages that were just fetched are in its page cache."""
        return OpenedFile(self.fd, os.O_RDONLY).open_pages(DirectIO(False))

    def source(self) -> Source:
        """The file as parsers see it."""
        return _Source(self)

    def pread(self, fd: int, length: int, file_offset: int) -> bytes:
        """Read up to ``length`` bytes; fewer only at the end of the file."""
        buffer = bytearray(max(0, min(length, self.length - file_offset)))
        self.pread_exactly(fd, memoryview(buffer), file_offset)
        return bytes(buffer)

    def pread_exactly(self, fd: int, buffer: memoryview, file_offset: int) -> None:
        """Fill ``buffer`` from ``file_offset`` on, out of what is kept or was fetched just now."""
        stop = file_offset + len(buffer)
        if stop > self.length:
            raise StorageError(f"the file ends at byte {self.length:#x}, inside a page that it lists")
        loose = self._bring(file_offset // CHUNK, -(-stop // CHUNK))
        position = file_offset
        while position < stop:
            chunk = position // CHUNK
            end = min(stop, (chunk + 1) * CHUNK) if loose else stop
            part = buffer[position - file_offset : end - file_offset]
            if chunk in loose:
                part[:] = loose[chunk][position - chunk * CHUNK : end - chunk * CHUNK]
            else:
                pread_exactly(fd, part, position)
            position = end

    def name(self, fd: int) -> str:
        """Its URL."""
        return self.url

    def holds(self, file_offset: int, length: int) -> bool:
        """Whether all these bytes have been fetched and kept."""
        return all(map(self._kept.has, range(file_offset // CHUNK, -(-(file_offset + length) // CHUNK))))

    def read_working_set(self, path: str) -> list[ByteRange]:
        """Of the object beside it; a store that does not tell has none."""
        with contextlib.suppress(StorageError):
            beside = self._beside()
            found = beside.find()
            if isinstance(found, ObjectVersion) and 0 < found.length <= WORKING_SET_LENGTH_MAX:
                text = bytes(beside.get(found, 0, found.length)).decode(errors="replace")
                return parse_working_set(text, self.version, self.length)
        return []

    def write_working_set(self, path: str, ranges: Iterable[ByteRange], identity: Identity) -> int:
        """Into the object beside it."""
        identity.refuse_stranger(self.url)
        if self._object.address.scheme in WEB:
            raise StateError(f"{self.url}: a web server takes no list of what was read", errno.EROFS)
        joined = join(ranges)
        beside = self._beside()
        beside.put(format_working_set(self.version, joined).encode(), beside.find())
        return sum(found.stop - found.start for found in joined)

    def _beside(self) -> Object:
        return Object(ObjectAddress(self.url + SUFFIX), self._object.options)

    def bring_all(self) -> None:
        """Fetch all that is not there yet, by several threads. StorageError (ENOSPC) if it can't be kept."""
        count = -(-self.length // CHUNK)
        with ThreadPoolExecutor(_THREADS) as threads:
            starts = range(0, count, CHUNKS_OF_A_GET)
            for loose in threads.map(lambda x: self._bring(x, min(x + CHUNKS_OF_A_GET, count)), starts):
                if loose:
                    raise StorageError(f"{self.url}: no room for all of it here", errno.ENOSPC)

    def close(self) -> None:
        """Close the local file."""
        self._kept.close()

    # ---- fetching ----------------------------------------------------------------------------------

    def _bring(self, start: int, stop: int) -> dict[int, memoryview]:
        """See that chunks [start, stop) are kept; return those that can't be. Raises StorageError."""
        mine, awaited = self._claim(start, stop)
        for fetch in mine:
            self._perform(fetch)
        loose: dict[int, memoryview] = {}
        for fetch in (*mine, *awaited):
            fetch.ended.wait()
            if fetch.error is not None:
                raise type(fetch.error)(str(fetch.error), fetch.error.errno)
            loose |= fetch.loose
        return loose

    def _claim(self, start: int, stop: int) -> tuple[list[_Fetch], list[_Fetch]]:
        """The fetches that this thread has to make, and those of others that it has to wait for."""
        mine: list[_Fetch] = []
        awaited: list[_Fetch] = []
        with self._lock:
            missing = [chunk for chunk in range(start, stop) if not self._kept.has(chunk)]
            self._refuse_failed(missing)
            for chunk in missing:
                other = self._under_way.get(chunk)
                if other is not None:
                    awaited += [] if other in awaited else [other]
                elif mine and mine[-1].stop == chunk and chunk - mine[-1].start < CHUNKS_OF_A_GET:
                    mine[-1].stop += 1
                else:
                    mine.append(_Fetch(chunk, chunk + 1))
            for fetch in mine:
                self._under_way.update(dict.fromkeys(range(fetch.start, fetch.stop), fetch))
        return mine, awaited

    def _refuse_failed(self, missing: list[int]) -> None:
        if missing and self._gone is not None:
            raise ObjectGoneError(str(self._gone), self._gone.errno)
        for chunk in missing:
            until, error = self._failed.get(chunk, (0.0, None))
            if error is not None and time.monotonic() < until:
                raise StorageError(str(error), error.errno)

    def _perform(self, fetch: _Fetch) -> None:
        try:
            self._fetch(fetch)
        except ObjectGoneError as error:
            self._gone = fetch.error = error
        except StorageError as error:
            fetch.error = error
        except BaseException as error:
            fetch.error = StorageError(f"{self.url}: {error}", getattr(error, "errno", None) or errno.EIO)
            raise
        finally:
            with self._lock:
                for chunk in range(fetch.start, fetch.stop):
                    del self._under_way[chunk]
                    if fetch.error is not None:
                        self._failed[chunk] = time.monotonic() + _FAILURE_LASTS, fetch.error
                    else:
                        self._failed.pop(chunk, None)
            fetch.ended.set()

    def _fetch(self, fetch: _Fetch) -> None:
        first, last = (self._layout.stored_before(chunk * CHUNK) for chunk in (fetch.start, fetch.stop))
        data = memoryview(b"")
        if first < last:
            begin = self._layout.data_offset
            data = self._object.get(self.version, begin + first, begin + last)
        self.keep(fetch.start, fetch.stop, data, fetch.loose)

    def keep(self, start: int, stop: int, data: memoryview, loose: dict[int, memoryview]) -> None:
        """Keep chunks [start, stop), of which ``data`` is all that is stored; ``loose`` gets what has no room."""
        first = self._layout.stored_before(start * CHUNK)
        for chunk in range(start, stop):
            pieces = list(self._pieces(chunk, data, first))
            if not self._kept.keep(chunk, pieces):
                loose[chunk] = _whole(chunk, pieces)

    def _pieces(self, chunk: int, data: memoryview, first: int) -> Iterator[Piece]:
        """The parts of a chunk that are stored, out of ``data``, which begins at stored byte ``first``."""
        for start, stop in self._layout.extents(chunk * CHUNK, (chunk + 1) * CHUNK):
            at = self._layout.stored_before(start) - first
            yield Piece(start, data[at : at + stop - start])

    def seed(self, head: memoryview) -> None:
        """Keep the chunks that are whole in ``head``, the object's first bytes."""
        stop, count = 0, min(-(-self.length // CHUNK), _CHUNKS_OF_A_HEAD)
        while stop < count and self._stored_offset(stop + 1) <= len(head):
            stop += 1
        stop = next((chunk for chunk in range(stop) if self._kept.has(chunk)), stop)
        self.keep(0, stop, head[self._layout.data_offset : self._stored_offset(stop)], {})

    def _stored_offset(self, chunk: int) -> int:
        """Where in the object the data of a chunk begins."""
        return self._layout.data_offset + self._layout.stored_before(chunk * CHUNK)


def _whole(chunk: int, pieces: list[Piece]) -> memoryview:
    """A chunk with its holes."""
    content = np.zeros(CHUNK, np.uint8).data
    for file_offset, data in pieces:
        content[file_offset - chunk * CHUNK : file_offset - chunk * CHUNK + len(data)] = data
    return content


class _Source:
    """An object as a source of its file's bytes."""

    def __init__(self, file: ObjectFile) -> None:
        self._file = file
        self.length = file.length

    def pread(self, file_offset: int, length: int) -> bytes:
        return self._file.pread(self._file.fd, length, file_offset)


class _Head:
    """The beginning of an object as a source: what was read first, and more of it if that is not enough."""

    def __init__(self, object_: Object, version: ObjectVersion, known: bytes | None) -> None:
        self._object = object_
        self._version = version
        self.length = version.length
        self.data = known or (bytes(object_.get(version, 0, min(CHUNK, self.length))) if self.length else b"")

    def pread(self, file_offset: int, length: int) -> bytes:
        stop = min(file_offset + length, self.length)
        if stop > len(self.data):
            more = min(max(stop, len(self.data) + CHUNK), self.length)
            self.data += self._object.get(self._version, len(self.data), more)
        return self.data[file_offset:stop]


def find_object(address: ObjectAddress, options: StoreOptions) -> Version:
    """What is there now, `NOTHING` if that is nothing. Raises StorageError."""
    return Object(address, options).find()


def open_object(address: ObjectAddress, options: StoreOptions) -> ObjectFile:
    """Open what is there now, for reading.

    Raises StorageError (ENOENT if there is nothing; EACCES, EIO), CheckpointError for a tar that is cut short.
    """
    object_ = Object(address, options)
    version = object_.find()
    if not isinstance(version, ObjectVersion):
        raise StorageError(f"{address.url}: there is no such object", errno.ENOENT)
    cache = None if options.cache is None else Cache(options.cache, options.cache_size)
    place = "" if cache is None else cache.place(credentials.endpoint(options.endpoint) or "", address.url, version)
    head = _Head(object_, version, read_head(place) if cache else None)
    layout = read_sparse_head(head) if is_tar(head.data) else SparseMap.dense(version.length)
    if cache is None:
        kept: Kept = Unnamed(layout.length)
    else:
        kept = Entry(cache, place, head.data[: max(layout.data_offset, BLOCK)], layout)
    file = ObjectFile(object_, version, layout, kept)
    file.seed(memoryview(head.data))
    return file
