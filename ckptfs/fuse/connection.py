"""The connection to the kernel besides requests: having it drop pages, and ending it by force.

`evict` waits for requests that this daemon has to answer, and can't be interrupted: its thread may have to be left
behind, and as long as it is in there, not even the end of the process closes /dev/fuse. `abort` ends every wait for
the mount, this one too, with an error.
"""

import ctypes
import errno
import functools
import os
import re
import struct

from ckptfs.errors import StateError

_FUSE_NOTIFY_INVAL_INODE = 2
_NOTIFICATION = struct.Struct("=IiQQqq")  # fuse_out_header, fuse_notify_inval_inode_out (linux/fuse.h)

_MNT_FORCE = 1
_MNT_DETACH = 2


def evict(inode: int, start: int, stop: int) -> None:
    """Have the kernel write back and drop what it has cached of bytes [start, stop) of a file.

    It waits for the lock of every page that it meets, and drops folios as a whole.
    """
    message = _NOTIFICATION.pack(_NOTIFICATION.size, _FUSE_NOTIFY_INVAL_INODE, 0, inode, start, stop - start)
    try:
        os.write(_descriptor(), message)
    except OSError as error:
        if error.errno != errno.ENOENT:  # the kernel does not know the inode: nothing of it is cached
            raise


@functools.cache
def _descriptor() -> int:
    """The descriptor of /dev/fuse that this process serves (pyfuse3 has one session a process)."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
        except OSError:
            continue
    raise StateError("no open descriptor of /dev/fuse: nothing is mounted")


def abort(mountpoint: str, device: int) -> None:
    """Abort the connection of the mount with this st_dev: all who wait for it get an error.

    root takes the mount away by force (umount(2), MNT_FORCE), which needs nothing else; others write to the file
    that is theirs in /sys/fs/fuse/connections, if fusectl is mounted there. Raises OSError.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    if os.geteuid() == 0 and _topmost(mountpoint) == number:
        if ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(mountpoint), _MNT_FORCE | _MNT_DETACH):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), mountpoint)
    else:
        with open(f"/sys/fs/fuse/connections/{os.minor(device)}/abort", "w") as file:
            file.write("1")


def _topmost(mountpoint: str) -> str | None:
    """MAJOR:MINOR of what is mounted at ``mountpoint`` last (proc(5), /proc/pid/mountinfo); asks no file system."""
    topmost = None
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
        for line in mounts:
            fields = line.split(" ")
            if re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[4]) == mountpoint:
                topmost = fields[2]
    return topmost
