"""views/ on a real mount, with QEMU's own dump of the same guest and public tools as the judges."""

import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.harness import Mounted
from tests.physical.conftest import SavedGuests
from tests.physical.elf import Elf, read_elf

NAMES = ["kcore", "map", "phys", "vmcore"]


def assert_same_memory(ours: Elf, theirs: Elf) -> None:
    for load in theirs.loads:
        data = [np.frombuffer(elf.read(load.physical, load.length), np.uint8) for elf in (ours, theirs)]
        assert np.array_equal(*data), hex(load.physical)


@pytest.fixture
def linux(saved: SavedGuests, mount: Mount) -> Mounted:
    """A mounted Linux that stock QEMU saved."""
    return mount(saved.linux().path)


def test_the_core_is_qemus(saved: SavedGuests, linux: Mounted) -> None:
    dump = saved.linux().dump
    assert dump is not None
    assert sorted(os.listdir(linux.path / "views")) == NAMES
    core = read_elf(linux.path / "views" / "vmcore")
    assert core.notes == dump.notes
    assert core.machine == dump.machine
    assert_same_memory(core, dump)


@pytest.mark.parametrize(("machine", "notes"), [("pc", 4), ("q35", 5)])
def test_the_core_is_qemus_above_4_gib(saved: SavedGuests, mount: Mount, machine: str, notes: int) -> None:
    """Of a pc with two NUMA nodes, and a q35 that tells of its VMCOREINFO; memory is compared in samples."""
    large = saved.large(machine)
    assert large.dump is not None
    core = read_elf(mount(large.path).path / "views" / "vmcore")
    assert len(core.notes) == notes
    assert core.notes == large.dump.notes
    assert places(core) == places(large.dump)
    assert len(large.samples) > 3
    for sample in large.samples:
        assert_same_memory(core, sample)


def places(elf: Elf) -> list[tuple[int, int, int]]:
    """Address, length and virtual address of all memory in it."""
    return [(load.physical, load.length, load.virtual) for load in elf.loads]


