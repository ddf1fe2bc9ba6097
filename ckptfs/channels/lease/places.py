"""Where a lease is kept: `PATH.lock` on file systems, `KEY.lock` in stores. Methods block.

Both can be compared and swapped: a text is written only over the text that was seen before. A file is locked
(flock(2)) for that moment; a store compares ETags.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from ckptfs.channels.backing_file import pread, pwrite_all
from ckptfs.channels.stores.client import Object, ObjectGoneError
from ckptfs.channels.target import open_directory
from ckptfs.channels.version import NOTHING, ObjectVersion, Version
from ckptfs.errors import CommandError, StateError, StorageError
from ckptfs.migration.address import WEB, FileMigrationArgs, ObjectAddress, SeekableAddress
from ckptfs.migration.store import StoreOptions
from ckptfs.namespace.lease import SUFFIX, TEXT_LENGTH_MAX, free_text


class Seen(NamedTuple):
    """A text as it was found, empty if there is none, and its version in a store."""

    text: bytes
    version: Version = NOTHING


class LockPlace(Protocol):
    """The place of one lease."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def look(self) -> Seen:
        """What is there. Raises OSError, StorageError."""
        ...

    def swap(self, former: Seen, text: bytes) -> Seen | None:
        """Write ``text`` if ``former`` is what is there; None if that is something else. OSError, StorageError."""
        ...

    def free(self, former: Seen) -> None:
        """Leave it to others, if ``former`` is what is there. Raises OSError, StorageError."""


class LockFile:
    """A lease in a file, in a directory that stays open: its path may lead to our own mount later."""

    def __init__(self, path: str, forbidden_device: int) -> None:
        """Raises CommandError for a directory on the own mount, OSError."""
        self.name = path
        parent, self._file = os.path.split(path)
        self._directory = open_directory(parent, forbidden_device)

    def look(self) -> Seen:
        """Read the file."""
        try:
            fd = os.open(self._file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            return Seen(b"")
        try:
            return Seen(pread(fd, TEXT_LENGTH_MAX, 0))
        finally:
            os.close(fd)

    def swap(self, former: Seen, text: bytes) -> Seen | None:
        """Compare and write while it is locked."""
        with self._locked() as fd:
            if fd is None or pread(fd, TEXT_LENGTH_MAX, 0) != former.text:
                return None
            pwrite_all(fd, text, 0)
            os.ftruncate(fd, len(text))
            os.fsync(fd)  # on a network file system, it is renewed when the server has it
            return Seen(text)

    def free(self, former: Seen) -> None:
        """Remove it while it is locked."""
        with self._locked() as fd:
            if fd is not None and pread(fd, TEXT_LENGTH_MAX, 0) == former.text:
                os.unlink(self._file, dir_fd=self._directory)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The file, made if need be, and locked; None if somebody else has locked it just now, or removed it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._file, flags, 0o600, dir_fd=self._directory)
        try:
            yield fd if _lock(fd, self.name) and self._has_the_name(fd) else None
        finally:
            os.close(fd)

    def _has_the_name(self, fd: int) -> bool:
        try:
            named = os.stat(self._file, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(fd))


def _lock(fd: int, name: str) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(
            f"{name}: can't be locked (flock: {error.strerror}): mount without `exclusive`", error.errno
        ) from error
    return True


class LockObject:
    """A lease in an object. It is never removed, as stores do not compare before they do that."""

    def __init__(self, address: ObjectAddress, options: StoreOptions) -> None:
        """Raises StorageError without credentials."""
        self.name = address.url
        self._object = Object(address, options)

    def look(self) -> Seen:
        """Fetch the object."""
        while True:
            version = self._object.find()
            if not isinstance(version, ObjectVersion) or not version.length:
                return Seen(b"", version)
            with contextlib.suppress(ObjectGoneError):  # written anew since: look again
                return Seen(bytes(self._object.get(version, 0, min(version.length, TEXT_LENGTH_MAX))), version)

    def swap(self, former: Seen, text: bytes) -> Seen | None:
        """Have the store compare."""
        try:
            return Seen(text, self._object.put(text, former.version))
        except StateError:
            return None

    def free(self, former: Seen) -> None:
        """Write that nobody has it."""
        self.swap(former, free_text())


def lock_place(spec: SeekableAddress | None, store: StoreOptions, forbidden_device: int = -1) -> LockPlace:
    """Where the lease of a checkpoint is kept (blocking).

    Raises CommandError for a checkpoint that has no place beside it, OSError, StorageError.
    """
    if isinstance(spec, ObjectAddress) and spec.scheme not in WEB:
        return LockObject(ObjectAddress(spec.url + SUFFIX), store)
    if isinstance(spec, FileMigrationArgs) and spec.fdset_id is None:
        return LockFile(spec.filename + SUFFIX, forbidden_device)
    raise CommandError(
        "a lease (exclusive, lock steal) lies beside a file or an object, and this mount is of neither"
    )
