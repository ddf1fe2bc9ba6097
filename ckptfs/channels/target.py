"""Where a save goes: a temporary file beside the final name, published by rename.

tmp + fdatasync + rename + fsync of the directory, and nothing less, survives a power cut; O_DIRECT writes
need the fdatasync too. Any error of a sync is final for that file: the kernel marks the pages clean after
it, so that a second try would "succeed" with data lost.

The parent directory is opened once and everything after that goes through its descriptor. What is replaced
is a regular file that is a checkpoint, or empty: never a symlink, a device, a FIFO, a hard link, or
somebody's letters.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from typing import Protocol

from ckptfs.channels.backing_file import BackingFile, DirectIO, OpenedFile, pread, pwrite_all
from ckptfs.channels.descriptors import Descriptors, describe_address
from ckptfs.channels.identity import Identity
from ckptfs.errors import CommandError, StorageError
from ckptfs.mapped_ram.stream import MAGIC
from ckptfs.migration.address import FdAddress, SeekableAddress

_SUFFIX = ".ckptfs-partial"
_COPY_LENGTH = 1 << 24


class Target(Protocol):
    """A checkpoint that is being written. All methods block: call them in a worker thread.

    The order is `keep_prefix`, the writing of all but the stream's header, `seal`, `publish`; or `discard`
    instead of whatever is left of it. Nothing happens when one that was published is discarded.
    """

    @property
    def path(self) -> str:
        """Its name, for people."""
        ...

    @property
    def file(self) -> BackingFile:
        """The file to write into."""
        ...

    def keep_prefix(self) -> None:
        """Keep what the file that is there now has before the stream, as QEMU does."""

    def seal(self, file_offset: int, header: bytes) -> None:
        """Write the stream's header, last of all: a file without it is plainly no checkpoint."""

    def reader(self) -> BackingFile | None:
        """Open what was written for reading; None if that was not granted."""

    def publish(self) -> None:
        """Make it durable under its final name."""

    def discard(self) -> None:
        """Give it up."""


class HandedTarget:
    """A file that somebody else opened: written in place, as it has no name here that could be switched."""

    def __init__(self, address: SeekableAddress, stream_offset: int, descriptors: Descriptors) -> None:
        """Raises StorageError if no descriptor that was handed in fits ``address``."""
        file = descriptors.open(address, os.O_WRONLY)
        assert file is not None
        self.path = describe_address(address)
        self.file = file
        self._address = address
        self._stream_offset = stream_offset
        self._descriptors = descriptors
        self._begun = self._ended = False

    def keep_prefix(self) -> None:
        """Cut the file there: what lies before it stays."""
        try:
            os.ftruncate(self.file.fd, self._stream_offset)
        except OSError as error:
            problem = f"failed to truncate migration file to offset {self._stream_offset:#x}: {error.strerror}"
            raise StorageError(f"{self.path}: {problem}", error.errno) from error
        self._begun = True

    def seal(self, file_offset: int, header: bytes) -> None:
        """Write the header when all else is durable."""
        os.fdatasync(self.file.fd)
        pwrite_all(self.file.fd, header, file_offset)
        os.fdatasync(self.file.fd)

    def reader(self) -> BackingFile | None:
        """The same file for reading, if such a descriptor was handed in too, or it may be opened again."""
        with contextlib.suppress(StorageError):
            return self._descriptors.open(self._address, os.O_RDONLY)
        try:
            return OpenedFile(OpenedFile(self.file.fd, os.O_RDONLY).open_pages(DirectIO(False))[0], os.O_RDONLY)
        except OSError:
            return None

    def publish(self) -> None:
        """It is durable already."""
        self._close()

    def discard(self) -> None:
        """Cut off what was written: no room is taken by what is no checkpoint."""
        if self._ended:
            return
        if self._begun:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file.fd, self._stream_offset)
        self._close()

    def _close(self) -> None:
        self._ended = True
        self.file.close()


