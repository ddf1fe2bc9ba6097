"""The manual pages and the completion: whole, whatever is added to the tables, and without a fault in form."""

import argparse
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptfs import __version__
from ckptfs.cli import ckptfs, completion, manual, mount
from ckptfs.cli.commands import COMMANDS
from ckptfs.cli.roff import Page
from ckptfs.guest.block import PageState
from ckptfs.migration.capabilities import CAPABILITIES
from ckptfs.migration.parameters import PARAMETERS
from ckptfs.namespace.ctl import COMMANDS as CTL_COMMANDS
from ckptfs.namespace.events import EVENTS
from ckptfs.namespace.options import OPTIONS
from ckptfs.namespace.status import BlockStatus, format_status, format_status_json
from ckptfs.namespace.tree import Tree, ram_xattrs
from ckptfs.physical.look import MAKERS
from tests.mount.harness import BIN
from tests.namespace.test_status import IDLE

Shown = Callable[[str], str]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A man path with all pages."""
    directory = tmp_path_factory.mktemp("man")
    manual.main(str(directory))
    return directory


@pytest.fixture(scope="module")
def shown(pages: Path) -> Shown:
    """`shown("man1/ckptfs.1")` is a page as people see it, in long lines."""

    def show(place: str) -> str:
        command = ["mandoc", "-T", "utf8", "-O", "width=999", pages / place]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.sub(".\b", "", text)

    return show


@pytest.mark.parametrize("place", manual.PAGES)
def test_a_page_has_no_fault(place: str, pages: Path) -> None:
    lint = subprocess.run(["mandoc", "-T", "lint", pages / place], capture_output=True, text=True)
    assert (lint.stdout, lint.stderr) == ("", "")
    man = subprocess.run(
        ["man", "--warnings=w", "--local-file", pages / place],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MANPAGER": "cat"},
    )
    assert (man.returncode, man.stderr) == (0, "")
    assert max(map(len, man.stdout.splitlines())) <= 80


def terms(text: str) -> set[str]:
    """All words of a page that could be something to type."""
    return set(re.split(r"[\s,|()\[\]=.;]+", text))


def test_mount_ckptfs_has_every_option(shown: Shown) -> None:
    for text in (shown("man8/mount.ckptfs.8"), run("mount.ckptfs", "--help")):
        found = terms(text)
        names = (*(option.name for option in OPTIONS), *PARAMETERS, *CAPABILITIES)
        assert {name.replace("-", "_") for name in names} <= found
        assert set(flags(mount.parser())) <= found


def test_ckptfs_has_every_command_and_argument(shown: Shown) -> None:
    text = shown("man1/ckptfs.1")
    for command, following in zip(COMMANDS, [*COMMANDS[1:], None], strict=True):
        start = text.index(f"\n   {command.name}\n")
        end = text.index(f"\n   {following.name}\n") if following else text.index("\nOUTPUT\n")
        for argument in command.arguments:
            value = argument.settings.get("metavar")
            assert {*argument.names} & terms(text[start:end]) or str(value) in text[start:end]


def test_the_tree_has_every_file_key_command_and_setting(shown: Shown) -> None:
    text = shown("man5/ckptfs.5")
    found = terms(text)
    assert {line.split(" ")[0] for line in format_status(IDLE).splitlines()} <= found
    document = json.loads(format_status_json(IDLE))
    assert {*document, *document["blocks"][0]} <= found
    assert {*CTL_COMMANDS, *PARAMETERS, *CAPABILITIES, *MAKERS} <= found
    assert {word for event in EVENTS for word in (event.name, event.member)} <= found
    assert {f"user.ckptfs.{name.decode().rpartition('.')[2]}" for name in ram_xattrs(BLOCK)} <= set(text.split())
    tree = Tree(["pc.ram"], has_vmstate=True, has_save_image=True, has_views=True)
    for node in tree.list(1):
        assert f"   {node.name.decode()}{'/NAME' if node.is_directory else ''} (r" in text
    for state in PageState:
        assert re.search(rf"\n +{state.value} +{re.escape(manual.PAGE_STATES[state])}\n", text)
    assert {
        setting.name for setting in (*PARAMETERS.values(), *CAPABILITIES.values()) if not says(setting)
    } == set()


BLOCK = BlockStatus("pc.ram", 4096, 1, 1, 0, 0, 0)


def says(setting: object) -> bool:
    """Whether a parameter or a capability means something, or has a reason not to."""
    return any(getattr(setting, name, "") for name in ("meaning", "no_effect", "unsupported"))


def flags(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]


def run(*command: str) -> str:
    return subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("program", ["ckptfs", "mount.ckptfs", "umount.fuse.ckptfs"])
def test_every_program_tells_its_version(program: str) -> None:
    assert run(program, "--version") == f"{program} {__version__}\n"


def test_what_would_be_a_request_is_text() -> None:
    page = Page("x", 1, "y", version="1", date="2026-01-01")
    page.text(".so /etc/passwd", "a\\fB `-x` 'b'", "    .nf\n    'x'")
    lines = str(page).splitlines()
    assert "\\&.so /etc/passwd" in lines
    assert "a\\efB \\fB\\-x\\fR \\(aqb\\(aq" in lines
    assert lines[-4:-2] == ["\\&.nf", "\\(aqx\\(aq"]


# --- completion -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("share")
    completion.main(str(directory))
    return directory


COMPLETE = """
. {script}
cd {directory}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
COMP_LINE="${{COMP_WORDS[*]}}"; COMP_POINT=${{#COMP_LINE}}
$(complete -p {program} | sed -n 's/.* -F \\([^ ]*\\) .*/\\1/p') {program} "${{COMP_WORDS[COMP_CWORD]}}" ""
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(share: Path, directory: Path, words: str) -> set[str]:
    """What bash offers for the last of the words, which may be ''."""
    program = words.split()[0]
    script = share / completion.PLACES["bash"].format(program)
    bash = COMPLETE.format(script=script, directory=directory, words=words, program=program)
    result = subprocess.run(["bash", "--norc", "-c", bash], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return set(result.stdout.split())


def test_bash_completes(share: Path, tmp_path: Path) -> None:
    (tmp_path / "vm1.ckpt").touch()
    (tmp_path / "vm1").mkdir()
    offered = completed(share, tmp_path, "ckptfs ''")
    assert {command.name for command in COMMANDS} <= offered
    assert completed(share, tmp_path, "ckptfs sa") == {"save"}
    assert completed(share, tmp_path, "ckptfs save --capt") == {"--capture", "--capture-rounds"}
    assert completed(share, tmp_path, "ckptfs save --capture ''") == {"auto", "snapshot", "precopy"}
    assert completed(share, tmp_path, "ckptfs restore vm") == {"vm1"}
    assert completed(share, tmp_path, "ckptfs info vm") == {"vm1", "vm1.ckpt"}
    assert completed(share, tmp_path, "mount.ckptfs vm") == {"vm1", "vm1.ckpt"}
    assert completed(share, tmp_path, "mount.ckptfs vm1.ckpt vm") == {"vm1"}
    assert completed(share, tmp_path, "mount.ckptfs vm1.ckpt vm1 -o r") == {"ram=", "ro", "rw", "region="}
    assert completed(share, tmp_path, "mount.ckptfs vm1.ckpt vm1 -o ro,qm") == {"ro,qmp="}


def test_all_shells_have_all_commands(share: Path) -> None:
    for place in completion.PLACES.values():
        text = (share / place.format("ckptfs")).read_text()
        assert all(command.name in text for command in COMMANDS)
        assert (share / place.format("mount.ckptfs")).exists()
    assert ckptfs.parser().prog == "ckptfs"
