"""ckptfs: the tool beside the mount. What it can do is in `commands`."""

import argparse
import os
import signal
import sys
from typing import NoReturn

from ckptfs import __version__
from ckptfs.cli.commands import COMMANDS
from ckptfs.errors import CkptfsError, CommandError, likely

EXIT_FAILED = 1
EXIT_USAGE = 2
"""As argparse has it."""


def main() -> int:
    """Run ckptfs; returns 0, 1 if the thing examined or asked for failed, or 2 for wrong usage."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `ckptfs info FILE | head` ends as other tools do
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr] # paths go out as they came in
    arguments = _parse(sys.argv[1:])
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


class _Parser(argparse.ArgumentParser):
    """A user wants one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} ({self.prog} --help tells more)", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _parse(words: list[str]) -> argparse.Namespace:
    """The arguments; a word that is no command is answered with the likely one, and none with the help."""
    whole, names = parser(), [command.name for command in COMMANDS]
    if not words:
        whole.print_help(sys.stderr)
        sys.exit(EXIT_USAGE)
    if not words[0].startswith("-") and words[0] not in names:
        found = likely(words[0], names)
        whole.error(f"there is no command {words[0]!r}" + (f", did you mean {found!r}?" if found else ""))
    if "" in words and words[0] != "run":  # QEMU takes some
        whole.error("an argument is empty: is a variable of your script not set?")
    return whole.parse_args(words)


def parser() -> argparse.ArgumentParser:
    """The parser that the table of commands describes."""
    version = f"ckptfs {__version__}"
    whole = _Parser(
        prog="ckptfs",
        description="Save, restore and examine virtual machines' memory: mounted, in a file, or of a running QEMU.",
    )
    whole.add_argument("--version", action="version", version=version)
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        part = commands.add_parser(command.name, help=command.summary, description=command.description)
        part.add_argument("--version", action="version", version=version, help=argparse.SUPPRESS)
        for argument in command.arguments:
            part.add_argument(*argument.names, **argument.settings)
        part.set_defaults(command=command)
    return whole


if __name__ == "__main__":
    sys.exit(main())
