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
        raise argparse.ArgumentTypeError(f"expects a number, 1 or more, not {text!r}")
    return int(text)


DIRECTORY = argument("directory", metavar="DIR", help="where the guest's RAM is mounted")
FOLLOWED = (
    argument("-q", "--quiet", action="store_true", help="print only errors"),
    argument("--json", action="store_true", help="print progress and answer as JSON, one object per line"),
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


OFFSET = argument(
    "--offset", metavar="SIZE", type=size, default=0, help="where in FILE the checkpoint begins (0x1000, 4k)"
)
MAP = argument(
    "--map",
    metavar="ID@ADDRESS",
    action="append",
    default=[],
    help="where a RAM block is in physical memory, as in dimm0@4G+1G:0; repeat it for more blocks",
)
JSON = argument("--json", action="store_true", help="print a JSON object; for several files, an array of them")

COMMANDS = (
    Command(
        "save",
        "write a checkpoint",
        "Write a checkpoint to the mounted file, or to TARGET, and return when it is on disk. Ctrl-C cancels. The"
        " former checkpoint stays until the new one is complete. With --qmp: save the machine behind that socket"
        " to FILE, without a mount, whatever memory it has. If QEMU can write-protect its RAM, the guest pauses"
        " for milliseconds (background-snapshot). Otherwise QEMU sends pages while the guest dirties them, and"
        " pauses it for the last ones (precopy).",
        (
            argument("directory", metavar="DIR_OR_FILE", help="where the guest's RAM is mounted; with --qmp, FILE"),
            argument(
                "target", metavar="TARGET", nargs="?", help="save to this PATH or URI, not to the mounted file"
            ),
            argument("--ram-only", action="store_true", help="leave out the device state"),
            argument(
                "--force", action="store_true", help="replace the mounted file even if somebody else has changed it"
            ),
            argument(
                "--qmp",
                metavar="SOCKET|libvirt:NAME",
                help="save the machine behind it (QEMU's -qmp unix:SOCKET, or a domain of libvirt) to FILE",
            ),
            argument(
                "--format",
                choices=("mapped-ram", "libvirt"),
                default="mapped-ram",
                help="a checkpoint of QEMU's, or a save image, which `virsh restore` loads",
            ),
            argument("--libvirt-uri", metavar="URI", help="where libvirt is (default: as for virsh)"),
            argument(
                "--capture",
                choices=("auto", "snapshot", "precopy"),
                default="auto",
                help="with --qmp: how to capture RAM (auto: snapshot if QEMU can, otherwise precopy)",
            ),
            argument(
                "--capture-rounds",
                metavar="N",
                type=count,
                default=10,
                help="with --qmp: pause the guest for the rest after N rounds of precopy (10)",
            ),
            *FOLLOWED,
        ),
        "ckptfs.cli.save:run",
    ),
    Command(
        "restore",
        "read all of RAM into memory",
        "Read all of RAM into memory. Afterwards the checkpoint's file is no longer needed.",
        (DIRECTORY, *FOLLOWED),
        "ckptfs.cli.operate:restore",
    ),
    Command(
        "prefetch",
        "read RAM ahead, into the page cache",
        "Have the kernel read RAM into its page cache: all of it, one block, or a part of one.",
        (
            DIRECTORY,
            argument("name", metavar="NAME", nargs="?", help="the block ram/NAME"),
            argument(
                "start",
                metavar="START",
                type=size,
                nargs="?",
                help="where in the block the part begins (0x1000, 4k)",
            ),
            argument("length", metavar="LENGTH", type=size, nargs="?", help="how long the part is"),
            *FOLLOWED,
        ),
        "ckptfs.cli.operate:prefetch",
    ),
    Command(
        "reset",
        "drop what was written",
        "Drop all written pages: RAM is the checkpoint again. Refused while a program has RAM open for writing.",
        (DIRECTORY, *FOLLOWED),
        "ckptfs.cli.operate:reset",
    ),
    Command(
        "cancel",
        "cancel the running save, restore or prefetch",
        "Cancel what is running. Nothing unfinished stays under a final name.",
        (DIRECTORY, *FOLLOWED),
        "ckptfs.cli.operate:cancel",
    ),
    Command(
        "wait",
        "wait until no save or restore is running",
        "Wait until no save or restore is running. The exit code is 1 if the newest one failed or was cancelled.",
        (DIRECTORY, *FOLLOWED),
        "ckptfs.cli.operate:wait",
    ),
    Command(
        "umount",
        "unmount, and wait until the storage is free",
        "Unmount, and return when the daemon has ended and closed its files. Waits for a running save first; if"
        " that fails, nothing is unmounted. Says how much RAM was not saved.",
        (
            DIRECTORY,
            argument("--save", action="store_true", help="save to the mounted file first"),
            *FOLLOWED,
        ),
        "ckptfs.cli.umount:run",
    ),
    Command(
        "status",
        "show what a mount is doing",
        "Show what a save or restore is doing, how much of RAM was read and written, who waits, the last save and"
        " its pause, and who has RAM open. Programs read `DIR/status` and `DIR/status.json`.",
        (
            DIRECTORY,
            argument("-w", "--watch", action="store_true", help="show it again every second, until Ctrl-C"),
            argument(
                "--json",
                action="store_true",
                help="print DIR/status.json on one line; with --watch, a line every second",
            ),
        ),
        "ckptfs.cli.status:run",
    ),
    Command(
        "info",
        "show what a checkpoint or a mount contains",
        "Show what a checkpoint contains: machine, RAM blocks, device sections, whether it is complete, and which"
        " QEMU was saved, if the checkpoint says so. For a mounted directory, also show how many pages were read"
        " and written. The exit code is 1 if a file is not a sound checkpoint.",
        (
            argument("paths", metavar="FILE_OR_DIR", nargs="*", help="a checkpoint, or where one is mounted"),
            argument(
                "--registers", action="store_true", help="for a FILE: show the registers of each vCPU (x86-64)"
            ),
            argument(
                "--devices",
                metavar="NAME",
                nargs="?",
                const="",
                help="for a FILE: list its devices; with NAME, show the fields of that device",
            ),
            argument("--xml", action="store_true", help="for a FILE: print only the XML of libvirt's domain"),
            OFFSET,
            JSON,
        ),
        "ckptfs.cli.info:run",
    ),
    Command(
        "diff",
        "compare the memory of two checkpoints or mounts",
        "Show which pages differ between A and B, in runs, by RAM block and by guest-physical address. Each is a "
        "checkpoint (PATH, or file:PATH,offset=SIZE), a plain stream, or where one is mounted, with or without a "
        "guest. Pages that had data in neither when the command began are not read: to see what a running guest "
        "writes, save it and compare the checkpoint. Exit code: 0 equal, 1 different, 2 trouble, as of diff(1).",
        (
            argument("a", metavar="A", help="a checkpoint, or where one is mounted"),
            argument("b", metavar="B", help="what it is compared with"),
            argument("-q", "--quiet", action="store_true", help="say nothing, and stop at the first difference"),
            MAP,
            argument("--json", action="store_true", help="print one JSON object"),
        ),
        "ckptfs.cli.diff:run",
    ),
    Command(
        "map",
        "a picture of pages",
        "Show memory as a picture, by guest-physical address where that is known: pages of zeros, those in the "
        "checkpoint, and of a mount those that were read and written. With B: pages that are equal, and those that "
        "differ. On a terminal it fits the window; -o writes it to a file.",
        (
            argument("a", metavar="FILE_OR_DIR", help="a checkpoint, or where one is mounted"),
            argument("b", metavar="B", nargs="?", help="another one, that it is compared with"),
            argument("-o", "--output", metavar="OUT", help="write OUT.png (needs ckptfs[pictures]) or OUT.svg"),
            MAP,
            argument("--watch", action="store_true", help="of a mount: again every second, until Ctrl-C"),
        ),
        "ckptfs.cli.map:run",
    ),
    Command(
        "qemu-args",
        "print the arguments that start QEMU on a mount or a file",
        "Print the arguments that make a mount QEMU's memory: qemu-system-x86_64 $(ckptfs qemu-args DIR) ... Add"
        " the same devices as in the checkpoint. For a FILE, print the arguments that map the file itself,"
        " privately; `ckptfs vmstate FILE` writes what -incoming needs. Where there are none, it prints an"
        " argument that QEMU refuses, so that no other machine boots from these disks.",
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
                help="the RAM blocks in the order of the machine's NUMA nodes; needed if they differ in size",
            ),
            OFFSET,
        ),
        "ckptfs.cli.qemu_args:run",
    ),
    Command(
        "run",
        "run a machine from a checkpoint, or many clones of it",
        "Run QEMU on FILE in place of this process. QEMU maps FILE itself as its memory, privately: nothing is"
        " loaded first, and FILE does not change. The arguments are QEMU's: the same devices as in the"
        " checkpoint. With --count, {n} in them is the clone's number, and all clones end when this command ends.",
        (
            argument("file", metavar="FILE", help="a checkpoint of a machine (mapped-ram)"),
            argument(
                "arguments",
                metavar="QEMU-ARGUMENT",
                nargs=argparse.REMAINDER,
                help="QEMU's arguments for the devices",
            ),
            argument("--count", metavar="N", type=count, help="start N clones; they end when this command ends"),
            argument(
                "--directory",
                metavar="DIR",
                help="where the clones' sockets, serial lines and logs go (default: a new one in /tmp)",
            ),
            argument(
                "--no-snapshot",
                dest="snapshot",
                action="store_false",
                help="let clones write to their disks; give each its own ({n})",
            ),
            argument(
                "--record",
                metavar="SECONDS",
                type=seconds,
                help="after SECONDS, write down in FILE.working-set what QEMU has read of FILE; later starts read"
                " that first",
            ),
            argument("--qemu", metavar="PROGRAM", help="the QEMU to start (default: the one for the machine type)"),
            argument("--show", action="store_true", help="only print the command"),
            OFFSET,
        ),
        "ckptfs.cli.run:run",
    ),
    Command(
        "verify",
        "check that a checkpoint is what was saved",
        "Check the file against QEMU's rules, and everything in it against its checksums. ckptfs saves a checksum"
        " for every 64 KiB of RAM and for everything else; files that QEMU wrote have none. The exit code is 1 if"
        " something is wrong; standard error says what, with block and pages.",
        (
            argument("paths", metavar="FILE", nargs="+", help="a checkpoint"),
            OFFSET,
            argument("-q", "--quiet", action="store_true", help="print only what is wrong"),
            JSON,
        ),
        "ckptfs.cli.verify:run",
    ),
    Command(
        "export",
        "write memory in another tool's format",
        "Write the memory of a checkpoint or a mount to OUT: raw is a flat image by guest-physical address, elf a"
        " core for gdb, crash, drgn and makedumpfile, lime an image for volatility3, mapped-ram a clean and"
        " compact checkpoint, and libvirt one for `virsh restore`."
        " Only pages with data are read; elsewhere OUT has holes. OUT appears under its name"
        " when it is complete, and replaces a file of that name (mapped-ram, libvirt: only a checkpoint). -"
        " writes to a pipe.",
        (
            argument("path", metavar="FILE_OR_DIR", help="a checkpoint, or where one is mounted"),
            argument("out", metavar="OUT", help="the file to write, or - for standard output"),
            argument(
                "--format",
                required=True,
                choices=("raw", "elf", "lime", "mapped-ram", "libvirt"),
                help="the format of OUT",
            ),
            MAP,
            OFFSET,
            *FOLLOWED,
        ),
        "ckptfs.cli.export:run",
    ),
    Command(
        "vmstate",
        "write the stream that starts QEMU on a file's RAM",
        "Write to standard output what QEMU's -incoming needs when its RAM is FILE, mapped as `run` maps it.",
        (
            argument("file", metavar="FILE", help="a checkpoint of a machine (mapped-ram)"),
            OFFSET,
        ),
        "ckptfs.cli.run:run_vmstate",
    ),
)
"""All of ckptfs, in the order of its help."""
