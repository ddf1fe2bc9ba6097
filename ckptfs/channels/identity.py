"""Acting as the user who wrote a command.

A daemon that runs as root must not open for somebody what he could not open himself (CVE-2019-10161 in
libvirt was of that kind). setfsuid(2) is a property of one thread, made for file servers: with a file system
uid other than 0 the kernel also takes away the capabilities that override file permissions.
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckptfs.errors import StorageError

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_SETGROUPS = {"x86_64": 116, "aarch64": 159, "riscv64": 159, "s390x": 206, "ppc64le": 81}


@dataclass(frozen=True)
class Identity:
    """Who wrote a command, as the kernel tells (fuse_in_header: uid, gid, pid), and from which directory."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    working_directory: str | None

    @classmethod
    def of_daemon(cls) -> "Identity":
        """The daemon itself; its working directory is /."""
        return cls(os.geteuid(), os.getegid(), tuple(os.getgroups()), "/")

    @classmethod
    def of_process(cls, pid: int, uid: int, gid: int) -> "Identity":
        """Process ``pid`` acting as ``uid`` and ``gid``; what /proc does not tell is left out."""
        groups: tuple[int, ...] = ()
        working_directory = None
        with contextlib.suppress(OSError, ValueError):
            working_directory = os.readlink(f"/proc/{pid}/cwd")
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status") as status:
            line = next((line for line in status if line.startswith("Groups:")), "Groups:")
            groups = tuple(map(int, line.split()[1:]))
        return cls(uid, gid, groups, working_directory)

    @contextlib.contextmanager
    def assumed(self) -> Iterator[None]:
        """Let this thread open files as this user does; no-op where that is the daemon's own user."""
        if self.uid == os.geteuid() or os.geteuid() != 0:
            yield
            return
        own_groups = os.getgroups()
        _set_thread_groups(self.groups)
        try:
            _set_thread_id(_libc.setfsgid, self.gid)
            _set_thread_id(_libc.setfsuid, self.uid)
            yield
        finally:
            _libc.setfsuid(os.geteuid())
            _libc.setfsgid(os.getegid())
            _set_thread_groups(tuple(own_groups))

    def refuse_stranger(self, name: str, what: str = "use the keys of its store") -> None:
        """Raise StorageError (EACCES) for anybody but the daemon's own user: a store knows only that one's keys."""
        if self.uid != os.geteuid():
            raise StorageError(
                f"{name}: only user {os.geteuid()}, whose mount this is, may {what}",
                errno.EACCES,
            )


def _set_thread_id(set_id: Callable[[int], int], value: int) -> None:
    """setfsuid(2), setfsgid(2): both return the former id, whether they worked or not."""
    set_id(value)
    if set_id(-1) & 0xFFFFFFFF != value:
        raise PermissionError(errno.EPERM, f"cannot act as user or group {value}")


def _set_thread_groups(groups: tuple[int, ...]) -> None:
    """setgroups(2) for this thread alone: the C library's wrapper would change every thread's."""
    array = (ctypes.c_uint * len(groups))(*groups)
    if _libc.syscall(_SYS_SETGROUPS[os.uname().machine], len(groups), array) != 0:
        raise OSError(ctypes.get_errno(), "setgroups")
