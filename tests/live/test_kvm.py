"""A guest under KVM, where there is KVM: saved live, restored, run, on both ways. Elsewhere the same under TCG.

Its firmware is our own (tests/qemu/firmware.py): no Linux is needed.
"""

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import BIN
from tests.qemu.firmware import assert_one_step, write_rom

CKPTFS = BIN / "ckptfs"
_KVM_CREATE_VM = 0xAE01


def kvm_works() -> bool:
    """Whether a virtual machine can be made."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.close(fcntl.ioctl(fd, _KVM_CREATE_VM, 0))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


ACCEL = "kvm" if kvm_works() else "tcg"


@pytest.fixture(autouse=True)
def _say_which(record_property: Callable[[str, object], None]) -> None:
    record_property("accel", ACCEL)
    print(f"accel {ACCEL}: " + ("KVM works here" if ACCEL == "kvm" else "no KVM here"))


@contextmanager
def machine(
    directory: Path, serial: str, *arguments: str | Path, program: tuple[str | Path, ...] = ()
) -> Iterator[Path]:
    """A machine with that firmware, or what `program` becomes; its serial line's file."""
    rom = directory / "rom"
    if not rom.exists():
        write_rom(rom)
    command = program or (
        "qemu-system-x86_64", "-accel", ACCEL, "-nodefaults", "-display", "none", "-m", "16M", "-bios", rom,
        "-serial", f"file:{serial}", "-qmp", "unix:qmp,server=on,wait=off", *arguments,
    )  # fmt: skip
    process = subprocess.Popen(command, cwd=directory, stderr=subprocess.PIPE)
    try:
        yield directory / serial
    finally:
        process.kill()
        _, errors = process.communicate()
    assert b"X" not in (directory / serial).read_bytes(), errors


def goes_on(serial: Path, passes: int = 3) -> None:
    """Wait until it has verified its memory that often."""
    end = time.monotonic() + 120
    before = serial.stat().st_size if serial.exists() else 0
    while not serial.exists() or serial.stat().st_size < before + passes:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_saved_and_restored_on_a_mount(mount: Mount, tmp_path: Path) -> None:
    spec = tmp_path / "vm"
    mounted = mount(spec, f"ram=pc.ram:16M,qmp={tmp_path}/qmp")
    backend = "memory-backend-file,id=pc.ram,size=16M,share=on,mem-path="
    memory = ("-object", f"{backend}{mounted.ram}/pc.ram", "-machine", "pc,memory-backend=pc.ram")
    with machine(tmp_path, "first", *memory) as serial:
        goes_on(serial)
        mounted.ctl("save")
        goes_on(serial)
    mounted.umount()
    assert_one_step(decode(spec).blocks["pc.ram"].tobytes())
    mounted = mount(spec)
    memory = ("-object", f"{backend}{mounted.ram}/pc.ram", "-machine", "pc,memory-backend=pc.ram")
    with machine(tmp_path, "second", *memory, "-incoming", f"file:{mounted.path}/vmstate") as serial:
        goes_on(serial)


@pytest.mark.parametrize("capture", ["snapshot", "precopy"])
def test_saved_with_its_own_ram_and_run(tmp_path: Path, capture: str) -> None:
    with machine(tmp_path, "serial") as serial:
        goes_on(serial)
        command = [CKPTFS, "save", "--capture", capture, "--qmp", tmp_path / "qmp", tmp_path / "vm"]
        done = subprocess.run(command, capture_output=True)
        assert done.returncode == 0, done
        goes_on(serial)
    assert_one_step(decode(tmp_path / "vm").blocks["pc.ram"].tobytes())
    serial.unlink()
    with machine(tmp_path, "serial", program=(CKPTFS, "run", tmp_path / "vm")) as serial:
        goes_on(serial)
