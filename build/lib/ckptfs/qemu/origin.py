"""Which QEMU is behind a QMP socket: what a checkpoint remembers of its machine.

The kernel tells who listens at the socket (SO_PEERCRED, unix(7)), /proc how that process was started, and QMP's
greeting which version it is. Where somebody else opened the socket (a proxy; libvirt, which hands it to QEMU),
nothing is remembered rather than that program.
"""

import errno
import os
import platform
import time

from ckptfs import __version__
from ckptfs.channels.identity import Identity
from ckptfs.mapped_ram.trailer import SavedMachine
from ckptfs.qemu.users import is_machine

_DELETED = " (deleted)"


def saved_machine(pid: int, version: str, identity: Identity) -> SavedMachine | None:
    """Describe the machine that is process ``pid`` (blocks).

    None if it is none, can't be looked at, or is a user's into whose processes ``identity`` may not look: what is
    remembered goes into a file of his.
    """
    try:
        uid = _user_of(pid)
        if not is_machine(pid) or identity.uid not in (0, uid):
            return None
        program = os.readlink(f"/proc/{pid}/exe").removesuffix(_DELETED)  # upgraded since it was started
        directory = os.readlink(f"/proc/{pid}/cwd").removesuffix(_DELETED)
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return None
    return SavedMachine(
        program=program,
        arguments=tuple(map(os.fsdecode, words[1:-1])),
        directory=directory,
        uid=uid,
        qemu=version,
        host=platform.node(),
        time=int(time.time()),
        ckptfs=__version__,
    )


def _user_of(pid: int) -> int:
    """The effective uid; the owner of /proc/PID is root where a process has changed it (proc(5))."""
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("Uid:"):
                return int(line.split()[2])
    raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
