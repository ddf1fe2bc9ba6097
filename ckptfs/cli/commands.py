"""The commands of ckptfs: one table, from which the parser, its help, the manual and completion follow.

A command's code is imported when the command runs, and not before: most of them need neither numpy nor trio.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ckptfs.errors import CommandError
from ckptfs.migration.size import parse_size

Run = Callable[[argparse.Namespace], int]


@dataclass(frozen=True)
class Argument:
    """One argument of a command: its flags, or the name of a positional one, and what argparse is told of it."""

    names: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A command. ``summary`` is one line for the list of all; ``run`` is ``module:function``.

    That function takes the parsed arguments and returns the exit code: 0, or 1 where the thing examined or asked
    for failed. It raises CommandError for wrong usage (exit code 2), another CkptfsError or OSError for a failure.
    """

    name: str
    summary: str
    description: str
    arguments: tuple[Argument, ...]
    run: str

    def load(self) -> Run:
        """Import the code that runs it."""
        module, _, function = self.run.partition(":")
        run: Run = getattr(import_module(module), function)
        return run


def argument(*names: str, **settings: Any) -> Argument:
    """An argument, in argparse's words."""
    return Argument(names, settings)


def size(text: str) -> int:
    """A SIZE of the command line, in bytes."""
    try:
        return parse_size(text)
    except CommandError as error:
        raise argparse.ArgumentTypeError(f"bad size {text!r}: {error}") from None


JSON = argument("--json", action="store_true", help="print one JSON object")

COMMANDS = (
    Command(
        "info",
        "what a checkpoint holds, or how a mount stands",
        "Show what a checkpoint holds: machine, RAM blocks, device sections, whether it is complete. "
        "Of a mounted directory: the same, and how its pages stand. Exit code 1: it is no sound checkpoint.",
        (
            argument("path", metavar="FILE_OR_DIR", help="a checkpoint, or where one is mounted"),
            argument("--offset", metavar="SIZE", type=size, default=0, help="where in FILE it begins (0x1000, 4k)"),
            JSON,
        ),
        "ckptfs.cli.info:run",
    ),
    Command(
        "qemu-args",
        "the arguments that start QEMU on a mount's RAM",
        "Print QEMU's arguments that make the RAM of this mount the machine's: "
        "qemu-system-x86_64 $(ckptfs qemu-args DIR) ... Devices are yours to add, the same as in the checkpoint.",
        (
            argument("directory", metavar="DIR", help="where the guest's RAM is mounted"),
            argument(
                "--share",
                choices=("on", "off"),
                help="on: the guest writes into this mount (the default); off: into memory of its own, so that "
                "many guests run on one mount (the default of a mount with ro)",
            ),
            argument(
                "--nodes",
                metavar="ID[,ID...]",
                help="RAM blocks in the order of the machine's NUMA nodes; needed if they differ in size",
            ),
        ),
        "ckptfs.cli.qemu_args:run",
    ),
)
"""All of ckptfs, in the order of its help."""
