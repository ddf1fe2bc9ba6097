"""ckptfs: the tool beside the mount. What it can do is in `commands`."""

import argparse
import os
import signal
import sys

from ckptfs import __version__
from ckptfs.cli.commands import COMMANDS
from ckptfs.errors import CkptfsError, CommandError

EXIT_FAILED = 1
EXIT_USAGE = 2
"""As argparse has it."""


def main() -> int:
    """Run ckptfs; returns 0, 1 if the thing examined or asked for failed, or 2 for wrong usage."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `ckptfs info FILE | head` ends as other tools do
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr] # paths go out as they came in
    arguments = parser().parse_args()
    try:
        return arguments.command.load()(arguments)  # type: ignore[no-any-return]
    except CommandError as error:
        print(f"ckptfs: {error}", file=sys.stderr)
        return EXIT_USAGE
    except CkptfsError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        name = "ckptfs" if error.filename is None else os.fsdecode(error.filename)
        print(f"{name}: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED


def parser() -> argparse.ArgumentParser:
    """The parser that the table of commands describes."""
    whole = argparse.ArgumentParser(prog="ckptfs", description="Examine checkpoints and mounts of guests' RAM.")
    whole.add_argument("--version", action="version", version=f"ckptfs {__version__}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        part = commands.add_parser(command.name, help=command.summary, description=command.description)
        for argument in command.arguments:
            part.add_argument(*argument.names, **argument.settings)
        part.set_defaults(command=command)
    return whole


if __name__ == "__main__":
    sys.exit(main())
