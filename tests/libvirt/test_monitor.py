"""A domain that knows nothing of us, saved live through libvirt's own monitor, which takes it for running."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import RunCkptfs
from tests.libvirt.conftest import NewDomain
from tests.libvirt.daemon import Domain, Libvirtd, VirshError
from tests.libvirt.events import PAUSED, lifecycle
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import BIN
from tests.qemu.stepper import steps


@pytest.fixture
def vm(domain: NewDomain) -> Domain:
    vm = domain("vm")
    vm.start()
    return vm


def save(vm: Domain, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "ckptfs", "save", "--qmp", f"libvirt:{vm.name}", "--libvirt-uri", vm.libvirtd.uri]
    return subprocess.run([*command, *options, path], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("capture", ["snapshot", "precopy"])
def test_saved_without_a_mount(vm: Domain, tmp_path: Path, capture: str, run_ckptfs: RunCkptfs) -> None:
    """A snapshot if nobody says otherwise: libvirt gives QEMU a /dev/userfaultfd of its own."""
    if capture == "snapshot" and not (vm.libvirtd.devices / "userfaultfd").exists():
        pytest.skip("this kernel has no /dev/userfaultfd (6.1)")
    path = tmp_path / "checkpoint"
    with lifecycle(vm) as told:
        for _ in range(2):
            done = save(vm, path, *(("--capture", "precopy") if capture == "precopy" else ()))
            assert done.returncode == 0, done
            assert f"captured by {capture}" in done.stdout
            assert (told(), vm.state()) == (PAUSED, "running (unpaused)")
            vm.goes_on()
            steps(decode(path).blocks["pc.ram"], vm.stepper.length)
    told = json.loads(run_ckptfs("info", "--json", path).stdout)
    assert (told["libvirt"]["domain"], told["run-state"]) == ("vm", "running")
    assert told["trailer"]["machine"]["program"].endswith("qemu-system-x86_64")
    vm.libvirtd.virsh("save", "vm", tmp_path / "by-libvirt")
    vm.libvirtd.virsh("restore", tmp_path / "by-libvirt")
    vm.goes_on()


@pytest.fixture
def without_namespaces(libvirtd: Libvirtd) -> Iterator[None]:
    """Machines see the /dev of libvirtd."""
    libvirtd.configure("qemu", "namespaces = [ ]")
    libvirtd.restart()
    yield
    libvirtd.configure("qemu", "")
    libvirtd.restart()


@pytest.mark.usefixtures("without_namespaces")
def test_userfaultfd_takes_a_device_that_qemu_may_open(
    libvirtd: Libvirtd, domain: NewDomain, tmp_path: Path
) -> None:
    """As QEMU has no capability. A rule of udev can let its group in."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n":
        pytest.skip("everybody may use userfaultfd(2) on this machine")
    device = libvirtd.devices / "userfaultfd"
    if not device.exists():
        pytest.skip("this kernel has no /dev/userfaultfd (6.1)")
    vm = domain("vm")
    vm.start()
    refused = save(vm, tmp_path / "checkpoint", "--capture", "snapshot")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "not supported by host kernel (or it may not use userfaultfd(2)" in refused.stderr
    assert vm.state() == "running (booted)"
    assert "captured by precopy" in save(vm, tmp_path / "checkpoint").stdout
    libvirtd.virsh("destroy", "vm")  # QEMU looks once
    shutil.chown(device, group="kvm")
    device.chmod(0o660)
    vm.start()
    assert "captured by snapshot" in save(vm, tmp_path / "checkpoint").stdout
    vm.goes_on()


def test_saved_from_a_mount(vm: Domain, mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    mounted = mount(path, f"qmp=libvirt:vm,libvirt_uri={vm.libvirtd.uri}")
    assert "qmp waiting libvirt:vm" in (mounted.path / "status").read_text()
    with lifecycle(vm) as told:
        assert "pause" in mounted.ctl("save")
        assert (told(), vm.state()) == (PAUSED, "running (unpaused)")
        vm.goes_on()
        mounted.ctl("stop")
        assert (told(), vm.state()) == (["Suspended Paused"], "paused (unknown)")
        mounted.ctl("save")
        assert (told(), vm.state()) == ([], "paused (unknown)")
        mounted.ctl("cont")
        assert (told(), vm.state()) == (["Resumed Unpaused"], "running (unpaused)")
        vm.goes_on()
    vm.libvirtd.restart()
    mounted.ctl("qmp none")
    mounted.ctl("qmp libvirt:vm")
    with lifecycle(vm) as told:
        mounted.ctl("save")
        assert (told(), vm.state()) == (PAUSED, "running (unpaused)")
    vm.goes_on()
    steps(decode(path).blocks["pc.ram"], vm.stepper.length)


def test_what_can_not_be_is_refused_with_words(libvirtd: Libvirtd, domain: NewDomain, tmp_path: Path) -> None:
    stopped = domain("stopped")
    for name, words in (("nobody", "no domain with matching name"), ("stopped", "not running")):
        done = save(Domain(libvirtd, name, stopped.stepper), tmp_path / "checkpoint")
        assert done.returncode == 1
        assert f"libvirt:{name}: " in done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    command = [BIN / "ckptfs", "save", "--qmp", "libvirt:vm", "--libvirt-uri", "qemu+unix:///system?socket=/none"]
    done = subprocess.run([*command, tmp_path / "checkpoint"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
    assert "Failed to connect socket" in done.stderr
    with pytest.raises(VirshError):
        libvirtd.virsh("domstate", "nobody")


def test_nobody_borrows_the_rights_of_the_daemon(vm: Domain, mount: Mount, tmp_path: Path) -> None:
    """libvirt asks the kernel who connects, and that is the daemon, whoever writes to ctl."""
    mounted = mount(tmp_path / "checkpoint", f"qmp=libvirt:vm,libvirt_uri={vm.libvirtd.uri},allow_other,umask=0")
    script = f"exec 3<>{mounted.path}/ctl; echo qmp libvirt:vm >&3 && echo stop >&3; cat <&3"
    done = subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", "bash", "-c", script],
                          capture_output=True, text=True)  # fmt: skip
    assert "error: " in done.stdout
    assert "ask that user" in done.stdout
