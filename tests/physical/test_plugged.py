"""Memory that was plugged in: no section has its address, so it is left out unless machine or user tells it."""

from pathlib import Path

import pytest
import trio

import ckptfs
from ckptfs.mapped_ram.trailer import Depends, Entry, Trailer
from ckptfs.physical.memory_map import Region
from ckptfs.physical.plugged import NAME, entry_of, plugged_in
from tests.mount.conftest import Mount
from tests.mount.harness import BIN
from tests.physical.conftest import SavedGuests, _firmware_has_run, numa
from tests.physical.test_stock_dump import flat_view
from tests.qemu.guest import Guest
from tests.qemu.machine import Qemu

DIMM = ("-object", "memory-backend-ram,id=d0,size=64M", "-device", "pc-dimm,id=dimm0,memdev=d0")
MiB = 1 << 20


def test_a_dimm_is_where_the_user_says(saved: SavedGuests, mount: Mount) -> None:
    one = saved.firmware("dimm", "pc", "64M,slots=2,maxmem=1G", *DIMM)
    (start, stop), *others = [(start, stop) for start, stop, region, _ in flat_view(one.mtree) if region == "d0"]
    assert (stop - start, others) == (64 * MiB, [])
    lines = (mount(one.path).path / "views" / "map").read_text().splitlines()
    assert lines[1] == "# left out, as nothing tells its address: d0"
    assert [line.split(" ")[2] for line in lines[2:]] == ["pc.ram", "pc.bios"]
    told = mount(one.path, f"map=pc.ram@0,map=d0@{start:#x}").path / "views"
    assert (told / "map").read_text().splitlines() == [
        "# known from map=",
        f"0x0 {64 * MiB:#x} pc.ram 0x0",
        f"{start:#x} {64 * MiB:#x} d0 0x0",
    ]
    assert (told / "phys").stat().st_size == stop


@pytest.mark.parametrize("nodes", [(), numa("96M", "32M")], ids=["one", "two"])
async def test_a_dimm_is_where_the_machine_says(guest_files: Guest, tmp_path: Path, nodes: tuple[str, ...]) -> None:
    """Of two nodes and a DIMM, all are backends with names of the user's: that one is none of them is told, too."""
    memory = "128M,slots=2,maxmem=1G"
    async with Qemu(guest_files, *nodes, *DIMM, machine="q35", memory=memory, append="panic=0") as vm:
        await _firmware_has_run(vm)
        await vm.stop()
        command = [BIN / "ckptfs", "save", "--quiet", "--qmp", vm.qmp_path, tmp_path / "ckpt"]
        await trio.run_process(command)
        expected = [entry for entry in flat_view(await vm.hmp("info mtree -f")) if entry[2] != "pc.rom"]
    with ckptfs.open(tmp_path / "ckpt") as checkpoint:
        found = [(one.start, one.stop, one.idstr, one.block_offset) for one in checkpoint.physical.regions]
        assert found == [entry for entry in expected if entry[2] in {name for _, _, name, _ in found}]
        assert "d0" in {name for _, _, name, _ in found}
        assert checkpoint.physical.map.source.endswith("memory devices from the machine's monitor")


def test_kinds_of_devices() -> None:
    entry = entry_of(
        [
            {"type": "dimm", "data": {"addr": 4 << 30, "size": MiB, "memdev": "/objects/a"}},
            {
                "type": "virtio-mem",
                "data": {"memaddr": 5 << 30, "size": 0, "max-size": MiB, "memdev": "/objects/b"},
            },
            {"type": "nvdimm", "data": {"addr": 6 << 30, "size": MiB, "memdev": "/objects/gone"}},
            {"type": "hv-balloon", "data": {"max-size": MiB}},
        ]
    )
    assert entry is not None
    assert entry.depends == Depends.DEVICE_STATE
    lengths = {"a": 2 * MiB, "/objects/b": 2 * MiB}
    assert plugged_in(Trailer((entry,)), lengths) == [
        Region(4 << 30, MiB, "a", 0),
        Region(5 << 30, MiB, "/objects/b", 0),
    ]
    assert entry_of([]) is None


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"no JSON",
        b"7",
        b"[7]",
        b"[" * 99999,
        b"[{}]",
        b'[{"memdev": "a", "address": "0", "length": 4096}]',
        b'[{"memdev": "a", "address": -1, "length": 4096}]',
        b'[{"memdev": "a", "address": 0, "length": 0}]',
        b'[{"memdev": "a", "address": 4503599627370496, "length": 4096}]',
        b'[{"memdev": "a", "address": 0, "length": 8192}]',
        b'[{"memdev": 5, "address": 0, "length": 4096}]',
    ],
)
def test_what_tells_nothing(payload: bytes) -> None:
    assert plugged_in(Trailer((Entry(NAME, payload),)), {"a": 4096}) == []
