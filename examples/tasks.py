#!/usr/bin/env python3
"""tasks.py CORE VMLINUX: the tasks of a guest, and of a core with registers where its first CPU is, by drgn.

CORE is views/vmcore of a mount, or a checkpoint without any mount. VMLINUX has the kernel's symbols.
"""

import sys

import drgn
from drgn.helpers.linux import for_each_task

import ckptfs
from ckptfs.errors import CheckpointError


def program(path: str) -> drgn.Program:
    """Give drgn the memory of a core or a checkpoint."""
    prog = drgn.Program(drgn.host_platform)
    try:
        checkpoint = ckptfs.open(path)
    except CheckpointError:  # it is a core, which has registers too
        prog.set_core_dump(path)
        return prog
    memory = checkpoint.physical
    for start, length, _, _ in memory.regions:
        prog.add_memory_segment(start, length, lambda at, count, _, __: memory.read(at, count), True)
    prog.set_linux_kernel_custom(checkpoint.vmcoreinfo(), False)
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
