"""ckptfs: the tool beside the mount."""

import argparse
import json
import os
import signal
import sys

from ckptfs.errors import CkptfsError, CommandError
from ckptfs.migration.size import parse_size

EXIT_BAD = 1
EXIT_USAGE = 2
"""As argparse has it."""


def main() -> int:
    """Run ckptfs; returns 0, 1 if the thing examined is bad, or 2 for wrong usage."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `ckptfs info FILE | head` ends as other tools do
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr] # paths go out as they came in
    arguments = _parser().parse_args()
    try:
        text: str = arguments.run(arguments)
    except CommandError as error:
        print(f"ckptfs: {error}", file=sys.stderr)
        return EXIT_USAGE
    except CkptfsError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD
    except OSError as error:
        print(f"{os.fsdecode(error.filename)}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ckptfs", description="Examine checkpoints and mounts of guests' RAM.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    info = commands.add_parser(
        "info",
        help="what a checkpoint holds, or how a mount stands",
        description="Show what a checkpoint holds: machine, RAM blocks, device sections, whether it is complete. "
        "Of a mounted directory: the same, and how its pages stand. Exit code 1: it is no sound checkpoint.",
    )
    info.add_argument("path", metavar="FILE_OR_DIR", help="a checkpoint, or where one is mounted")
    info.add_argument(
        "--offset", metavar="SIZE", type=_size, default=0, help="where in FILE it begins (0x1000, 4k)"
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)

    qemu_args = commands.add_parser(
        "qemu-args",
        help="the arguments that start QEMU on a mount's RAM",
        description="Print QEMU's arguments that make the RAM of this mount the machine's: "
        "qemu-system-x86_64 $(ckptfs qemu-args DIR) ... Devices are yours to add, the same as in the checkpoint.",
    )
    qemu_args.add_argument("directory", metavar="DIR", help="where the guest's RAM is mounted")
    qemu_args.add_argument(
        "--share",
        choices=("on", "off"),
        help="on: the guest writes into this mount (the default); off: into memory of its own, so that many "
        "guests run on one mount (the default of a mount with ro)",
    )
    qemu_args.add_argument(
        "--nodes",
        metavar="ID[,ID...]",
        help="RAM blocks in the order of the machine's NUMA nodes; needed if they differ in size",
    )
    qemu_args.set_defaults(run=_qemu_args)
    return parser


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except CommandError as error:
        raise argparse.ArgumentTypeError(f"bad size {text!r}: {error}") from None


def _info(arguments: argparse.Namespace) -> str:
    from ckptfs.cli import info  # with numpy, which the other commands do without
    from ckptfs.cli.mounted import is_dead_mount

    if os.path.isdir(arguments.path) or is_dead_mount(arguments.path):
        document = info.describe_mount(arguments.path)
        text = info.format_mount
    else:
        document = info.describe_file(arguments.path, arguments.offset)
        text = info.format_file
    return json.dumps(document, indent=2) if arguments.json else text(document)


def _qemu_args(arguments: argparse.Namespace) -> str:
    from ckptfs.cli.qemu_args import qemu_args

    nodes = arguments.nodes.split(",") if arguments.nodes else None
    return " ".join(qemu_args(arguments.directory, arguments.share, nodes))


if __name__ == "__main__":
    sys.exit(main())
