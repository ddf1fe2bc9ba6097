"""Public tools on views/ of a Linux that tells of itself; what needs its symbols is in `make test-tools`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import ckptfs
from tests.mount.conftest import Mount
from tests.physical.conftest import SavedGuests
from tests.physical.elf import read_elf
from tests.physical.test_stock_dump import flat_view
from tests.physical.test_views import assert_same_memory


def test_every_note_and_all_memory_with_kaslr_and_two_nodes(saved: SavedGuests, mount: Mount) -> None:
    told = saved.told()
    assert told.dump is not None
    mounted = mount(told.path)
    core = read_elf(mounted.path / "views" / "vmcore")
    assert [note.name for note in core.notes] == [b"CORE", b"CORE", b"QEMU", b"QEMU", b"VMCOREINFO"]
    assert core.notes == told.dump.notes
    assert_same_memory(core, told.dump)
    with ckptfs.open(told.path) as checkpoint:
        expected = [entry for entry in flat_view(told.mtree) if entry[2] in ("m0", "m1", "pc.bios")]
        assert [(x.start, x.stop, x.idstr, x.block_offset) for x in checkpoint.physical.regions] == expected
        note = checkpoint.vmcoreinfo()
        assert (mounted.path / "views" / "vmcoreinfo").read_text() == note
    moved = re.search(r"^KERNELOFFSET=(\w+)$", note, re.MULTILINE)
    assert moved is not None
    assert f"KERNELOFFSET={moved[1]}\n" in (mounted.path / "views" / "map").read_text()


def test_makedumpfile(saved: SavedGuests, mount: Mount, tmp_path: Path) -> None:
    mounted = mount(saved.told().path)
    core = mounted.path / "views" / "vmcore"
    subprocess.run(["makedumpfile", "--dump-dmesg", core, tmp_path / "dmesg"], capture_output=True, check=True)
    assert "Linux version " in (tmp_path / "dmesg").read_text()
    read = mounted.status()["read-pages"]
    assert 0 < read < mounted.status()["page-count"] // 20
    subprocess.run(["makedumpfile", "-d", "31", "-c", core, tmp_path / "small"], capture_output=True, check=True)
    assert (tmp_path / "small").read_bytes().startswith(b"KDUMP   ")
    assert 1 << 20 < (tmp_path / "small").stat().st_size < core.stat().st_size // 2


def test_leechcore(saved: SavedGuests, mount: Mount) -> None:
    mounted = mount(saved.told().path)
    with ckptfs.open(saved.told().path) as checkpoint:
        expected = [(region.start, region.length) for region in checkpoint.physical.regions]
        banner = checkpoint.physical.read(1 << 20, 4096)
    program = (
        "import leechcorepyc, sys\n"
        "core = leechcorepyc.LeechCore('file://' + sys.argv[1])\n"
        "print([(part['base'], part['size']) for part in core.memmap], core.read(1 << 20, 4096).hex())\n"
        "core.close()\n"
    )
    command = [sys.executable, "-c", program, mounted.path / "views" / "vmcore"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == f"{expected} {banner.hex()}"


def test_a_note_that_the_guest_has_forged(saved: SavedGuests, mount: Mount, tmp_path: Path) -> None:
    """What it claims of its length is bounded, and told; the memory around it is still shown."""
    told = saved.told().path
    with ckptfs.open(told) as checkpoint:
        place = int(checkpoint.device("vmcoreinfo").number("vmcoreinfo.paddr"))
        ((idstr, offset),) = [
            (region.idstr, region.block_offset + place - region.start)
            for region in checkpoint.physical.regions
            if region.start <= place < region.stop
        ]
    mounted = mount(told)
    with (mounted.ram / idstr).open("r+b") as ram:
        ram.seek(offset + 4)
        ram.write(b"\xff\xff\xff\x7f")  # n_descsz
    mounted.ctl(f"save {tmp_path}/forged")
    views = mounted.path / "views"
    assert sorted(path.name for path in views.iterdir()) == ["kcore", "map", "phys", "vmcore"]
    assert "vmcoreinfo: what lies where the guest said is no VMCOREINFO note" in mounted.status()["views-missing"]
    assert "KERNELOFFSET" not in (views / "map").read_text()
    assert [note.name for note in read_elf(views / "vmcore").notes] == [b"CORE", b"CORE", b"QEMU", b"QEMU"]


def test_page_tables_that_the_guest_has_forged(saved: SavedGuests, mount: Mount, tmp_path: Path) -> None:
    """A table all of whose entries are itself: the walk has an end, that is told, and all else is still shown."""
    told = saved.told().path
    with ckptfs.open(told) as checkpoint:
        table = checkpoint.registers()[0]["cr3"] & ~0xFFF
        (region,) = [one for one in checkpoint.physical.regions if one.start <= table < one.stop]
    mounted = mount(told)
    with (mounted.ram / region.idstr).open("r+b") as ram:
        ram.seek(region.block_offset + table - region.start)
        ram.write(512 * (table | 1).to_bytes(8, "little"))
    mounted.ctl(f"save {tmp_path}/forged")
    views = mounted.path / "views"
    assert sorted(path.name for path in views.iterdir()) == ["map", "phys", "vmcore", "vmcoreinfo"]
    assert "kcore: the page tables of the guest map more than 65534 ranges" in mounted.status()["views-missing"]
    assert len(read_elf(views / "vmcore").notes) == 5


def test_of_a_plain_stream_all_is_the_same(saved: SavedGuests, mount: Mount, tmp_path: Path) -> None:
    mounted = mount(saved.told().path)
    mounted.ctl("migrate_set_capability multifd off")
    mounted.ctl("migrate_set_capability mapped-ram off")
    mounted.ctl(f"save {tmp_path}/plain")
    mounted.umount()
    views = mount(saved.told().path).path / "views", mount(tmp_path / "plain").path / "views"
    names = [sorted(path.name for path in one.iterdir()) for one in views]
    assert names[0] == names[1] == ["kcore", "map", "phys", "vmcore", "vmcoreinfo"]
    for name in names[0]:
        heads = []
        for one in views:
            with (one / name).open("rb") as file:
                heads.append((file.read(8 << 20), os.fstat(file.fileno()).st_size))
        assert heads[0] == heads[1], name
