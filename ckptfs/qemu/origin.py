"""Which QEMU is behind a QMP socket: what a checkpoint remembers of its machine.

The kernel tells who listens at the socket (SO_PEERCRED, unix(7)), /proc how that process was started, and QMP's
greeting which version it is. Where somebody else opened the socket (a proxy; libvirt, which hands it to QEMU),
nothing is remembered rather than that program.
"""

import os
import platform
import time

from ckptfs import __version__
from ckptfs.mapped_ram.trailer import SavedMachine
from ckptfs.qemu.users import is_machine

_DELETED = " (deleted)"


def saved_machine(pid: int, version: str) -> SavedMachine | None:
    """Describe the machine that is process ``pid`` (blocks); None if it is none, or can't be looked at."""
    try:
        if not is_machine(pid):
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
        qemu=version,
        host=platform.node(),
        time=int(time.time()),
        ckptfs=__version__,
    )
