"""Files that QEMU wrote of machines of other architectures (tests/data)."""

from pathlib import Path

import pytest

from tests.data import unpacked
from tests.mount.conftest import Mount

PAGE = (b"a page of our own " * 228)[:4096]


@pytest.mark.parametrize("form", ["mapped-ram", "stream"])
def test_s390x(mount: Mount, tmp_path: Path, form: str) -> None:
    """Its storage attributes are a second iterable section; TCG wrote its bitmaps as the host has them."""
    path = unpacked(f"s390x.{form}", tmp_path / "vm")
    mounted = mount(path)
    ram = (mounted.ram / "s390.ram").read_bytes()
    assert ram.count(PAGE) == 1
    assert len(ram) - ram.count(0) == 4096
    assert mounted.status()["base-machine"] == "s390-ccw-virtio-10.0"
    mounted.ctl(f"save {tmp_path}/other")
    other = mount(tmp_path / "other")
    assert (other.ram / "s390.ram").read_bytes() == ram
    assert other.status()["base-devices"] == mounted.status()["base-devices"]
    for saved in (path.read_bytes(), (tmp_path / "other").read_bytes()):
        assert saved.count(b"\1\0\0\0\6\x17s390-storage_attributes") == 1
        assert saved.count(b"\3\0\0\0\6" + (8).to_bytes(8) + (1).to_bytes(8)) == 1  # its END: DONE, EOS


def test_pseries(mount: Mount, tmp_path: Path) -> None:
    """Its hash page table is a second iterable section."""
    path = unpacked("pseries.stream", tmp_path / "vm")
    mounted = mount(path)
    with (mounted.ram / "ppc_spapr.ram").open("rb") as ram:
        assert ram.read(4096) == PAGE
    mounted.ctl(f"save {tmp_path}/other")
    other = mount(tmp_path / "other")
    assert other.status()["base-devices"] == mounted.status()["base-devices"]
    start = b"\1\0\0\2\x31\x0aspapr/htab" + bytes(4) + (1).to_bytes(4)
    end = b"\3\0\0\2\x31" + bytes(12) + b"\x7e\0\0\2\x31"
    for saved in (path.read_bytes(), (tmp_path / "other").read_bytes()):
        assert saved.count(start) == 1
        assert saved.count(end) == 1


@pytest.mark.parametrize("name", ["riscv64-virt", "riscv64-sifive_u", "aarch64-virt", "aarch64-virt-secure"])
def test_others(mount: Mount, tmp_path: Path, name: str) -> None:
    mounted = mount(unpacked(f"{name}.mapped-ram", tmp_path / "vm"))
    main = {"riscv64-virt": "riscv_virt_board.ram", "riscv64-sifive_u": "riscv.sifive.u.ram"}.get(
        name, "mach-virt.ram"
    )
    assert (mounted.ram / main).read_bytes().count(PAGE) == 1
