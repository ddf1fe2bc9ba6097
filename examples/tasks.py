#!/usr/bin/env python3
"""tasks.py PLACE VMLINUX: the tasks of a guest, and of a core with registers where its first CPU is, by drgn.

PLACE is views/vmcore of a mount, a checkpoint without any mount, or the directory of a mount, on which the guest
may be running. VMLINUX has the kernel's symbols.
"""

import os
import sys

import drgn
from drgn.helpers.linux import for_each_task

import ckptfs
from ckptfs.errors import CheckpointError


def program(place: str) -> drgn.Program:
    """Give drgn the memory of a core, a checkpoint or a mount."""
    prog = drgn.Program(drgn.host_platform)
    is_mount = os.path.isdir(place)
    try:
        memory = ckptfs.Mount(place).memory() if is_mount else ckptfs.open(place)
    except CheckpointError:  # it is a core, which has registers too
        prog.set_core_dump(place)
        return prog
    physical = memory.physical
    for start, length, _, _ in physical.regions:
        prog.add_memory_segment(start, length, lambda at, count, _, __: physical.read(at, count), True)
    prog.set_linux_kernel_custom(memory.vmcoreinfo(), is_mount)
    return prog


def main() -> None:
    """Print them."""
    prog = program(sys.argv[1])
    prog.load_debug_info([sys.argv[2]])
    for task in for_each_task(prog):
        print(f"{task.pid.value_():<6} {task.comm.string_().decode()}")
    if prog.core_dump_path is not None:
        print(prog.stack_trace(1))


if __name__ == "__main__":
    main()
