"""ckptfs qemu-args: how QEMU is started so that a mount is its RAM."""

import argparse
import os
import re
from typing import Any

from ckptfs.api.status import is_dead_mount, read_status
from ckptfs.errors import CkptfsError, CommandError, StateError
from ckptfs.qemu.memory import id_of, naming_property

Block = dict[str, Any]

_WELL_FORMED_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")  # id_wellformed in util/id.c
_SPLITTING = " \t\n*?[\\"
"""A shell splits or expands an unquoted $(...) at these."""

_NO_MACHINE = "-refused-by-ckptfs"
"""Else an error in `qemu-system-x86_64 $(ckptfs qemu-args DIR) -drive ...` boots another machine on these disks."""

MiB = 1 << 20


def run(arguments: argparse.Namespace) -> int:
    """Print the arguments in one line; where there are none, one that QEMU does not start with."""
    try:
        print(" ".join(_arguments(arguments)))
    except (CkptfsError, OSError):
        print(_NO_MACHINE)
        raise
    return 0


def _arguments(arguments: argparse.Namespace) -> list[str]:
    if not os.path.isdir(arguments.directory) and not is_dead_mount(arguments.directory):
        from ckptfs.cli.run import run_qemu_args  # with numpy, which a mount's arguments do without

        if arguments.share == "on" or arguments.nodes:
            raise CommandError(
                f"{arguments.directory}: is a file, mapped privately: --share on and --nodes are for mounts"
            )
        _refuse_splitting(os.path.abspath(arguments.directory), "rename it, or start it with `ckptfs run`")
        return run_qemu_args(arguments.directory, arguments.offset)
    nodes = arguments.nodes.split(",") if arguments.nodes else None
    return qemu_args(arguments.directory, arguments.share, nodes)


def qemu_args(directory: str, share: str | None, nodes: list[str] | None) -> list[str]:
    """Return QEMU's arguments for the RAM of the mount at ``directory``.

    One memory backend becomes the machine's RAM; several become its NUMA nodes, in the order of ``nodes``
    (idstrs) or of the blocks. Those of memory devices (pc-dimm) are made too; the devices are the caller's to add.
    ``share`` is "on", "off", or None for what fits the mount. With device state in the checkpoint come its machine
    type and ``-incoming``.

    Raises StateError or CommandError where no arguments would do, saying what to do.
    """
    status = read_status(directory)
    path = os.path.abspath(directory)
    _refuse_splitting(path, "mount it elsewhere")
    if status["vmstate"] != "none" and status["written-pages"]:
        raise StateError(
            f"{directory}: pages have been written since the checkpoint, so no machine can start from it: "
            f"`echo reset > {directory}/ctl` drops them, `save` makes a new checkpoint"
        )
    backends = _in_order(directory, status, nodes)
    total = sum(block["used-length"] for block in backends)
    plugged = [block for block in status["blocks"] if block["plugged"]]
    sharing = _sharing(path, share, read_only=status["writers"] == "none")
    arguments = ["-m", _memory(total)]
    machine_type = status["base-machine"]
    for block in backends + plugged:
        arguments += ["-object", _backend(block, path, sharing) + naming_property(block["idstr"], machine_type)]
    machine = [status["base-machine"]] if status["vmstate"] != "none" else []
    if len(backends) == 1:
        machine.append(f"memory-backend={_id(backends[0])}")
    if machine:
        arguments += ["-machine", ",".join(machine)]
    if len(backends) > 1:
        for block in backends:
            arguments += ["-numa", f"node,memdev={_id(block)}"]
    if status["vmstate"] != "none":
        arguments += ["-incoming", f"file:{path}/vmstate"]
    return arguments


def _refuse_splitting(path: str, way_out: str) -> None:
    if bad := next((character for character in _SPLITTING if character in path), None):
        raise CommandError(f"{path}: has {bad!r} in it, which a shell would split; {way_out}")


def _in_order(directory: str, status: dict[str, Any], nodes: list[str] | None) -> list[Block]:
    """The blocks of the machine's own memory, in the order of its NUMA nodes."""
    backends = [block for block in status["blocks"] if block["backend"] and not block["plugged"]]
    if not backends:
        raise StateError(
            f"{directory}: no RAM block here looks like a memory backend of QEMU; -o backends=ID names them"
        )
    if nodes is not None:
        if sorted(nodes) != sorted(_id(block) for block in backends):
            raise CommandError(f"--nodes: it is {','.join(_id(block) for block in backends)}, in the right order")
        return sorted(backends, key=lambda block: nodes.index(_id(block)))
    # QEMU lists its blocks by size (ram_block_add in system/physmem.c), so sizes that differ hide the order.
    if status["vmstate"] != "none" and len({block["used-length"] for block in backends}) > 1:
        raise StateError(
            f"{directory}: the checkpoint does not tell in which order its NUMA nodes have "
            f"{', '.join(_id(block) for block in backends)}: say --nodes ID,ID as the machine had it"
        )
    return backends


def _id(block: Block) -> str:
    """The id of the backend that gives a block its name (old machine types put /objects/ before it)."""
    name = id_of(str(block["idstr"]))
    if not _WELL_FORMED_ID.fullmatch(name):
        raise CommandError(f"RAM block {block['idstr']!r}: QEMU has no memory backend of this name")
    return name


def _backend(block: Block, path: str, sharing: str) -> str:
    mem_path = f"{path}/{block['file']}".replace(",", ",,")
    return f"memory-backend-file,id={_id(block)},size={block['used-length']},mem-path={mem_path},{sharing}"


def _sharing(path: str, share: str | None, *, read_only: bool) -> str:
    if share == "on" and read_only:
        raise CommandError(f"{path}: is mounted read-only (ro), so its guests have share=off")
    if read_only:
        return "share=off,readonly=on,rom=off"
    return f"share={share or 'on'}"


def _memory(length: int) -> str:
    """-m takes MiB where no unit is given."""
    return f"{length // MiB}M" if length % MiB == 0 else f"{length}B"
