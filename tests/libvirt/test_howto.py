"""Every command of "With libvirt", as it stands there, with a domain vm1 that has a disk."""

import os
import subprocess
from pathlib import Path

from tests.examples.test_documentation import commands
from tests.libvirt.conftest import NewDomain
from tests.libvirt.daemon import Libvirtd
from tests.mount.harness import BIN, unmount_by_force

HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "libvirt.md"
DISK = "<disk type='file'><driver type='raw'/><source file='{}'/><target dev='vda' bus='virtio'/></disk>"


def test_its_commands_work(libvirtd: Libvirtd, domain: NewDomain) -> None:
    work = libvirtd.directory / "howto"
    work.mkdir()
    work.chmod(0o777)
    disk = work / "disk.img"
    with disk.open("wb") as file:
        file.truncate(1 << 20)
    vm = domain("vm1", devices=DISK.format(disk))
    vm.start()
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "LIBVIRT_DEFAULT_URI": libvirtd.uri,
    }
    try:
        done = subprocess.run(
            ["bash", "-eux", "-c", commands(HOWTO)],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout
        vm.goes_on()
        assert vm.state().startswith("running")
        assert f"vda      {work}/after.qcow2" in done.stdout
    finally:
        vm.remove()
        unmount_by_force(work / "mnt")
