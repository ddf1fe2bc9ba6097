"""Every command that the documentation shows, as it stands there."""

import re
import runpy
from pathlib import Path

import pytest

from tests.examples.conftest import EXAMPLES, ROOT, Run

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/howto/*.md"))]
DOCUMENTS.remove(ROOT / "docs" / "howto" / "libvirt.md")  # it takes a libvirtd: tests/libvirt
DOCUMENTS.remove(ROOT / "docs" / "howto" / "move.md")  # it takes two hosts and a store: tests/stores


def commands(text: str) -> str:
    """All blocks of shell commands in a document, one after the other."""
    return "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_its_commands_work(document: Path, run: Run) -> None:
    script = commands(document.read_text())
    assert script
    run(script)


def test_the_walk_is_an_example() -> None:
    first, *_ = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert (EXAMPLES / "walk.sh").read_text().endswith("\n" + first)


@pytest.mark.parametrize(
    "document", sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")}), ids=lambda path: path.name
)
def test_its_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_its_pictures_are_as_they_are_drawn() -> None:
    directory = ROOT / "docs" / "pictures"
    drawn = runpy.run_path(str(directory / "draw.py"))["PICTURES"]
    assert {name: (directory / f"{name}.svg").read_text() for name in drawn} == {
        name: draw().svg() for name, draw in drawn.items()
    }
