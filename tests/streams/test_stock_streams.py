"""Plain streams of stock QEMU, mounted; and what a mount saves with mapped-ram off, loaded by stock QEMU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptfs.namespace.names import encode_name
from tests.mount.conftest import Mount
from tests.mount.decode import decode as decode_mapped
from tests.mount.harness import Mounted
from tests.qemu.stock_checkpoint import PREFIX_BYTE, StockCheckpoints, assert_ram_equals
from tests.streams.decode import PAGE, decode


def assert_mounted_ram(mounted: Mounted, blocks: dict[str, np.ndarray[Any, np.dtype[np.uint8]]]) -> None:
    """See that a mount has these blocks, and no others."""
    assert {file.name for file in mounted.ram.iterdir()} == {encode_name(idstr).decode() for idstr in blocks}
    for idstr, expected in blocks.items():
        ram = np.fromfile(mounted.ram / encode_name(idstr).decode(), np.uint8)
        assert np.array_equal(ram, expected), idstr


def make_plain(mounted: Mounted) -> None:
    """Switch to plain streams, as a user does."""
    mounted.ctl("migrate_set_capability multifd off")
    mounted.ctl("migrate_set_capability mapped-ram off")


# ---- stock QEMU writes, ckptfs reads -------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 0x1001])
async def test_a_stream_of_a_stopped_guest_has_the_ram_of_its_mapped_ram_file(
    offset: int, stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    checkpoint = stock_checkpoint()
    path = tmp_path / "plain"
    path.write_bytes(PREFIX_BYTE * offset)
    async with checkpoint.qemu() as vm:
        await vm.load(checkpoint.path)
        await vm.migrate_to(path, mapped_ram=False, offset=offset)
    mounted = mount(f"file:{path},offset={offset:#x}")
    assert_mounted_ram(mounted, decode_mapped(checkpoint.path).blocks)
    mapped = tmp_path / "mapped"
    mounted.ctl(f"save {mapped}")
    mounted.umount()
    again, source = decode_mapped(mapped), decode_mapped(checkpoint.path)
    assert all(np.array_equal(again.blocks[idstr], ram) for idstr, ram in source.blocks.items())
    async with checkpoint.qemu() as vm:
        await vm.load(mapped, multifd=2)
        await vm.cont()
        assert await vm.tick() > checkpoint.last_tick


async def test_a_stream_of_a_running_guest_has_the_newest_of_its_rewritten_pages(
    stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    checkpoint = stock_checkpoint(append="dirty=8")
    path = tmp_path / "plain"
    async with checkpoint.qemu() as vm:
        await vm.load(checkpoint.path)
        await vm.cont()
        await vm.wait_serial("dirty [0-9]+ OK")
        await vm.qmp("migrate-set-capabilities", capabilities=[{"capability": "mapped-ram", "state": False}])
        await vm.qmp("migrate-set-parameters", max_bandwidth=64 << 20)  # so that a round takes some time
        await vm.qmp("migrate", uri=f"file:{path}")
        while (await vm.event("MIGRATION"))["status"] != "completed":
            pass
        visible = await vm.save_visible_ranges(tmp_path)
    decoded = decode(path)
    times = decoded.blocks["pc.ram"].records
    assert set(times) == set(range((128 << 20) // PAGE))
    assert sum(count > 1 for count in times.values()) > 100, "no pages were rewritten"
    mounted = mount(path)
    assert_mounted_ram(mounted, {idstr: block.ram for idstr, block in decoded.blocks.items()})
    assert_ram_equals((mounted.ram / "pc.ram").read_bytes(), visible)
    again = tmp_path / "again"
    mounted.ctl(f"save {again}")
    mounted.umount()
    async with checkpoint.qemu() as vm:
        await vm.load(again)  # it ran when it was saved
        await vm.wait_serial("dirty [0-9]+ OK")
        assert "BAD" not in vm.serial


# ---- ckptfs writes, stock QEMU reads -------------------------------------------------------------------


@pytest.mark.parametrize(("detection", "offset"), [("none", 0), ("legacy", 0x1001), ("multifd", 0)])
async def test_a_stream_that_is_saved_runs_on_in_stock_qemu(
    detection: str, offset: int, stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    checkpoint = stock_checkpoint()
    source = decode_mapped(checkpoint.path)
    mounted = mount(checkpoint.path, f"zero_page_detection={detection}")
    make_plain(mounted)
    path = tmp_path / "plain"
    path.write_bytes(PREFIX_BYTE * offset)
    mounted.ctl(f"migrate file:{path},offset={offset}")
    assert path.read_bytes()[:offset] == PREFIX_BYTE * offset
    assert_mounted_ram(mounted, source.blocks)  # the stream is the base now
    mounted.umount()
    decoded = decode(path, offset)
    assert decoded.configuration == {}
    assert list(decoded.blocks) == list(source.blocks)
    for idstr, block in decoded.blocks.items():
        assert np.array_equal(block.ram, source.blocks[idstr])
        assert block.records == dict.fromkeys(range(block.used_length // PAGE), 1)
    async with checkpoint.qemu() as vm:
        await vm.load(path, mapped_ram=False, offset=offset)
        await vm.cont()
        tick = await vm.tick()
        assert tick > checkpoint.last_tick
        assert await vm.tick() == tick + 1


@pytest.mark.parametrize("detection", ["none", "legacy", "multifd"])
def test_who_looks_for_zero_pages(detection: str, mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "plain"
    mounted = mount(path, f"ram=pc.ram:16M,ram=x:4k,multifd=off,mapped_ram=off,zero_page_detection={detection}")
    content = np.tile(np.repeat(np.array([1, 0], np.uint8), PAGE), 300)  # every second page is zeros
    with (mounted.ram / "pc.ram").open("r+b") as ram:
        ram.seek(1 << 20)
        ram.write(content)
    mounted.ctl("save")
    blocks = decode(path).blocks
    assert set(blocks) == {"pc.ram", "x"}
    assert all(block.records == dict.fromkeys(range(block.used_length // PAGE), 1) for block in blocks.values())
    written = range(256, 856)
    sent = set(written) if detection == "none" else set(written[::2])
    assert set(blocks["pc.ram"].page_records) == sent
    assert not blocks["x"].page_records
    expected = np.zeros(16 << 20, np.uint8)
    expected[1 << 20 :][: content.size] = content
    assert np.array_equal(blocks["pc.ram"].ram, expected)
    status = mounted.status()
    assert status["direct-io"] == "on"  # a plain stream says nothing about the file system
    ram_status = status["migration"]["ram"]
    assert (ram_status["normal"], ram_status["duplicate"]) == (len(sent), 4097 - len(sent))
    assert ram_status["remaining"] == 0
    assert 0 < path.stat().st_size - ram_status["transferred"] < 100  # the header
    assert_mounted_ram(mounted, {"pc.ram": expected, "x": np.zeros(PAGE, np.uint8)})
