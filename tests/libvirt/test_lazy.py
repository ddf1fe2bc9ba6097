"""A domain resumes on the RAM of a mount, in the three ways that libvirt has for it. QEMU runs as libvirt-qemu."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import RunCkptfs
from tests.libvirt.conftest import NewDomain
from tests.libvirt.daemon import SHARED, Domain, VirshError, on_mount
from tests.libvirt.events import PAUSED, RESTORED, lifecycle
from tests.mount.conftest import Mount
from tests.mount.harness import Mounted

Step = Callable[[Domain, Mounted], None]

FOR_QEMU = "allow_other,uid=libvirt-qemu"


@pytest.fixture
def vm(domain: NewDomain) -> Domain:
    return domain("vm")


@pytest.fixture
def mounted(vm: Domain, mount: Mount, tmp_path: Path, run_ckptfs: RunCkptfs) -> Iterator[Mounted]:
    """A checkpoint of a domain that had ordinary RAM, and is gone."""
    vm.start()  # by itself
    checkpoint = tmp_path / "checkpoint"
    run_ckptfs("save", "--qmp", "libvirt:vm", "--libvirt-uri", vm.libvirtd.uri, checkpoint)
    vm.libvirtd.virsh("destroy", "vm")
    yield mount(checkpoint, f"{FOR_QEMU},libvirt_uri={vm.libvirtd.uri}")
    vm.remove()


def undefine(vm: Domain, mounted: Mounted) -> None:
    vm.libvirtd.virsh("undefine", "vm")


def create(vm: Domain, mounted: Mounted) -> None:
    incoming = ("-incoming", f"file:{mounted.path}/vmstate")
    lazy = replace(vm, backing=SHARED, metadata=on_mount(mounted.path), arguments=incoming)
    vm.libvirtd.virsh("create", lazy.xml())


def leave(vm: Domain, mounted: Mounted) -> None:
    pass


def restore(vm: Domain, mounted: Mounted) -> None:
    vm.libvirtd.virsh("restore", mounted.path / "libvirt-save")


def make_managed(vm: Domain, mounted: Mounted) -> None:
    vm.libvirtd.managed.joinpath("vm.save").symlink_to(mounted.path / "libvirt-save")
    vm.libvirtd.restart()
    assert vm.libvirtd.virsh("list", "--all", "--with-managed-save", "--name") == "vm"


def start(vm: Domain, mounted: Mounted) -> None:
    vm.libvirtd.virsh("start", "vm")
    assert vm.libvirtd.virsh("list", "--all", "--with-managed-save", "--name") == ""
    assert mounted.path.joinpath("libvirt-save").exists()


@pytest.mark.parametrize(
    ("prepare", "resume", "events", "state"),
    [
        (undefine, create, {"Started Booted", "Resumed Unpaused"}, "running (booted)"),
        (leave, restore, RESTORED, "running (restored)"),
        (make_managed, start, RESTORED, "running (restored)"),
    ],
    ids=["create", "restore", "start"],
)
def test_resumed_saved_and_resumed_again(
    vm: Domain, mounted: Mounted, prepare: Step, resume: Step, events: set[str], state: str
) -> None:
    prepare(vm, mounted)
    with lifecycle(vm) as told:
        resume(vm, mounted)
        vm.goes_on()
        assert (set(told()), vm.state()) == (events, state)
        assert re.search(r"users qemu-system-x86 \(\d+, rw\)", (mounted.path / "status").read_text())
        mounted.ctl("qmp libvirt:vm")
        assert "pause" in mounted.ctl("save")
        vm.goes_on()
        assert (told(), vm.state()) == (PAUSED, "running (unpaused)")
    vm.libvirtd.restart()
    with lifecycle(vm) as told:
        mounted.ctl("save")
        vm.goes_on()
        assert (told(), vm.state()) == (PAUSED, "running (unpaused)")
        vm.libvirtd.virsh("destroy", "vm")
        mounted.ctl("qmp none")
        mounted.ctl("reset")
        restore(vm, mounted)
        vm.goes_on()
        assert set(told()) >= {"Stopped Destroyed", *RESTORED}
        assert vm.state() == "running (restored)"
    vm.libvirtd.virsh("destroy", "vm")
    assert list(vm.libvirtd.memory.rglob("pc.ram")) == []


def test_the_stream_is_only_for_the_machine_that_has_this_ram(vm: Domain, mounted: Mounted) -> None:
    mounted.expect_log("vmstate was refused")
    with (mounted.path / "libvirt-save").open("rb") as file:
        assert file.read(16) == b"LibvirtQemudSave"
        with pytest.raises(PermissionError):
            file.read()
    with (mounted.ram / "pc.ram").open("r+b") as ram:
        ram.write(b"written")
    with pytest.raises(VirshError):
        restore(vm, mounted)
    (vmstate,) = re.findall("^vmstate .*", (mounted.path / "status").read_text(), re.MULTILINE)
    assert "pages have been written since" in vmstate, mounted.log.read_text()


def test_a_domain_whose_mount_is_gone_does_not_start(domain: NewDomain, tmp_path: Path) -> None:
    for backing, words in ((SHARED, "where nothing is mounted"), ("", "has no <memoryBacking>")):
        vm = domain(f"vm{len(backing)}", backing=backing, metadata=on_mount(tmp_path))
        with pytest.raises(VirshError, match=f"ckptfs: domain {vm.name}: .*{words}"):
            vm.start()
