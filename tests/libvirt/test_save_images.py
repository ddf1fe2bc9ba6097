"""libvirt's save images, in every way that libvirt has to write them: read as they are, or refused by name."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import ckptfs
from tests.cli.conftest import RunCkptfs
from tests.libvirt.daemon import Domain, Libvirtd
from tests.mount.conftest import Mount
from tests.mount.harness import BIN
from tests.physical.elf import read_elf
from tests.qemu.stepper import Stepper, steps

PARALLEL = ("--parallel-channels", "2")
BYPASS = ("--bypass-cache",)
SAVES = {
    "raw": (),
    "raw-bypass": BYPASS,
    "sparse": ("--image-format", "sparse"),
    "sparse-bypass": ("--image-format", "sparse", *BYPASS),
    "sparse-parallel": ("--image-format", "sparse", *PARALLEL),
    "sparse-both": ("--image-format", "sparse", *PARALLEL, *BYPASS),
}
SNAPSHOTS = {"memspec-raw": "raw", "memspec-sparse": "sparse"}
PACKED = {"gzip": "gzip", "bzip2": "bzip2", "xz": "xz", "zstd": "zstd"}
READ = [*SAVES, "managed", *SNAPSHOTS]


@pytest.fixture(scope="module")
def images(libvirtd: Libvirtd, stepper: Stepper) -> Path:
    """A folder with an image of each kind, of a guest that ran; and `paused`, of one that did not."""
    directory = libvirtd.directory / "images"
    directory.mkdir()
    vm = Domain(libvirtd, "vm", stepper)
    vm.define()
    vm.start()
    for name, options in [*SAVES.items(), *((name, ("--image-format", name)) for name in PACKED)]:
        libvirtd.virsh("save", "vm", directory / name, *options)
        libvirtd.virsh("restore", directory / name)
        vm.goes_on()
    libvirtd.virsh("managedsave", "vm")
    shutil.copy(libvirtd.managed / "vm.save", directory / "managed")
    libvirtd.virsh("start", "vm")
    vm.goes_on()
    for name, kind in SNAPSHOTS.items():
        libvirtd.configure("qemu", f'snapshot_image_format = "{kind}"')
        libvirtd.restart()
        memory = f"file={directory / name},snapshot=external"
        libvirtd.virsh("snapshot-create-as", "vm", name, "--memspec", memory, "--live")
        vm.goes_on()
    libvirtd.virsh("suspend", "vm")
    libvirtd.virsh("save", "vm", directory / "paused")
    for name in SNAPSHOTS:
        libvirtd.virsh("snapshot-delete", "vm", name, "--metadata")
    vm.remove()
    return directory


@pytest.mark.parametrize("name", READ)
def test_info(images: Path, run_ckptfs: RunCkptfs, name: str) -> None:
    told = json.loads(run_ckptfs("info", "--json", images / name).stdout)
    kind = "sparse" if "sparse" in name else "raw"
    assert told["libvirt"] == {"domain": "vm", "format": kind, "was-running": True}
    assert (told["complete"], told["run-state"]) == (True, "running")
    # libvirt 11.3 writes a plain stream below a header that says sparse
    assert told["format"] == ("mapped-ram" if name.startswith("sparse") else "precopy")
    assert f"domain   vm, save image ({kind}), was running" in run_ckptfs("info", images / name).stdout
    assert "<name>vm</name>" in run_ckptfs("info", "--xml", images / name).stdout


def test_info_of_a_paused_one(images: Path, run_ckptfs: RunCkptfs) -> None:
    text = run_ckptfs("info", images / "paused").stdout
    assert "domain   vm, save image (raw), was paused" in text
    assert ", paused\n" in text


@pytest.mark.parametrize("name", READ)
def test_mounted(images: Path, mount: Mount, stepper: Stepper, name: str) -> None:
    mounted = mount(images / name)
    steps(np.fromfile(mounted.ram / "pc.ram", np.uint8), stepper.length)
    assert "base-run-state running" in (mounted.path / "status").read_text()
    assert (
        (mounted.path / "views" / "map")
        .read_text()
        .startswith("# known from the CMOS of the machine's clock\n0x0 ")
    )
    assert read_elf(mounted.path / "views" / "vmcore").loads[0].physical == 0


@pytest.mark.parametrize("name", READ)
def test_opened_and_verified(images: Path, run_ckptfs: RunCkptfs, stepper: Stepper, name: str) -> None:
    with ckptfs.open(images / name) as checkpoint:
        assert checkpoint.run_state == "running"
        steps(np.asarray(checkpoint.blocks["pc.ram"]), stepper.length)
        assert ("serial", 0) in checkpoint.devices
    assert run_ckptfs("verify", images / name).stdout.startswith(f"{images / name}: sound")


def test_exported(images: Path, run_ckptfs: RunCkptfs, stepper: Stepper, tmp_path: Path) -> None:
    run_ckptfs("export", "--format", "raw", images / "sparse", tmp_path / "raw")
    steps(np.fromfile(tmp_path / "raw", np.uint8, count=16 << 20), stepper.length)


def test_made_another_save_image(images: Path, mount: Mount, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    """Its domain is known from the image that is mounted."""
    mount(images / "raw").ctl(f"save libvirt {tmp_path}/other")
    for image in (images / "raw", tmp_path / "other"):
        assert "<name>vm</name>" in run_ckptfs("info", "--xml", image).stdout
    assert "save image (sparse), was running" in run_ckptfs("info", tmp_path / "other").stdout


def test_filled_into_an_empty_mount(images: Path, mount: Mount, stepper: Stepper) -> None:
    mounted = mount("none")
    mounted.ctl(f"migrate_incoming file:{images}/sparse")
    steps(np.fromfile(mounted.ram / "pc.ram", np.uint8), stepper.length)


def test_run(images: Path, stepper: Stepper, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    """The devices are the domain's, as libvirt gives them to QEMU; the guest runs on, though QEMU says paused."""
    assert f"mem-path={images}/sparse,offset=" in run_ckptfs("qemu-args", images / "sparse").stdout
    serial = tmp_path / "serial"
    command = [
        *(
            BIN / "ckptfs",
            "run",
            images / "sparse",
            "-machine",
            "acpi=off,usb=off",
            "-nodefaults",
            "-no-user-config",
        ),
        *("-accel", "tcg", "-display", "none", "-bios", stepper.rom, "-serial", f"file:{serial}"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while not serial.exists() or serial.stat().st_size < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)
        process.kill()
    assert "!" not in serial.read_text()


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_one_is_unpacked_by_the_command_in_the_error(
    images: Path, run_ckptfs: RunCkptfs, tmp_path: Path, name: str
) -> None:
    error = run_ckptfs("info", images / name, code=1).stderr
    assert f"a save image of libvirt, packed ({PACKED[name]})" in error
    command = error.partition("as in `")[2].partition("`")[0]
    unpacked = tmp_path / "unpacked"
    command = command.replace("FILE", str(images / name)).replace("UNPACKED", str(unpacked))
    subprocess.run(["sh", "-ec", command], check=True)
    assert "complete" in run_ckptfs("info", unpacked).stdout


def test_one_that_is_not_finished(images: Path, run_ckptfs: RunCkptfs, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.write_bytes(b"LibvirtQemudPart" + (images / "sparse").read_bytes()[16:])
    assert "that libvirt has not finished" in run_ckptfs("info", partial, code=1).stderr
