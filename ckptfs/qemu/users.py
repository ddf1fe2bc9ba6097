"""Who has files in ram/ as his memory, as /proc tells.

That guards against RAM and device state that do not belong together, and against two machines on one RAM.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ckptfs.qemu.backends import RAMFile


@dataclass(frozen=True)
class RAMUser:
    """What process ``pid`` has of the mount's RAM, by idstr.

    ``maps_shared`` and ``maps_private`` are what it may write, and whether others see that: a machine's RAM with
    share=on or share=off. ``holds`` are those, and the other files that it has open or mapped.
    """

    pid: int
    holds: frozenset[str]
    maps_shared: frozenset[str]
    maps_private: frozenset[str]


NOBODY = RAMUser(0, frozenset(), frozenset(), frozenset())
"""No process at all."""


def ram_users(pid: int, openers: set[int], files: list[RAMFile]) -> tuple[RAMUser, list[RAMUser]]:
    """Look at process ``pid``, and at what the other ``openers`` of the files have mapped.

    Blocks, and stats files of the own mount, so never on the trio thread. A process that can't be looked at
    (another pid namespace) has nothing.
    """
    by_inode = {(file.device, file.inode): file.idstr for file in files}
    user = _mapped(pid, by_inode)
    if user.holds != set(by_inode.values()):
        user = replace(user, holds=user.holds | _open(pid, by_inode))
    return user, [_mapped(opener, by_inode) for opener in openers - {pid}]


def machines(pids: Iterable[int], files: list[RAMFile]) -> list[RAMUser]:
    """What those of the processes that are machines have mapped of the files (blocks)."""
    by_inode = {(file.device, file.inode): file.idstr for file in files}
    return [_mapped(pid, by_inode) for pid in sorted(pids) if is_machine(pid)]


def is_machine(pid: int) -> bool:
    """Whether a process is a virtual machine: QEMU by its program's name, or whoever has a machine of KVM open."""
    if os.path.basename(_link(f"/proc/{pid}/exe")).startswith("qemu"):
        return True
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    return any(_link(f"/proc/{pid}/fd/{descriptor}") == "anon_inode:kvm-vm" for descriptor in descriptors)


def name_of(pid: int) -> str:
    """The name of a process (proc(5), comm), which never waits for its memory; ``?`` if it can't be looked at."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "?"


def begins_anew(pid: int) -> bool:
    """Whether a process is a machine that starts from nothing: with -incoming it writes no RAM before it has to."""
    if not is_machine(pid):
        return False
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return False
    return b"-incoming" not in words and b"--incoming" not in words


def shared_use(users: list[RAMUser]) -> str | None:
    """What two of these machines do to one another's RAM, in words."""
    for user in users:
        for other in users:
            both = user.maps_shared & other.maps_shared if user.pid < other.pid else frozenset()
            if both:
                return (
                    f"processes {user.pid} and {other.pid} are machines that both have {_list(both)} with share=on "
                    "and write over one another"
                )
            seen = user.maps_shared & other.maps_private
            if seen and user is not other:
                return (
                    f"process {user.pid} is a machine that has {_list(seen)} with share=on, and what it writes "
                    f"changes the RAM of the machine in process {other.pid}, which has it with share=off"
                )
    return None


def _list(idstrs: frozenset[str]) -> str:
    return ", ".join(sorted(idstrs))


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _mapped(pid: int, by_inode: dict[tuple[int, int], str]) -> RAMUser:
    holds: set[str] = set()
    shared: set[str] = set()
    private: set[str] = set()
    try:
        with open(f"/proc/{pid}/maps") as maps:
            for line in maps:
                _, permissions, _, device, inode, *_ = line.split(maxsplit=5)
                major, minor = (int(number, 16) for number in device.split(":"))
                idstr = by_inode.get((os.makedev(major, minor), int(inode)))
                if idstr is not None:
                    holds.add(idstr)
                    if permissions[1] == "w":
                        (shared if permissions[3] == "s" else private).add(idstr)
    except OSError:
        pass
    return RAMUser(pid, frozenset(holds), frozenset(shared), frozenset(private))


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