def test_readelf_has_nothing_to_say(linux: Mounted) -> None:
    for name in ("vmcore", "kcore"):
        done = subprocess.run(
            ["readelf", "--headers", "--notes", linux.path / "views" / name],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        assert "CORE (Core file)" in done.stdout


def test_the_kernel_by_its_own_addresses(linux: Mounted) -> None:
    core = read_elf(linux.path / "views" / "kcore")
    text = next(load for load in core.loads if load.virtual <= 0xFFFFFFFF81000000 < load.virtual + load.length)
    with (linux.path / "views" / "kcore").open("rb") as file:
        file.seek(text.file_offset)
        assert file.read(64) == read_elf(linux.path / "views" / "vmcore").read(text.physical, 64) != bytes(64)


def test_a_flat_image_by_address(linux: Mounted) -> None:
    phys = linux.path / "views" / "phys"
    assert phys.stat().st_size == 4 << 30
    with (
        phys.open("rb") as file,
        (linux.ram / "pc.ram").open("rb") as ram,
        (linux.ram / "pc.bios").open("rb") as bios,
    ):
        for position in (0, 0x9F000, 0xF0000, 64 << 20, (128 << 20) - 4096):
            file.seek(position)
            ram.seek(position)
            assert file.read(8192)[:4096] == ram.read(4096)
        file.seek(128 << 20)
        assert file.read(1 << 20) == bytes(1 << 20)
        file.seek(-(256 << 10), os.SEEK_END)
        assert file.read() == bios.read()


def test_map_and_status(linux: Mounted) -> None:
    assert (linux.path / "views" / "map").read_text().splitlines() == [
        "# known from the CMOS of the machine's clock",
        f"0x0 {128 << 20:#x} pc.ram 0x0",
        "0xfffc0000 0x40000 pc.bios 0x0",
    ]
    status = linux.status()
    assert status["views"] == "map phys vmcore kcore"
    assert status["views-missing"] == "vmcoreinfo: VMCOREINFO: the machine has no device vmcoreinfo"


def test_nothing_is_shown_of_ram_that_was_written(linux: Mounted) -> None:
    core, ram = linux.path / "views" / "vmcore", linux.ram / "pc.ram"
    linux.expect_log(r"views/vmcore was refused to process \d+: pages have been written since the checkpoint")
    with core.open("rb") as opened:
        before = opened.read(2 << 20)
        with ram.open("r+b") as file:
            file.write(b"changed")
        with pytest.raises(PermissionError):
            core.open("rb")
        with pytest.raises(OSError, match=r"Operation not permitted") as refused:
            os.pread(opened.fileno(), 4096, 64 << 20)
        assert refused.value.errno == errno.EPERM
    assert (linux.path / "views" / "map").read_text().startswith("# known from the CMOS")  # it moves no RAM
    linux.ctl("reset")
    assert core.read_bytes()[: 2 << 20] == before


@pytest.mark.parametrize("options", [(), ("ro",)], ids=["rw", "ro"])
def test_while_stop_holds_writers(options: tuple[str, ...], saved: SavedGuests, mount: Mount) -> None:
    mounted = mount(saved.linux().path, *options)
    core = mounted.path / "views" / "vmcore"
    answer = mounted.ctl("stop")
    if options:  # there are none
        assert answer == "ok the mount is read-only (ro): nobody can write"
        assert core.read_bytes()
        return
    for name in ("views/vmcore", "vmstate"):
        mounted.expect_log(rf"{name} was refused to process \d+: writers of ram/ are held back .*: `cont` first")
        with pytest.raises(OSError, match="busy"):
            (mounted.path / name).open("rb")
    assert "are held back" in mounted.status()["vmstate"]
    mounted.ctl("cont")
    assert core.read_bytes()


def test_a_save_brings_files_of_its_own(linux: Mounted, tmp_path: Path) -> None:
    core, ram = linux.path / "views" / "vmcore", linux.ram / "pc.ram"
    before = core.read_bytes()
    with ram.open("r+b") as file:
        file.seek(64 << 20)
        file.write(b"changed".ljust(4096, b"!"))
    linux.ctl(f"save {tmp_path}/other")
    linux.wait_for(lambda status: status["base"] == f"{tmp_path}/other" and "kcore" in str(status["views"]))
    after = core.read_bytes()
    assert after != before
    assert after[(1 << 20) + (64 << 20) :].startswith(b"changed!!")


def test_of_ram_alone_there_is_no_map(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "new", "ram=pc.ram:1M")
    assert os.listdir(mounted.path / "views") == []
    mounted.ctl("save")
    assert os.listdir(mounted.path / "views") == []
    assert (
        "where machine 'none' has its RAM is not known: say it, -o map=ID@ADDRESS"
        in mounted.status()["views-missing"]
    )


def test_a_map_by_hand(mount: Mount, tmp_path: Path) -> None:
    MigrationFile(blocks=[Block("a", 16, {1: b"one"}), Block("b", 16, {2: b"two"})]).write(tmp_path / "ckpt")
    mounted = mount(tmp_path / "ckpt", "map=b@0,map=a@1M+8k:4k")
    assert sorted(os.listdir(mounted.path / "views")) == ["map", "phys"]
    phys = (mounted.path / "views" / "phys").read_bytes()
    assert len(phys) == (1 << 20) + 8192
    assert phys[2 * 4096 :].startswith(b"two")
    assert phys[1 << 20 :].startswith(b"one")
    refused = mount(tmp_path / "ckpt", "map=nosuch@0")
    assert os.listdir(refused.path / "views") == []
    assert "map: there is no RAM block 'nosuch'" in refused.status()["views-missing"]


def test_a_name_that_is_no_text(mount: Mount, tmp_path: Path) -> None:
    MigrationFile(blocks=[Block("no text \udcff", 16, {1: b"one"})]).write(tmp_path / "ckpt")
    views = mount(tmp_path / "ckpt", "map=no text \udcff@0").path / "views"
    assert (views / "phys").read_bytes()[4096:].startswith(b"one")
    assert b" no text \xff 0x0\n" in (views / "map").read_bytes()


def test_without_a_vmdesc_there_is_no_map(mount: Mount, tmp_path: Path) -> None:
    MigrationFile(vmdesc=False).write(tmp_path / "ckpt")
    mounted = mount(tmp_path / "ckpt")
    assert os.listdir(mounted.path / "views") == []


def test_views_off(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "new", "ram=pc.ram:1M,views=off")
    assert not (mounted.path / "views").exists()
    assert mounted.status()["views"] is None
