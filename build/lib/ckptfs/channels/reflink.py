"""Extents that two files share until one of them is written (ioctl_ficlonerange(2)): XFS, btrfs, some of NFS."""

import errno
import fcntl
import struct

_FICLONERANGE = 0x4020940D
_CHUNK_LENGTH = 1 << 30
"""Bytes of one call: it can't be interrupted."""

_NOT_HERE = {
    errno.EOPNOTSUPP: "the file system can't",
    errno.ENOTTY: "it knows no such call",
    errno.EXDEV: "these are two file systems",
    errno.EINVAL: "not at these offsets, or the source ends before",
    errno.EBADF: "a descriptor is not open for that",
    errno.EPERM: "a file is immutable, or a swap file",
    errno.ETXTBSY: "the same",
    errno.EISDIR: "no regular file",
}


def share(source_fd: int, source_offset: int, length: int, target_fd: int, target_offset: int) -> bool:
    """Let ``target_fd`` share ``length`` bytes of ``source_fd``; False if that is not to be had here (blocking).

    Raises OSError where it could be had and failed: ENOSPC, EDQUOT, EIO.
    """
    for done in range(0, length, _CHUNK_LENGTH):
        part = min(_CHUNK_LENGTH, length - done)
        request = struct.pack("=qQQQ", source_fd, source_offset + done, part, target_offset + done)
        try:
            fcntl.ioctl(target_fd, _FICLONERANGE, request)
        except OSError as error:
            if error.errno in _NOT_HERE:
                return False
            raise
    return True
