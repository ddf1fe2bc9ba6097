"""Completion for bash, zsh and fish, made by shtab from the parsers of ckptfs and mount.ckptfs.

``python -m ckptfs.cli.completion DIRECTORY`` writes it below DIRECTORY (as PREFIX/share), where the shells look.
shtab is needed for that, and not to run ckptfs. What an argument is completed with follows from its metavar.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import shtab

from ckptfs.cli import ckptfs, mount
from ckptfs.namespace.options import OPTIONS

PLACES = {
    "bash": "bash-completion/completions/{}",
    "zsh": "zsh/site-functions/_{}",
    "fish": "fish/vendor_completions.d/{}.fish",
}
"""Where a shell looks for the completion of a program, below PREFIX/share."""

_FILES = ("FILE", "SPEC", "SOCKET", "TARGET", "OUT", "PATH", "PROGRAM", "NAMESPACE")
"""Parts of the metavars of arguments that are files."""

_NAMES = [option.name + ("=" if option.value else "") for option in OPTIONS]

_MOUNT_OPTIONS = {
    "bash": "_ckptfs_mount_options",
    "zsh": "_ckptfs_mount_options",
    "fish": "(_ckptfs_mount_options)",
    "preamble": {
        "bash": f"""
_ckptfs_mount_options() {{
  local before=""
  [[ $1 != *,* ]] || before="${{1%,*}},"
  compgen -P "$before" -W "{" ".join(_NAMES)}" -- "${{1##*,}}"
}}
""",
        "zsh": f"""
_ckptfs_mount_options() {{
  _values -s , 'mount option' {" ".join(name.replace("=", ":value:") for name in _NAMES)}
}}
""",
        "fish": f"""
function _ckptfs_mount_options
  set before (string replace -r '[^,]*$' '' -- (commandline -ct))
  printf "$before%s\\n" {" ".join(_NAMES)}
end
""",
    },
}
"""Words of a list with commas between: what stands before the last comma stays."""


def main(directory: str) -> None:
    """Write all of it below ``directory``."""
    for parser in (ckptfs.parser(), mount.parser()):
        for each in _all_parsers(parser):
            _name_files(each)
        for shell, place in PLACES.items():
            path = Path(directory, place.format(parser.prog))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(shtab.complete(parser, shell))


def _all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for summary in action._choices_actions:
                action.choices[summary.dest].description = summary.help  # shells have one line for it
            yield from action.choices.values()


def _name_files(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        if "OPT[,OPT...]" in metavar:
            action.complete = _MOUNT_OPTIONS  # type: ignore[attr-defined]
        elif any(part in metavar for part in _FILES):
            action.complete = shtab.FILE  # type: ignore[attr-defined] # as shtab has it
        elif "DIR" in metavar:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(sys.argv[1])
