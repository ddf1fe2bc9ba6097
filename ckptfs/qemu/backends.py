"""Which of QEMU's RAM blocks are memory backends, and whether they lie on this mount."""

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from ckptfs.errors import QemuError

if TYPE_CHECKING:
    from ckptfs.qemu.monitor import Monitor

_OBJECTS = "/objects/"
_RAM_BLOCK_LINE = re.compile(r"\s*(\S.*?)\s+\d+ [KMG]?i?B\s+0x")
_FIRMWARE = re.compile(r"(^|\.)(rom|bios|vram|flash\d*|vgafb|fb)$|^vga\.|^system\.flash")


def is_backend(idstr: str) -> bool:
    """Whether QEMU can have a block of this name as a memory backend, by its name alone.

    The rule: blocks of devices carry the device's path (``0000:00:02.0/vga.vram``) or a fw_cfg name
    (``/rom@etc/acpi/tables``); firmware and display memory of the machine itself end in rom, bios, vram, flash or
    fb. Everything else is main memory: ``pc.ram``, ``mach-virt.ram``, a backend's id (or ``/objects/ID``, as old
    machine types have it).
    """
    name = idstr.removeprefix(_OBJECTS)
    return "/" not in name and not _FIRMWARE.search(name)


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
        idstr = next((idstr for idstr in (name, _OBJECTS + name) if idstr in used), None)
        if idstr is None:
            continue  # an object that no machine or device uses
        problem, fitting = await _problem(monitor, name, kind, idstr, by_inode)
        if problem is not None:
            size = await monitor.execute("qom-get", path=_OBJECTS + name, property="size")
            fitting_name = fitting.removeprefix(_OBJECTS)
            mem_path = paths.get(fitting, f"DIR/ram/{fitting_name}")
            raise QemuError(
                f"QEMU's RAM {idstr!r} {problem}: start QEMU with "
                f"-object memory-backend-file,id={fitting_name},size={size},mem-path={mem_path},share=on",
                errno.EINVAL,
            )
        found.add(idstr)
    return found


async def _problem(
    monitor: "Monitor", name: str, kind: str, idstr: str, by_inode: dict[tuple[int, int], RAMFile]
) -> tuple[str | None, str]:
    """What keeps backend ``name`` from being block ``idstr`` of this mount, and which block it should be."""
    if kind != "memory-backend-file":
        return f"is a {kind}, not a file of this mount", idstr
    if not await monitor.execute("qom-get", path=_OBJECTS + name, property="share"):
        return "is share=off, so what it writes stays private", idstr
    mem_path = await monitor.execute("qom-get", path=_OBJECTS + name, property="mem-path")
    file = by_inode.get(await trio.to_thread.run_sync(_identify, mem_path))
    if file is None:
        return f"lies in {mem_path}, not on this mount", idstr
    return None if file.idstr == idstr else f"lies in the file of block {file.idstr!r}", file.idstr


async def _named_blocks(monitor: "Monitor") -> set[str]:
    """The names of the RAM blocks in use (HMP ``info ramblock``: the first column, empty for unused ones)."""
    text: str = await monitor.execute("human-monitor-command", command_line="info ramblock")
    matches = (_RAM_BLOCK_LINE.match(line) for line in text.splitlines())
    return {match[1] for match in matches if match}


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
        path = _OBJECTS + entry["name"]
        if await monitor.execute("qom-get", path=path, property="share"):
            mem_path = await monitor.execute("qom-get", path=path, property="mem-path")
            if await trio.to_thread.run_sync(_identify, mem_path) in inodes:
                return True
    return False
