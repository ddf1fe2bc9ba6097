"""Descriptors that were handed to the daemon when it was started, for managers that open files themselves."""

import errno
import fcntl
import os
from dataclasses import dataclass, field

from ckptfs.channels.backing_file import BackingFile, HandedFile, NamedFile
from ckptfs.errors import CommandError, StorageError
from ckptfs.migration.address import FdAddress, FileMigrationArgs, ObjectAddress, SeekableAddress


@dataclass(frozen=True)
class Descriptors:
    """``fdsets`` by id (``file:/dev/fdset/ID``), and single ones by name (``fd:NAME``)."""

    fdsets: dict[int, list[int]] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raise CommandError, naming the option, for a number that is no open descriptor."""
        options = [(f"fdset={id_}", fd) for id_, fds in self.fdsets.items() for fd in fds]
        options += [(f"fd={name}", fd) for name, fd in self.names.items()]
        for option, fd in options:
            try:
                os.fstat(fd)
            except OSError:
                raise CommandError(f"{option}: {fd} is not an open descriptor of this process") from None

    def open(self, address: SeekableAddress, access: int) -> BackingFile | None:
        """The file that was handed in as ``address``, for reading or writing; None for a path and an object.

        ``access`` is O_RDONLY or O_WRONLY. Raises StorageError, naming the address, if nothing fits.
        """
        try:
            if isinstance(address, FdAddress):
                return self._named(address.name, access)
            if isinstance(address, ObjectAddress):
                return None
            return None if address.fdset_id is None else self._matching(address.fdset_id, access)
        except StorageError as error:
            raise StorageError(f"{describe_address(address)}: {error}", error.errno) from None

    def _named(self, name: str, access: int) -> NamedFile:
        if name not in self.names:
            raise StorageError("no descriptor of that name was handed in (-o fd=NAME:FD)", errno.ENOENT)
        fd = self.names[name]
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            raise StorageError(
                "the descriptor was opened with O_DIRECT, but headers are not aligned: hand in one without, or an"
                " fdset of both",
                errno.EINVAL,
            )
        if flags & os.O_ACCMODE not in (access, os.O_RDWR):
            wanted = "reading" if access == os.O_RDONLY else "writing"
            raise StorageError(f"the descriptor was not opened for {wanted}", errno.EACCES)
        return NamedFile(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0))

    def _matching(self, set_id: int, access: int) -> HandedFile:
        if set_id not in self.fdsets:
            raise StorageError("no such fdset was handed in (-o fdset=ID:FD[:FD...])", errno.ENOENT)
        return HandedFile(tuple(self.fdsets[set_id]), access)


def describe_address(address: SeekableAddress) -> str:
    """An address as the user wrote it, without the offset."""
    match address:
        case FileMigrationArgs():
            return address.filename
        case ObjectAddress():
            return address.url
        case FdAddress():
            return f"fd:{address.name}"
