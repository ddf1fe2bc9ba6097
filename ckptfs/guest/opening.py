"""Opening a checkpoint to restore from."""

import errno
import os
import stat

from ckptfs.channels.backing_file import BackingFile, OpenedFile
from ckptfs.channels.descriptors import Descriptors, describe_address
from ckptfs.channels.identity import Identity
from ckptfs.errors import CheckpointError, CommandError
from ckptfs.guest.base import Base, BaseOptions
from ckptfs.migration.address import FdAddress, SeekableAddress


def open_checkpoint(
    address: SeekableAddress,
    identity: Identity,
    descriptors: Descriptors,
    options: BaseOptions,
    forbidden_device: int = -1,
) -> Base:
    """Open and check the checkpoint at ``address``, whose path is absolute, as ``identity`` may (blocking).

    Raises CheckpointError, naming the file and the byte, for a file that is none; CommandError for something that
    is no regular file, or lies on the mount itself; StorageError if no handed descriptor fits; OSError.
    """
    name = describe_address(address)
    file = descriptors.open(address, os.O_RDONLY)
    if file is None:
        assert not isinstance(address, FdAddress)
        file = _open_path(address.filename, identity, forbidden_device)
    try:
        return Base(name, file, 0 if isinstance(address, FdAddress) else address.offset, options)
    except CheckpointError as error:
        file.close()
        raise error.of_file(name) from None
    except BaseException:
        file.close()
        raise


def _open_path(path: str, identity: Identity, forbidden_device: int) -> BackingFile:
    with identity.assumed():
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # NONBLOCK: a FIFO must not hang us
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
        if status.st_dev != forbidden_device:
            return OpenedFile(fd, os.O_RDONLY)
        problem = "lies on this mount"
    else:
        problem = "is not a regular file, so it is no checkpoint"
    os.close(fd)
    raise CommandError(f"{path}: {problem}", errno.EINVAL)
