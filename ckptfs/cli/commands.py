"""The commands of ckptfs: one table, from which the parser, its help, the manual and completion follow.

A command's code is imported when the command runs, and not before: most of them need neither numpy nor trio.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ckptfs.errors import CommandError
from ckptfs.migration.size import parse_size_of

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
        return parse_size_of("size", text)
    except CommandError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A positive number of the command line."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expects a number from 1 on, not {text!r}")
    return int(text)


DIRECTORY = argument("directory", metavar="DIR", help="where the guest's RAM is mounted")
FOLLOWED = (
    argument("-q", "--quiet", action="store_true", help="say nothing but errors"),
    argument("--json", action="store_true", help="print progress and answer as JSON, an object a line"),
)
"""The options of every command that may take its time."""


def seconds(text: str) -> float:
    """A time of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"expects a number of seconds, up to 86400, not {text!r}")
    return value


OFFSET = argument("--offset", metavar="SIZE", type=size, default=0, help="where in FILE it begins (0x1000, 4k)")
JSON = argument("--json", action="store_true", help="print one JSON object, or an array of them for several")

COMMANDS = (
    Command(
        "save",
        "write a checkpoint",
        "Write a checkpoint, to the mounted file or to TARGET, and return when it is durable. Ctrl-C cancels; the "
        "former checkpoint is there until the new one is. "
        "With --qmp: save the machine behind that socket to FILE, without any mount, whatever memory it has. Its "
        "guest pauses for milliseconds where QEMU can write-protect its RAM (background-snapshot); otherwise pages "
        "are sent while it dirties them, and it pauses for the last (precopy).",
        (
            argument("directory", metavar="DIR_OR_FILE", help="where the guest's RAM is mounted; with --qmp, FILE"),
            argument("target", metavar="TARGET", nargs="?", help="another file than the mounted one: PATH or URI"),
            argument("--ram-only", action="store_true", help="without the device state of a machine"),
            argument("--force", action="store_true", help="replace the mounted file though somebody changed it"),
            argument(
                "--qmp", metavar="SOCKET", help="save the machine behind it (QEMU's -qmp unix:SOCKET) to FILE"
            ),
            argument(
                "--capture",
                choices=("auto", "snapshot", "precopy"),
                default="auto",
                help="with --qmp: how RAM is captured (auto: snapshot where QEMU can, else precopy)",
            ),
            argument(
                "--capture-rounds",
                metavar="N",
                type=count,
                default=10,
                help="with --qmp: rounds of precopy after which the guest is stopped for what is left (10)",
            ),
            *FOLLOWED,
        ),
        "ckptfs.cli.save:run",
    ),
    Command(
        "restore",
        "bring in everything",
        "Read all of RAM into memory; after that the checkpoint's file is no longer needed.",
        (DIRECTORY, *FOLLOWED),
        "ckptfs.cli.operate:restore",
    ),
    Command(
        "prefetch",
        "warm the page cache",
        "Have the kernel read RAM ahead: all of it, one block, or a part of one.",
        (
            DIRECTORY,
            argument("name", metavar="NAME", nargs="?", help="the block ram/NAME"),
            argument("start", metavar="START", nargs="?", help="where in the block it begins (0x1000, 4k)"),
            argument("length", metavar="LENGTH", nargs="?", help="how long the part is"),
            *FOLLOWED,
        ),
        "ckptfs.cli.operate:prefetch",
    ),
    Command(
        "reset",
        "drop what was written",
        "Drop every written page: RAM is the checkpoint again. Refused while a program may write.",
        (DIRECTORY, *FOLLOWED),
        "ckptfs.cli.operate:reset",
    ),
    Command(
        "cancel",
        "end the running save, restore or prefetch",
        "End what is running; nothing half-done stays under a final name.",
        (DIRECTORY, *FOLLOWED),
        "ckptfs.cli.operate:cancel",
    ),
    Command(
        "wait",
        "wait until no save or restore is running",
        "Wait until no save or restore is running. Exit code 1: the newest one has failed, or was cancelled.",
        (DIRECTORY, *FOLLOWED),
        "ckptfs.cli.operate:wait",
    ),
    Command(
        "umount",
        "unmount, and wait until the storage is free",
        "Unmount, and return when the daemon has ended and let go of its files. A running save is waited for; if "
        "it fails, nothing is unmounted. Says how much of RAM was not saved.",
        (
            DIRECTORY,
            argument("--save", action="store_true", help="save to the mounted file first"),
            *FOLLOWED,
        ),
        "ckptfs.cli.umount:run",
    ),
    Command(
        "status",
        "how a mount stands, for people",
        "Show how a mount stands: what a save or restore is doing, how pages stand, who waits, the last save and "
        "its pause, and who has RAM open. `DIR/status` has the same and more for programs.",
        (
            DIRECTORY,
            argument("-w", "--watch", action="store_true", help="show it again every second, until Ctrl-C"),
            argument(
                "--json", action="store_true", help="print DIR/status.json in one line, one a look with --watch"
            ),
        ),
        "ckptfs.cli.status:run",
    ),
    Command(
        "info",
        "what a checkpoint holds, or how a mount stands",
        "Show what a checkpoint holds: machine, RAM blocks, device sections, whether it is complete, and which "
        "QEMU was saved, if it remembers. "
        "Of a mounted directory: the same, and how its pages stand. Exit code 1: it is no sound checkpoint.",
        (
            argument("paths", metavar="FILE_OR_DIR", nargs="*", help="a checkpoint, or where one is mounted"),
            argument("--registers", action="store_true", help="of a FILE: the registers of each vCPU (x86-64)"),
            argument(
                "--devices",
                metavar="NAME",
                nargs="?",
                const="",
                help="of a FILE: the devices in it; with NAME, the fields of that one by name",
            ),
            argument("--xml", action="store_true", help="of a FILE: the XML of libvirt's domain alone"),
            OFFSET,
            JSON,
        ),
        "ckptfs.cli.info:run",
    ),
    Command(
        "qemu-args",
        "the arguments that start QEMU on the RAM of a mount, or of a file",
        "Print QEMU's arguments that make the RAM of this mount the machine's: "
        "qemu-system-x86_64 $(ckptfs qemu-args DIR) ... Devices are yours to add, the same as in the checkpoint. "
        "Of a FILE: those that map the file itself, private; `ckptfs vmstate FILE` writes what -incoming takes.",
        (
            argument("directory", metavar="FILE_OR_DIR", help="a checkpoint, or where one is mounted"),
            argument(
                "--share",
                choices=("on", "off"),
                help="where the guest writes: into this mount (on, the default), or into memory of its own (off, "
                "the default of a mount with ro), so that many guests run on one mount",
            ),
            argument(
                "--nodes",
                metavar="ID[,ID...]",
                help="RAM blocks in the order of the machine's NUMA nodes; needed if they differ in size",
            ),
        ),
        "ckptfs.cli.qemu_args:run",
    ),
    Command(
        "run",
        "let a machine go on from a checkpoint, or many clones of it",
        "Start QEMU on FILE in the place of this process: its memory is FILE itself, mapped private and read-only, "
        "so that nothing is loaded first and FILE stays as it is. The arguments are QEMU's: the same devices as in "
        "the checkpoint. With --count, {n} in them is a clone's number, and all clones end when this ends.",
        (
            argument("file", metavar="FILE", help="a checkpoint of a machine (mapped-ram)"),
            argument(
                "arguments", metavar="QEMU-ARGUMENT", nargs=argparse.REMAINDER, help="devices, as QEMU has them"
            ),
            argument("--count", metavar="N", type=count, help="start N clones, and end them all when this ends"),
            argument(
                "--directory",
                metavar="DIR",
                help="where clones have sockets, serial lines and logs (a new one in /tmp)",
            ),
            argument(
                "--no-snapshot",
                dest="snapshot",
                action="store_false",
                help="let clones write to their disks, each to its own ({n})",
            ),
            argument(
                "--record",
                metavar="SECONDS",
                type=seconds,
                help="keep what QEMU has touched of FILE after SECONDS, in FILE.working-set: later starts "
                "read that first",
            ),
            argument("--qemu", metavar="PROGRAM", help="the QEMU to start (default: the machine type's)"),
            argument("--show", action="store_true", help="print the command and start nothing"),
            OFFSET,
        ),
        "ckptfs.cli.run:run",
    ),
    Command(
        "verify",
        "whether a checkpoint is what was saved",
        "Read all that has a checksum, and compare; and hold the file against QEMU's rules. What ckptfs saves has "
        "a checksum for every 64 KiB of RAM, and for all that is beside it; a file of QEMU's has none. Exit code "
        "1: something is wrong, and what, with block and pages, is on stderr.",
        (
            argument("paths", metavar="FILE", nargs="+", help="a checkpoint"),
            OFFSET,
            argument("-q", "--quiet", action="store_true", help="say nothing but what is wrong"),
            JSON,
        ),
        "ckptfs.cli.verify:run",
    ),
    Command(
        "export",
        "write memory as other tools read it",
        "Write the memory of a checkpoint, or of a mount, to OUT: raw is a flat image by guest-physical address, "
        "elf a core for gdb, crash, drgn and makedumpfile, lime is for volatility3, and mapped-ram is another "
        "checkpoint, clean and compact. Only what has data is read, and OUT has holes elsewhere. It gets its name "
        "when it is whole, and replaces a file of that name: for mapped-ram a checkpoint alone. - is a pipe.",
        (
            argument("path", metavar="FILE_OR_DIR", help="a checkpoint, or where one is mounted"),
            argument("out", metavar="OUT", help="the file to write, or - for standard output"),
            argument(
                "--format", required=True, choices=("raw", "elf", "lime", "mapped-ram"), help="what OUT is to be"
            ),
            argument(
                "--map",
                metavar="ID@ADDRESS",
                action="append",
                default=[],
                help="where a RAM block is in physical memory, as in dimm0@4G+1G:0; repeat it for more blocks",
            ),
            OFFSET,
            *FOLLOWED,
        ),
        "ckptfs.cli.export:run",
    ),
    Command(
        "vmstate",
        "the stream from which QEMU starts on a file's RAM",
        "Write to the standard output what QEMU's -incoming takes when the RAM is FILE's, mapped as `run` does it.",
        (
            argument("file", metavar="FILE", help="a checkpoint of a machine (mapped-ram)"),
            OFFSET,
        ),
        "ckptfs.cli.run:run_vmstate",
    ),
)
"""All of ckptfs, in the order of its help."""
