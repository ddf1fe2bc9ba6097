"""Which of QEMU's RAM blocks are memory backends, and whether they lie on this mount."""

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from ckptfs.errors import QemuError
from ckptfs.namespace.names import encode_name
from ckptfs.qemu.memory import OBJECTS, PLAIN_NAME, id_of

if TYPE_CHECKING:
    from ckptfs.qemu.monitor import Monitor

_RAM_BLOCK_LINE = re.compile(r"\s*(\S.*?)\s+\d+ [KMG]?i?B\s+0x")


@dataclass(frozen=True)
class RAMFile:
    """A block's file on the mount, as stat(2) tells files apart."""

    idstr: str
    path: str
    device: int
    inode: int


async def check_backends(monitor: "Monitor", files: Iterable[RAMFile]) -> set[str]:
    """Return the RAM blocks that QEMU has on this mount; all of its memory backends have to be.

    Raises QemuError (EINVAL), saying how to start QEMU instead, for a backend that lies elsewhere, that is private
    (share=off), or that is no file (QEMU leaves memory-backend-memfd out of no stream, since 8.1).
    """
    by_inode = {(file.device, file.inode): file for file in files}
    paths = {file.idstr: file.path for file in files}
    used = await _named_blocks(monitor)
    found = set()
    for entry in await monitor.execute("qom-list", path="/objects"):
        if not entry["type"].startswith("child<memory-backend-"):
            continue
        name, kind = entry["name"], entry["type"][len("child<") : -1]
        idstr = next((idstr for idstr in (name, OBJECTS + name) if idstr in used), None)
        if idstr is None:
            continue  # an object that no machine or device uses
        misfit = await _misfit(monitor, name, kind, idstr, by_inode)
        if misfit is not None:
            size = await monitor.execute("qom-get", path=OBJECTS + name, property="size")
            raise QemuError(
                f"QEMU's RAM {idstr!r} {misfit.problem}: {_remedy(misfit, int(size), paths)}", errno.EINVAL
            )
        found.add(idstr)
    return found


@dataclass(frozen=True)
class _Misfit:
    """What keeps a backend from being a block of this mount, which block ``idstr`` it should be, and how."""

    problem: str
    idstr: str
    properties: str = ""


async def _misfit(
    monitor: "Monitor", name: str, kind: str, idstr: str, by_inode: dict[tuple[int, int], RAMFile]
) -> _Misfit | None:
    """See whether backend ``name``, which is QEMU's block ``idstr``, is that block of the mount."""
    if kind != "memory-backend-file":
        return _Misfit(f"is a {kind}, not a file of this mount", idstr)
    if not await monitor.execute("qom-get", path=OBJECTS + name, property="share"):
        return _Misfit("is share=off, so what it writes stays private", idstr)
    mem_path = await monitor.execute("qom-get", path=OBJECTS + name, property="mem-path")
    file = by_inode.get(await trio.to_thread.run_sync(_identify, mem_path))
    if file is None:
        return _Misfit(f"lies in {mem_path}, which is no file in this mount's ram/", idstr)
    if idstr == OBJECTS + file.idstr:
        return _Misfit(
            f"is block {file.idstr!r} of this mount, which this machine type calls otherwise",
            file.idstr,
            PLAIN_NAME,
        )
    return None if file.idstr == idstr else _Misfit(f"lies in the file of block {file.idstr!r}", file.idstr)


def _remedy(misfit: _Misfit, size: int, paths: dict[str, str]) -> str:
    """How QEMU has to be started instead."""
    mem_path, first = paths.get(misfit.idstr), "start"
    if mem_path is None:
        folder = os.path.dirname(next(iter(paths.values()), "DIR/ram/"))
        mem_path = os.path.join(folder, os.fsdecode(encode_name(id_of(misfit.idstr))))
        first = f"make the block with `truncate -s {size} {mem_path}`, and start"
    return (
        f"{first} QEMU with -object memory-backend-file,id={id_of(misfit.idstr)},size={size},mem-path={mem_path},"
        f"share=on{misfit.properties}"
    )


async def _named_blocks(monitor: "Monitor") -> set[str]:
    """The names of the RAM blocks in use (HMP ``info ramblock``: the first column, empty for unused ones)."""
    text: str = await monitor.execute("human-monitor-command", command_line="info ramblock")
    matches = (_RAM_BLOCK_LINE.match(line) for line in text.splitlines())
    return {match[1] for match in matches if match}


async def memory_devices(monitor: "Monitor") -> list[dict[str, Any]]:
    """What the machine has of DIMMs and the like (QMP query-memory-devices); nothing where QEMU does not tell."""
    try:
        devices: list[dict[str, Any]] = await monitor.execute("query-memory-devices")
    except QemuError:
        return []
    return devices


def _identify(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_dev, status.st_ino


async def has_ram_on(monitor: "Monitor", files: Iterable[RAMFile]) -> bool:
    """Whether QEMU has any of its RAM on this mount, so that it sees there what others write (share=on)."""
    inodes = {(file.device, file.inode) for file in files}
    for entry in await monitor.execute("qom-list", path="/objects"):
        if entry["type"] != "child<memory-backend-file>":
            continue
        path = OBJECTS + entry["name"]
        if await monitor.execute("qom-get", path=path, property="share"):
            mem_path = await monitor.execute("qom-get", path=path, property="mem-path")
            if await trio.to_thread.run_sync(_identify, mem_path) in inodes:
                return True
    return False
