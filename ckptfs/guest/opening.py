"""Opening a checkpoint to restore from."""

import errno
import os
import stat

from ckptfs.channels.backing_file import DirectIO
from ckptfs.channels.identity import Identity
from ckptfs.errors import CommandError
from ckptfs.guest.base import Base
from ckptfs.migration.parameters import MigrationParameters


def open_checkpoint(
    path: str, stream_offset: int, identity: Identity, parameters: MigrationParameters, forbidden_device: int = -1
) -> Base:
    """Open and check the checkpoint at ``path`` as ``identity`` may (blocking).

    Raises CheckpointError for a file that is none, CommandError for something that is no regular file or lies on
    the mount itself, OSError.
    """
    with identity.assumed():
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # NONBLOCK: a FIFO must not hang us
    try:
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise CommandError(f"{path}: is not a regular file, so it is no checkpoint")
        if status.st_dev == forbidden_device:
            raise CommandError(f"{path}: lies on this mount", errno.EINVAL)
        direct_io = DirectIO(parameters.direct_io, parameters.direct_io_required)
        return Base(path, fd, stream_offset, direct_io, parameters.multifd_channels)
    except BaseException:
        os.close(fd)
        raise
