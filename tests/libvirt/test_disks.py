"""Memory and disk of one moment, of a guest that writes both: it goes on where it was, and notices if it is not.

How to do it with memory on a mount, and by libvirt's own snapshots, is in "With libvirt", which is run as it is.
"""

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import RunCkptfs
from tests.libvirt.conftest import NewDomain
from tests.libvirt.daemon import Libvirtd, disk_of
from tests.mount.conftest import Mount


def test_a_checkpoint_and_a_disk_snapshot_of_a_suspended_domain(
    libvirtd: Libvirtd, domain: NewDomain, mount: Mount, tmp_path: Path, run_ckptfs: RunCkptfs
) -> None:
    checkpoint = tmp_path / "checkpoint"
    vm = domain("vm", devices=disk_of(libvirtd.directory / "disk.img"))
    virsh, after = libvirtd.virsh, libvirtd.directory / "after.qcow2"
    vm.start()
    virsh("suspend", "vm")
    virsh("snapshot-create-as", "vm", "moment", "--disk-only", "--no-metadata", "--diskspec", f"vda,file={after}")
    shutil.copy(after, tmp_path / "moment.qcow2")
    run_ckptfs("save", "--qmp", "libvirt:vm", "--libvirt-uri", libvirtd.uri, checkpoint)
    assert vm.state() == "paused (user)"
    virsh("resume", "vm")
    vm.goes_on()
    virsh("destroy", "vm")
    mounted = mount(checkpoint, f"allow_other,uid=libvirt-qemu,libvirt_uri={libvirtd.uri}")
    for _ in range(2):  # as often as one likes
        shutil.copy(tmp_path / "moment.qcow2", after)
        virsh("restore", mounted.path / "libvirt-save", "--running")
        vm.goes_on()
        virsh("destroy", "vm")
        mounted.ctl("reset")
    virsh("restore", mounted.path / "libvirt-save", "--running")
    with pytest.raises(AssertionError, match="is wrong"):
        vm.goes_on()
    virsh("destroy", "vm")
