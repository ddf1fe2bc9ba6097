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

from ckptfs.channels.backing_file import pread
from ckptfs.channels.identity import Identity
from ckptfs.errors import CommandError, StorageError
from ckptfs.mapped_ram.stream import MAGIC

_SUFFIX = ".ckptfs-partial"
_COPY_LENGTH = 1 << 24


class SaveTarget:
    """An unfinished checkpoint on its way to ``path``. All methods block: call them in a worker thread.

    Either `publish` or `discard` ends it. A file that replaces one with ``stream_offset`` takes over the
    bytes before it, as QEMU keeps them.
    """

    def __init__(self, path: str, identity: Identity, forbidden_device: int) -> None:
        self.path = path
        self._identity = identity
        parent, self._name = os.path.split(path)
        if self._name in ("", ".", ".."):
            raise CommandError(f"{path}: is a directory, not a file to save to", errno.EISDIR)
        with identity.assumed():
            self._directory = _open_directory(parent or "/", forbidden_device)
        try:
            self._check_replaceable()
            self._remove_leftovers()
            self._temporary = f".{self._name[:200]}.{secrets.token_hex(6)}{_SUFFIX}"
            with identity.assumed():
                self.fd = os.open(
                    self._temporary,
                    os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                    0o600,
                    dir_fd=self._directory,
                )
        except BaseException:
            os.close(self._directory)
            raise
        fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells it from a left-over of a dead daemon

    def keep_prefix(self, length: int) -> None:
        """Take over the first ``length`` bytes of the file that will be replaced, if there is one."""
        if not length:
            return
        try:
            with self._identity.assumed():
                old = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            return
        try:
            done = 0
            while done < length:
                count = os.copy_file_range(old, self.fd, min(length - done, _COPY_LENGTH), done, done)
                if count == 0:
                    break
                done += count
        finally:
            os.close(old)

    def publish(self) -> None:
        """Make the file durable and give it its final name."""
        os.fdatasync(self.fd)
        self._check_replaceable()
        with self._identity.assumed():
            os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        os.fsync(self._directory)
        self._close()

    def discard(self) -> None:
        """Remove what was written; the final name keeps what it had."""
        with contextlib.suppress(OSError), self._identity.assumed():
            os.unlink(self._temporary, dir_fd=self._directory)
        self._close()

    def _close(self) -> None:
        os.close(self._directory)
        os.close(self.fd)

    def _check_replaceable(self) -> None:
        """Refuse to replace anything but a regular file of one name that is a checkpoint, or empty."""
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
        if old.st_size and not self._holds_checkpoint():
            raise CommandError(
                f"{self.path}: exists and is not a checkpoint; remove it or save to another name",
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
            return pread(fd, 4, 0) == MAGIC.to_bytes(4)
        finally:
            os.close(fd)

    def _remove_leftovers(self) -> None:
        """Remove temporaries of earlier saves to this name whose daemon is gone (nobody holds their lock)."""
        prefix = f".{self._name[:200]}."
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
