"""Where a save goes: a temporary file beside the final name, published by rename.

tmp + fdatasync + rename + fsync of the directory, and nothing less, survives a power cut; O_DIRECT writes
need the fdatasync too. Any error of a sync is final for that file: the kernel marks the pages clean after
it, so that a second try would "succeed" with data lost.

The parent directory is opened once and everything after that goes through its descriptor. What is replaced
is a regular file that is a checkpoint, or empty: never a symlink, a device, a FIFO, a hard link, or
somebody's letters. Where a version of it is expected, no other is replaced either. It is looked at when the save
begins and again, locked (flock(2)), just before the rename: of two daemons that race, one is refused.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from ckptfs.channels.backing_file import BackingFile, DirectIO, FileSource, OpenedFile, pread, pwrite_all
from ckptfs.channels.descriptors import Descriptors, describe_address
from ckptfs.channels.identity import Identity
from ckptfs.channels.stores.upload import ObjectTarget
from ckptfs.channels.version import NOTHING, FileVersion, Version
from ckptfs.errors import CheckpointError, CommandError, StateError, StorageError
from ckptfs.foreign.libvirt import MAGIC as SAVE_IMAGE_MAGIC
from ckptfs.foreign.libvirt import SaveImage, read_save_image
from ckptfs.mapped_ram.stream import MAGIC
from ckptfs.migration.address import FdAddress, ObjectAddress, SeekableAddress
from ckptfs.migration.store import StoreOptions

_SUFFIX = ".ckptfs-partial"
_COPY_LENGTH = 1 << 24
_RENAME_NOREPLACE = 1
_WAYS_OUT = "save elsewhere (`save /PATH`), or replace it with `save force`"
_libc = ctypes.CDLL(None, use_errno=True)


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

    @property
    def save_image(self) -> SaveImage | None:
        """What libvirt's header says in the file that is replaced; None if there is no such header."""
        ...

    def keep_prefix(self) -> None:
        """Keep what the file that is there now has before the stream, as QEMU does."""

    def seal(self, file_offset: int, header: bytes) -> None:
        """Write the stream's header, last of all: a file without it is plainly no checkpoint."""

    def reader(self) -> BackingFile | None:
        """Open what was written for reading; None if that was not granted."""

    def publish(self, commit: Callable[[], None] = lambda: None, go_on: Callable[[], None] = lambda: None) -> None:
        """Make it durable under its final name; ``commit`` is called before what can't be undone, and may raise.

        So may ``go_on``, which is called now and then where it takes long.
        """

    @property
    def published(self) -> Version | None:
        """What has the final name now, also where `publish` failed after that; None if it was not reached."""
        ...

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
        self.save_image: SaveImage | None = None
        self.published: Version | None = None

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

    def publish(self, commit: Callable[[], None] = lambda: None, go_on: Callable[[], None] = lambda: None) -> None:
        """It is durable already."""
        commit()
        self.published = FileVersion.of(self.file.fd)
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

    def __init__(
        self,
        path: str,
        stream_offset: int,
        identity: Identity,
        forbidden_device: int,
        expected: Version | None = None,
        *,
        any_content: bool = False,
    ) -> None:
        """``expected``: replace this version of the file and no other; None: any that may be replaced.

        ``any_content``: what is replaced need not be a checkpoint, or empty.

        Raises CommandError for a path that must not be replaced, or lies on the own mount; StateError (ESTALE) for
        another version; OSError.
        """
        self.path = path
        self._expected = expected
        self._any_content = any_content
        self.published: Version | None = None
        self.save_image: SaveImage | None = None
        self._stream_offset = stream_offset
        self._identity = identity
        self._ended = False
        parent, self._name = os.path.split(path)
        if self._name in ("", ".", ".."):
            raise CommandError(f"{path}: is a directory, not a file to save to", errno.EISDIR)
        with identity.assumed():
            self._directory = open_directory(parent or "/", forbidden_device)
        try:
            former = self._open_former()
            if former is not None:
                os.close(former)
            self._remove_leftovers()
            self._temporary, fd = self._make_temporary()
        except BaseException:
            os.close(self._directory)
            raise
        self.file = OpenedFile(fd, os.O_WRONLY)

    def _make_temporary(self) -> tuple[str, int]:
        """Make a file, and lock it, which tells it from a left-over of a dead daemon.

        Before it is locked, another save may remove it as one: then make another.
        """
        while True:
            name = f"{_temporary_prefix(self._name)}{secrets.token_hex(6)}{_SUFFIX}"
            with self._identity.assumed():
                fd = os.open(
                    name,
                    os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                    0o600,
                    dir_fd=self._directory,
                )
            try:
                with contextlib.suppress(BlockingIOError):  # it is being removed
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if self._has_the_name(fd, name):
                        return name, fd
            except BaseException:
                with contextlib.suppress(OSError), self._identity.assumed():
                    os.unlink(name, dir_fd=self._directory)
                os.close(fd)
                raise
            os.close(fd)

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

    def publish(self, commit: Callable[[], None] = lambda: None, go_on: Callable[[], None] = lambda: None) -> None:
        """Make the file durable and give it its final name."""
        os.fdatasync(self.file.fd)
        version = FileVersion.of(self.file.fd)  # a rename changes none of it, and after one nothing may fail
        with self._locked_former() as there_is_one, self._identity.assumed():
            commit()
            if there_is_one:
                os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            else:
                self._rename_to_new_name()
        self.published = version
        self._sync_name()
        self._close()

    def _rename_to_new_name(self) -> None:
        """Rename, but not over a file that somebody else has made since we looked (renameat2(2))."""
        names = os.fsencode(self._temporary), os.fsencode(self._name)
        if _libc.renameat2(self._directory, names[0], self._directory, names[1], _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code == errno.EEXIST:
            raise StateError(f"{self.path}: was made by somebody else just now: {_WAYS_OUT}", errno.ESTALE)
        if code not in (errno.EINVAL, errno.ENOSYS):  # network file systems do not know the flag
            raise OSError(code, os.strerror(code), self.path)
        os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def _sync_name(self) -> None:
        try:
            os.fsync(self._directory)
        except OSError as error:
            raise StorageError(
                f"{self.path}: the new checkpoint is in place, but its directory could not be synced "
                f"({error.strerror}), so a power cut may undo that: save again",
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

    @contextlib.contextmanager
    def _locked_former(self) -> Iterator[bool]:
        """Keep every other save from replacing the file meanwhile; yields whether there is one."""
        former = self._open_former()
        if former is None:
            yield False
            return
        try:
            try:
                fcntl.flock(former, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(f"{self.path}: somebody else has locked it (flock), or is replacing it") from None
            except OSError:
                pass  # a file system without locks
            if not self._has_the_name(former, self._name):
                raise StateError(f"{self.path}: was replaced by somebody else just now: {_WAYS_OUT}", errno.ESTALE)
            yield True
        finally:
            os.close(former)

    def _has_the_name(self, fd: int, name: str) -> bool:
        try:
            named = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(fd))

    def _open_former(self) -> int | None:
        """Open what is under the name, None if that is nothing; refuse what must not be replaced.

        It may be a regular file of one name that holds a checkpoint, or nothing yet, in the version expected.
        """
        try:
            status = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
            self._check_kind(status)
            with self._identity.assumed():
                fd = os.open(
                    self._name,
                    os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                    dir_fd=self._directory,
                )
        except FileNotFoundError:
            self._check_version(NOTHING)
            return None
        try:
            self._check_version(FileVersion.of(fd))
            if not self._any_content:
                self._check_content(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check_kind(self, status: os.stat_result) -> None:
        if stat.S_ISDIR(status.st_mode):
            raise CommandError(f"{self.path}: is a directory, not a file to save to", errno.EISDIR)
        if not stat.S_ISREG(status.st_mode):
            raise CommandError(f"{self.path}: is not a regular file; save to another name", errno.EEXIST)
        if status.st_nlink != 1:
            raise CommandError(f"{self.path}: has {status.st_nlink} names (hard links)", errno.EMLINK)

    def _check_version(self, found: FileVersion) -> None:
        if self._expected in (None, found):
            return
        if found == NOTHING:
            problem = "is gone, or empty, since this mount came from it or last wrote it (is its storage mounted?)"
        elif self._expected == NOTHING:
            problem = "was made by somebody else since this guest was mounted"
        else:
            changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.mtime_ns // 10**9))
            problem = f"is not the file that this mount came from or last wrote, but one of {changed}"
        raise StateError(f"{self.path}: {problem}: {_WAYS_OUT}", errno.ESTALE)

    def _check_content(self, fd: int) -> None:
        if os.fstat(fd).st_size <= self._stream_offset:
            return
        head = pread(fd, len(SAVE_IMAGE_MAGIC), self._stream_offset)
        if head == SAVE_IMAGE_MAGIC:
            try:
                self.save_image = read_save_image(FileSource(fd), self._stream_offset)
            except CheckpointError as error:
                raise error.of_file(self.path) from None
        elif not head.startswith(MAGIC.to_bytes(4)):
            where = f" at byte {self._stream_offset:#x}" if self._stream_offset else ""
            raise CommandError(
                f"{self.path}: exists and holds no checkpoint{where}; remove it or save to another name",
                errno.EEXIST,
            )

    def _remove_leftovers(self) -> None:
        """Remove temporaries of earlier saves to this name whose daemon is gone (nobody holds their lock)."""
        for name in _temporaries(self._directory, self._name):
            with contextlib.suppress(OSError), self._identity.assumed():
                fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=self._directory)
                finally:
                    os.close(fd)


def wait_for_saves(path: str, seconds: float, begin: Callable[[], None]) -> bool:
    """Wait until no daemon writes a checkpoint to ``path``, calling ``begin`` if there is one (blocking).

    Returns False if that takes longer than ``seconds``.
    """
    ended = threading.Event()
    held = [fd for fd in _open_temporaries(path) if not _try_lock(fd)]
    if not held:
        return True
    begin()

    def wait() -> None:
        for fd in held:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_SH)
            os.close(fd)
        ended.set()

    threading.Thread(target=wait, daemon=True).start()  # flock(2) has no deadline of its own
    return ended.wait(seconds)


def _open_temporaries(path: str) -> Iterator[int]:
    """Descriptors of the temporaries of a name, as far as we may read them."""
    parent, name = os.path.split(path)
    try:
        directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for temporary in _temporaries(directory, name):
            with contextlib.suppress(OSError):
                yield os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    finally:
        os.close(directory)


def _try_lock(fd: int) -> bool:
    """Whether nobody holds the lock of a temporary; closes it then."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    os.close(fd)
    return True


def _temporary_prefix(name: str) -> str:
    """How every temporary of a name begins: with as much of it as leaves room (NAME_MAX is in bytes)."""
    return f".{os.fsdecode(os.fsencode(name)[:200])}."


def _temporaries(directory: int, name: str) -> list[str]:
    """The temporaries of a name in an open directory, of saves that run and of daemons that are gone."""
    prefix = _temporary_prefix(name)
    length = len(prefix) + 12 + len(_SUFFIX)
    return [
        entry
        for entry in os.listdir(directory)
        if entry.startswith(prefix) and entry.endswith(_SUFFIX) and len(entry) == length
    ]


def open_directory(path: str, forbidden_device: int) -> int:
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
    address: SeekableAddress,
    identity: Identity,
    descriptors: Descriptors,
    forbidden_device: int,
    store: StoreOptions,
    expected: Version | None = None,
) -> Target:
    """Begin to write a checkpoint to ``address``, whose path is absolute (blocking).

    Raises CommandError for what must not be replaced, StateError (ESTALE) for a file that is not in the version
    ``expected``, StorageError if no handed descriptor fits, OSError.
    """
    if isinstance(address, FdAddress):
        return HandedTarget(address, 0, descriptors)
    if isinstance(address, ObjectAddress):
        return ObjectTarget(address, store, identity, expected)
    if address.fdset_id is not None:
        return HandedTarget(address, address.offset, descriptors)
    return PathTarget(address.filename, address.offset, identity, forbidden_device, expected)
