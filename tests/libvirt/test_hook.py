"""The hook beside others, and what it relies on: when libvirt calls it, and what is there then."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.libvirt.conftest import NewDomain
from tests.libvirt.daemon import HOOK, SHARED, Libvirtd

RECORDER = """\
#!{python}
import pathlib, re, sys
name, operation, moment = sys.argv[1:4]
known = re.search("<domain [^>]*id=", sys.stdin.read()) is not None
folders = list(pathlib.Path("{memory}/libvirt/qemu").glob("*-" + name))
files = [[path.name for path in folder.iterdir()] for folder in folders]
with open("{log}", "a") as file:
    print(operation, moment, "id" if known else "no id", *files, file=file)
"""


@pytest.fixture
def recorder(libvirtd: Libvirtd) -> Iterator[Path]:
    """Where another hook writes what it was called with."""
    log, hook = libvirtd.directory / "hooks.log", libvirtd.hooks / "recorder"
    hook.write_text(RECORDER.format(python=sys.executable, memory=libvirtd.memory, log=log))
    hook.chmod(0o755)
    yield log
    hook.unlink()


def test_what_is_there_when_libvirt_calls(recorder: Path, domain: NewDomain) -> None:
    """A domain without a mount is none of its business, and has ordinary memory."""
    vm = domain("vm", backing=SHARED)
    vm.start()
    vm.libvirtd.virsh("destroy", "vm")
    assert recorder.read_text().splitlines() == [
        "prepare begin id",
        "start begin id []",
        "started begin id ['pc.ram']",
        "stopped end no id",
        "release end no id",
    ]


@pytest.mark.parametrize(
    "operation",
    [("prepare", "begin"), ("start", "begin"), ("started", "begin"), ("restore", "begin"), ("release", "end")],
)
def test_others_are_left_alone(operation: tuple[str, str]) -> None:
    """It says nothing either, as what a hook prints before a restore is the domain's new XML."""
    xml = "<domain type='kvm' id='1'>\n  <name>vm</name>\n</domain>\n"
    done = subprocess.run([HOOK, "vm", *operation, "-"], input=xml, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
