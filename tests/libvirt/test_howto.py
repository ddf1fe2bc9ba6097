"""Every command of "With libvirt", as it stands there."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples.test_documentation import commands
from tests.libvirt.conftest import NewDomain
from tests.libvirt.daemon import SHARED, Libvirtd, disk_of, on_mount
from tests.mount.harness import BIN, unmount_by_force

HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "libvirt.md"
MEMORY, _, DISKS = HOWTO.read_text().partition("\n## Disks\n")
MOUNT = """\
mkdir mnt
mount.ckptfs vm1.ckpt mnt -o ram=pc.ram:16M,allow_other,uid=libvirt-qemu,qmp=libvirt:vm1
virsh start vm1
"""


@pytest.fixture
def work(libvirtd: Libvirtd) -> Iterator[Path]:
    """Where the commands are run."""
    work = Path(tempfile.mkdtemp(dir=libvirtd.directory))
    work.chmod(0o777)
    yield work
    unmount_by_force(work / "mnt")


def run(script: str, libvirtd: Libvirtd, work: Path) -> str:
    """Run it, and return what it prints."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "LIBVIRT_DEFAULT_URI": libvirtd.uri,
    }
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_its_commands_work(libvirtd: Libvirtd, work: Path, domain: NewDomain) -> None:
    vm = domain("vm1")
    vm.start()
    try:
        run(commands(MEMORY), libvirtd, work)
        vm.goes_on()
        assert vm.state() == "running (unpaused)"
    finally:
        vm.remove()


def test_memory_and_disk_are_of_one_moment(libvirtd: Libvirtd, work: Path, domain: NewDomain) -> None:
    """The guest has gone on each time when it is put back to a moment."""
    vm = domain("vm1", backing=SHARED, metadata=on_mount(work / "mnt"), devices=disk_of(work / "disk.img"))
    blocks = commands(DISKS).split("virsh destroy vm1\n")
    assert len(blocks) == 3
    try:
        for before, block in zip((MOUNT, "virsh destroy vm1\n", "virsh destroy vm1\n"), blocks, strict=True):
            run(before + block, libvirtd, work)
            vm.goes_on()
        assert vm.state() == "running (restored)"
        assert f"{work}/later.qcow2" in libvirtd.virsh("domblklist", "vm1")
    finally:
        vm.remove()
