"""Which of a machine's RAM blocks are its memory, and how QEMU is given them as memory backends.

A checkpoint lists blocks by size and name; whether one is main memory, a DIMM's, or belongs to a device or to the
board, it does not say. What is known, in this order:

* the user's word (``-o backends=``),
* the machine's default RAM name (``default_ram_id`` of its class, hw/*/*.c, 10.0): a block that has it is all of
  main memory, and no other block is a NUMA node: with ``-numa memdev=`` there is none of that name,
* names: a device's blocks carry its path (``0000:00:02.0/vga.vram``) or a fw_cfg name (``/rom@etc/acpi/tables``);
  those of boards and of devices without a path are in a table, or end as firmware and display memory do. Whatever
  is left has the name that a user gave to a backend.

A process that has a block's file mapped has it as its memory: that is a fact, and goes before all names
(`guest.vmstate`).
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

OBJECTS = "/objects/"
"""What machine types up to 4.0 put before the id of a backend that is a file, to name its block."""

PLAIN_NAME = ",x-use-canonical-path-for-ramblock-id=off"
"""The property that has QEMU call a file backend's block by the id alone."""

DEFAULT_RAM_NAMES = frozenset(
    [
        "pc.ram",
        "microvm.ram",
        "mach-virt.ram",
        "sbsa-ref.ram",
        "vexpress.highmem",
        "riscv_virt_board.ram",
        "riscv.sifive.u.ram",
        "riscv.spike.ram",
        "s390.ram",
        "ppc_spapr.ram",
        "pnv.ram",
        "ppc_core99.ram",
        "loongarch.ram",
        "mips_malta.ram",
        "ram",
    ]
)
"""``default_ram_id`` of the machines that people run."""

_BOARD_RAM = frozenset(
    [
        "tpm-ppi",
        "tpm-crb-cmd",
        "vmsvga.fifo",
        "riscv.sifive.u.l2lim",
        "virt.secure-ram",
        "mach-virt.tag",
        "mach-virt.secure-tag",
        "sbsa-ref.secure-ram",
        "vexpress.a15sram",
    ]
)
"""Blocks of boards, and of devices that have no path, under names that look like anybody's."""

_FIRMWARE = re.compile(r"(^|\.)(m?rom|bios|vram|sram|flash\d*|vgafb|fb)$|^vga\.|^system\.flash")

_VERSION = re.compile(r"-(\d+)\.(\d+)(?:\.\d+)?$")


@dataclass(frozen=True)
class MachineMemory:
    """The blocks (idstrs) that a machine has as memory backends.

    ``main`` is its memory: one block is all of it, several are its NUMA nodes. ``plugged`` may be those of memory
    devices (pc-dimm, virtio-mem, nvdimm). ``by_name``: nothing but their names tells so.
    """

    main: tuple[str, ...]
    plugged: tuple[str, ...] = ()
    by_name: bool = False

    @property
    def backends(self) -> tuple[str, ...]:
        """All of them."""
        return self.main + self.plugged


def memory_of(idstrs: Sequence[str], named: Collection[str] = ()) -> MachineMemory:
    """The memory of a machine with these blocks; ``named`` are those that the user named, if he did."""
    candidates = [idstr for idstr in idstrs if (idstr in named if named else _may_be_backend(idstr))]
    default = [idstr for idstr in candidates if idstr.removeprefix(OBJECTS) in DEFAULT_RAM_NAMES]
    if default:
        others = [idstr for idstr in candidates if idstr != default[0]]
        return MachineMemory((default[0],), tuple(others))
    return MachineMemory(tuple(candidates), by_name=not named)


def id_of(idstr: str) -> str:
    """The id of the backend that gives a block its name."""
    return idstr.removeprefix(OBJECTS)


def naming_property(idstr: str, machine: str | None) -> str:
    """`PLAIN_NAME` where a machine of this type needs it to name a file backend's block ``idstr``; or nothing.

    Machine types up to 4.0 call it ``/objects/ID`` (hw/core/machine.c, hw_compat_4_0), but RAM that is no backend
    plainly: a checkpoint of such a machine, made of ordinary RAM, has the plain name.
    """
    version = None if machine is None else _VERSION.search(machine)
    is_old = version is not None and (int(version[1]), int(version[2])) <= (4, 0)
    return PLAIN_NAME if is_old and not idstr.startswith(OBJECTS) else ""


def _may_be_backend(idstr: str) -> bool:
    name = id_of(idstr)
    return "/" not in name and name not in _BOARD_RAM and not _FIRMWARE.search(name)
