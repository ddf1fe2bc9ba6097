"""Save images that ckptfs writes; `virsh restore` is their judge, and a guest that knows its memory."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import RunCkptfs
from tests.doubles.migration_file import MigrationFile
from tests.libvirt.conftest import NewDomain
from tests.libvirt.daemon import Domain
from tests.libvirt.events import PAUSED, RESTORED, lifecycle
from tests.mount.conftest import Mount

RESTORES = {
    "plain": (),
    "bypass": ("--bypass-cache",),
    "parallel": ("--parallel-channels", "2"),
    "both": ("--parallel-channels", "2", "--bypass-cache"),
}


@pytest.fixture
def vm(domain: NewDomain) -> Domain:
    vm = domain("vm")
    vm.start()
    return vm


def restore(vm: Domain, image: Path, *options: str) -> None:
    with lifecycle(vm) as told:
        vm.libvirtd.virsh("restore", image, *options)
        assert (set(told()), vm.state()) == (RESTORED, "running (restored)")
    vm.goes_on()


@pytest.mark.parametrize("kind", ["raw", "sparse"])
def test_saved_over_and_restored_in_every_way(
    vm: Domain, mount: Mount, tmp_path: Path, kind: str, run_ckptfs: RunCkptfs
) -> None:
    """Mapped-ram below a header that says sparse, whatever it said before; the domain is as it was."""
    image = tmp_path / "image"
    vm.libvirtd.virsh("save", "vm", image, "--image-format", kind)
    before = run_ckptfs("info", "--xml", image).stdout
    mounted = mount(image)
    mounted.ctl("save")
    mounted.umount()
    told = json.loads(run_ckptfs("info", "--json", image).stdout)
    assert told["libvirt"] == {"domain": "vm", "format": "sparse", "was-running": True}
    assert run_ckptfs("info", "--xml", image).stdout == before
    assert run_ckptfs("verify", image).stdout.startswith(f"{image}: sound: ")
    for options in RESTORES.values() if kind == "sparse" else [()]:
        restore(vm, image, *options)
        vm.libvirtd.virsh("destroy", "vm")


def test_saved_over_as_a_plain_stream(vm: Domain, mount: Mount, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    """For a libvirt before 11.2, which knows no sparse ones."""
    image = tmp_path / "image"
    vm.libvirtd.virsh("suspend", "vm")
    vm.libvirtd.virsh("save", "vm", image, "--image-format", "sparse")
    mounted = mount(image, "mapped_ram=off,multifd=off")
    mounted.ctl("save")
    mounted.umount()
    told = json.loads(run_ckptfs("info", "--json", image).stdout)
    assert told["libvirt"] == {"domain": "vm", "format": "raw", "was-running": False}
    assert (told["format"], told["run-state"]) == ("precopy", "paused")
    with lifecycle(vm) as told:
        vm.libvirtd.virsh("restore", image)
        assert (told(), vm.state()) == (["Started Restored", "Suspended Restored"], "paused (migrating)")
        vm.libvirtd.virsh("resume", "vm")
    vm.goes_on()


def test_made_of_a_machine_that_runs(vm: Domain, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    """libvirt's own save would have stopped it. Saved once more, over itself, it remains a save image."""
    image, bound = tmp_path / "image", ("--qmp", "libvirt:vm", "--libvirt-uri", vm.libvirtd.uri)
    with lifecycle(vm) as told:
        for options in (("--format", "libvirt"), ()):
            run_ckptfs("save", *bound, *options, image)
            assert (told(), vm.state()) == (PAUSED, "running (unpaused)")
            vm.goes_on()
    assert run_ckptfs("verify", image).stdout.startswith(f"{image}: sound: ")
    vm.libvirtd.virsh("destroy", "vm")
    restore(vm, image)


def test_made_of_a_checkpoint_that_remembers_its_domain(
    vm: Domain, mount: Mount, tmp_path: Path, run_ckptfs: RunCkptfs
) -> None:
    checkpoint, image = tmp_path / "checkpoint", tmp_path / "image"
    run_ckptfs("save", "--qmp", "libvirt:vm", "--libvirt-uri", vm.libvirtd.uri, checkpoint)
    vm.libvirtd.virsh("destroy", "vm")
    mounted = mount(checkpoint)
    answer = mounted.ctl(f"save libvirt {image}")
    assert re.match(r"ok saved \S+/image", answer)
    mounted.umount()
    restore(vm, image)
    vm.libvirtd.virsh("destroy", "vm")
    run_ckptfs("export", "--format", "libvirt", checkpoint, tmp_path / "exported")
    restore(vm, tmp_path / "exported")


def test_what_has_no_domain_makes_no_save_image(mount: Mount, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    MigrationFile(alignment=4096).write(tmp_path / "checkpoint")
    error = run_ckptfs("export", "--format", "libvirt", tmp_path / "checkpoint", tmp_path / "image", code=1).stderr
    assert "libvirt's XML of this machine is not known" in error
    mounted = mount(tmp_path / "fresh", "ram=pc.ram:1M")
    with pytest.raises(OSError, match="would be RAM alone"):
        mounted.ctl("save libvirt")
    assert sorted(path.name for path in tmp_path.iterdir() if "image" in path.name) == []


def test_an_image_that_can_not_be_read_is_not_replaced(mount: Mount, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.write_bytes(b"LibvirtQemudSave" + bytes([2, 0, 0, 0, 4, 0, 0, 0]) + bytes(100))
    before = packed.read_bytes()
    mounted = mount(tmp_path / "fresh", "ram=pc.ram:1M")
    with pytest.raises(OSError, match="packed"):
        mounted.ctl(f"save {packed}")
    assert packed.read_bytes() == before