class PathTarget:
    """A temporary file on its way to a path."""

    def __init__(self, path: str, stream_offset: int, identity: Identity, forbidden_device: int) -> None:
        """Raises CommandError for a path that must not be replaced, or lies on the own mount; OSError."""
        self.path = path
        self._stream_offset = stream_offset
        self._identity = identity
        self._ended = False
        parent, self._name = os.path.split(path)
        if self._name in ("", ".", ".."):
            raise CommandError(f"{path}: is a directory, not a file to save to", errno.EISDIR)
        with identity.assumed():
            self._directory = _open_directory(parent or "/", forbidden_device)
        try:
            self._check_replaceable()
            self._remove_leftovers()
            self._temporary = f"{self._temporary_prefix()}{secrets.token_hex(6)}{_SUFFIX}"
            with identity.assumed():
                fd = os.open(
                    self._temporary,
                    os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                    0o600,
                    dir_fd=self._directory,
                )
        except BaseException:
            os.close(self._directory)
            raise
        self.file = OpenedFile(fd, os.O_WRONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells it from a left-over of a dead daemon
        except BaseException:
            self.discard()
            raise

    def seal(self, file_offset: int, header: bytes) -> None:
        """Write the header; the rename decides."""
        pwrite_all(self.file.fd, header, file_offset)

    def reader(self) -> BackingFile | None:
        """The temporary file, which keeps its content under the final name."""
        fd, _ = OpenedFile(self.file.fd, os.O_RDONLY).open_pages(DirectIO(False))
        return OpenedFile(fd, os.O_RDONLY)

    def keep_prefix(self) -> None:
        """Take over what lies before the stream in the file that will be replaced, if there is one."""
        if not self._stream_offset:
            return
        try:
            with self._identity.assumed():
                old = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            return
        try:
            done = 0
            while done < self._stream_offset:
                length = min(self._stream_offset - done, _COPY_LENGTH)
                count = os.copy_file_range(old, self.file.fd, length, done, done)
                if count == 0:
                    break
                done += count
        finally:
            os.close(old)

    def publish(self) -> None:
        """Make the file durable and give it its final name."""
        os.fdatasync(self.file.fd)
        self._check_replaceable()
        with self._identity.assumed():
            os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._sync_name()
        self._close()

    def _sync_name(self) -> None:
        try:
            os.fsync(self._directory)
        except OSError as error:
            raise StorageError(
                f"{self.path}: the new checkpoint has this name already, but its directory could not be synced "
                f"({error.strerror}), and a power cut may undo that: save again",
                error.errno,
            ) from error

    def discard(self) -> None:
        """Remove what was written; the final name keeps what it had."""
        if self._ended:
            return
        with contextlib.suppress(OSError), self._identity.assumed():
            os.unlink(self._temporary, dir_fd=self._directory)
        self._close()

    def _close(self) -> None:
        self._ended = True
        os.close(self._directory)
        self.file.close()

    def _temporary_prefix(self) -> str:
        """How every temporary of this name begins: with as much of it as leaves room (NAME_MAX is in bytes)."""
        return f".{os.fsdecode(os.fsencode(self._name)[:200])}."

    def _check_replaceable(self) -> None:
        """Refuse to replace anything but a regular file of one name that holds a checkpoint, or nothing yet."""
        try:
            old = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(old.st_mode):
            raise CommandError(f"{self.path}: is a directory, not a file to save to", errno.EISDIR)
        if not stat.S_ISREG(old.st_mode):
            raise CommandError(f"{self.path}: is not a regular file; save to another name", errno.EEXIST)
        if old.st_nlink != 1:
            raise CommandError(f"{self.path}: has {old.st_nlink} names (hard links)", errno.EMLINK)
        if old.st_size > self._stream_offset and not self._holds_checkpoint():
            where = f" at byte {self._stream_offset:#x}" if self._stream_offset else ""
            raise CommandError(
                f"{self.path}: exists and holds no checkpoint{where}; remove it or save to another name",
                errno.EEXIST,
            )

    def _holds_checkpoint(self) -> bool:
        with self._identity.assumed():
            fd = os.open(
                self._name,
                os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                dir_fd=self._directory,
            )
        try:
            return pread(fd, 4, self._stream_offset) == MAGIC.to_bytes(4)
        finally:
            os.close(fd)

    def _remove_leftovers(self) -> None:
        """Remove temporaries of earlier saves to this name whose daemon is gone (nobody holds their lock)."""
        prefix = self._temporary_prefix()
        for name in os.listdir(self._directory):
            if not (name.startswith(prefix) and name.endswith(_SUFFIX)):
                continue
            if len(name) != len(prefix) + 12 + len(_SUFFIX):
                continue
            with contextlib.suppress(OSError), self._identity.assumed():
                fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=self._directory)
                finally:
                    os.close(fd)


def _open_directory(path: str, forbidden_device: int) -> int:
    """Open a directory for the whole save; refuse one below the daemon's own mount point.

    O_PATH first: it asks nothing of the file system behind the path, which may be our own mount.
    """
    probe = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if os.fstat(probe).st_dev == forbidden_device:
            raise CommandError(f"{path}: lies on this mount; save to another file system", errno.EINVAL)
        try:
            return os.open(f"/proc/self/fd/{probe}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            raise StorageError(f"{path}: is not a directory", errno.ENOTDIR) from None
    finally:
        os.close(probe)


def open_target(
    address: SeekableAddress, identity: Identity, descriptors: Descriptors, forbidden_device: int
) -> Target:
    """Begin to write a checkpoint to ``address``, whose path is absolute (blocking).

    Raises CommandError for what must not be replaced, StorageError if no handed descriptor fits, OSError.
    """
    if isinstance(address, FdAddress):
        return HandedTarget(address, 0, descriptors)
    if address.fdset_id is not None:
        return HandedTarget(address, address.offset, descriptors)
    return PathTarget(address.filename, address.offset, identity, forbidden_device)
