"""The connection to the kernel besides requests: having it drop pages, and its end.

`evict` waits for requests that this daemon has to answer, and can't be interrupted: its thread may have to be left
behind, and as long as it is in there, not even the end of the process closes /dev/fuse. `abort` ends every wait for
the mount, this one too, with an error.
"""

import ctypes
import errno
import functools
import os
import re
import select
import struct
import subprocess

import trio

from ckptfs.errors import StateError

_FUSE_NOTIFY_INVAL_INODE = 2
_NOTIFICATION = struct.Struct("=IiQQqq")  # fuse_out_header, fuse_notify_inval_inode_out (linux/fuse.h)

_MNT_FORCE = 1
_MNT_DETACH = 2


def evict(inode: int, start: int, stop: int) -> None:
    """Have the kernel write back and drop what it has cached of bytes [start, stop) of a file.

    It waits for the lock of every page that it meets, and drops folios as a whole. OSError (ENOTCONN) if the
    connection is gone: what could not be written back is lost then.
    """
    message = _NOTIFICATION.pack(_NOTIFICATION.size, _FUSE_NOTIFY_INVAL_INODE, 0, inode, start, stop - start)
    try:
        os.write(_descriptor(), message)
    except OSError as error:
        if error.errno != errno.ENOENT:  # the kernel does not know the inode: nothing of it is cached
            raise
    if is_gone():
        raise OSError(errno.ENOTCONN, "the mount was taken away by force")


def is_gone() -> bool:
    """Whether nothing is mounted, the mount was taken away, or somebody has aborted the connection."""
    try:
        descriptor = _descriptor()
    except StateError:
        return True
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are always told
    return bool(poll.poll(0))


async def gone() -> None:
    """Return when it `is_gone`."""
    with select.epoll() as errors:
        errors.register(_descriptor(), 0)
        await trio.lowlevel.wait_readable(errors)


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
    """Abort the connection of the mount with this st_dev, so that all who wait for it get an error, and unmount it.

    root takes the mount away by force (umount(2), MNT_FORCE), which needs nothing else. Others write to the file
    that is theirs in /sys/fs/fuse/connections: OSError where fusectl is not mounted there.
    """
    if device < 0:
        raise OSError(errno.ENOTCONN, "its device is not known yet", mountpoint)
    number = f"{os.major(device)}:{os.minor(device)}"
    flags = _MNT_FORCE | _MNT_DETACH
    if _topmost(mountpoint) == number and ctypes.CDLL(None).umount2(os.fsencode(mountpoint), flags) == 0:
        return
    with open(f"/sys/fs/fuse/connections/{os.minor(device)}/abort", "w") as file:
        file.write("1")
    subprocess.run(["fusermount3", "-u", "-z", "-q", "--", mountpoint], check=False)


def _topmost(mountpoint: str) -> str | None:
    """MAJOR:MINOR of what is mounted at ``mountpoint`` last (proc(5), /proc/pid/mountinfo); asks no file system."""
    topmost = None
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
        for line in mounts:
            fields = line.split(" ")
            if re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[4]) == mountpoint:
                topmost = fields[2]
    return topmost
