"""Who has a file in ram/ open, as /proc tells: guards against RAM and device state that do not belong together."""

import os
from dataclasses import dataclass

from ckptfs.qemu.backends import RAMFile


@dataclass(frozen=True)
class RAMUsers:
    """What one process has of the mount's RAM, by idstr: files that it holds open, and those it maps shared."""

    holds: frozenset[str]
    maps_shared: frozenset[str]


def ram_users(pid: int, files: list[RAMFile]) -> RAMUsers:
    """Look at process ``pid`` (blocking; stats files of the own mount, so never on the trio thread).

    A process that can't be looked at (another pid namespace) has nothing.
    """
    by_inode = {(file.device, file.inode): file.idstr for file in files}
    mapped, shared = _mapped(pid, by_inode)
    return RAMUsers(frozenset(mapped | _open(pid, by_inode)), frozenset(shared))


def _mapped(pid: int, by_inode: dict[tuple[int, int], str]) -> tuple[set[str], set[str]]:
    mapped: set[str] = set()
    shared: set[str] = set()
    try:
        with open(f"/proc/{pid}/maps") as maps:
            for line in maps:
                _, permissions, _, device, inode, *_ = line.split(maxsplit=5)
                major, minor = (int(number, 16) for number in device.split(":"))
                idstr = by_inode.get((os.makedev(major, minor), int(inode)))
                if idstr is not None:
                    mapped.add(idstr)
                    if permissions[1] == "w" and permissions[3] == "s":
                        shared.add(idstr)
    except OSError:
        pass
    return mapped, shared


def _open(pid: int, by_inode: dict[tuple[int, int], str]) -> set[str]:
    found: set[str] = set()
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return found
    for descriptor in descriptors:
        try:
            status = os.stat(f"/proc/{pid}/fd/{descriptor}")
        except OSError:
            continue  # closed meanwhile
        idstr = by_inode.get((status.st_dev, status.st_ino))
        if idstr is not None:
            found.add(idstr)
    return found
