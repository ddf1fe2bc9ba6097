"""The harness itself: stock QEMU saves, stock QEMU loads, the guest goes on, and wrong RAM is noticed."""

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from tests.doubles.storage import open_descriptors, wait_until_open
from tests.mount.disk import Disk
from tests.qemu.guest import BLOB_LENGTH, Guest
from tests.qemu.machine import VGA_AND_RNG, Qemu
from tests.qemu.qmp import QmpError
from tests.qemu.stock_checkpoint import PREFIX_BYTE, StockCheckpoints, assert_ram_equals

PAGE = 4096
MEMORY = 128 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = Disk("tmpfs", tmp_path / "image", tmp_path / "small", 1 << 20)
    yield disk.path
    disk.close()


VARIANTS: list[dict[str, Any]] = [
    {},
    {"multifd": 2},
    {"multifd": 4, "direct_io": True},
    {"offset": 0x1001},
    {"live": True},
    {"live": True, "multifd": 2},
    {"machine": "q35"},
]


def pc_ram(migfile: bytes) -> bytes:
    """Block pc.ram of a mapped-ram file, decoded by nothing that is tested here."""
    name = migfile.index(b"\x06pc.ram")
    used_length, version, page_size, bitmap_offset, pages_offset = struct.unpack_from(">QIQQQ", migfile, name + 7)
    assert (used_length, version, page_size) == (MEMORY, 1, PAGE)
    bitmap = np.frombuffer(migfile, np.uint8, MEMORY // PAGE // 8, bitmap_offset)
    pages = np.frombuffer(migfile, np.uint8, MEMORY, pages_offset).reshape(-1, PAGE)
    return (pages * np.unpackbits(bitmap, bitorder="little")[:, None]).tobytes()


@pytest.mark.parametrize("how", VARIANTS, ids=str)
async def test_stock_checkpoint_holds_what_qemu_shows_and_runs_on(
    how: dict[str, Any], stock_checkpoint: StockCheckpoints
) -> None:
    checkpoint = stock_checkpoint(**how)
    migfile = checkpoint.path.read_bytes()
    assert migfile[: checkpoint.offset] == PREFIX_BYTE * checkpoint.offset
    assert_ram_equals(pc_ram(migfile), checkpoint.visible)
    async with checkpoint.qemu() as vm:
        await vm.load(
            checkpoint.path,
            offset=checkpoint.offset,
            multifd=checkpoint.variant.multifd,
            direct_io=checkpoint.variant.direct_io,
        )
        await vm.cont()
        first = await vm.tick()
        assert first > checkpoint.last_tick
        assert await vm.tick() == first + 1


@pytest.mark.parametrize("machine", ["pc", "q35"])
async def test_visible_ranges_are_the_whole_block_but_the_vga_window(
    machine: str, guest_files: Guest, tmp_path: Path
) -> None:
    ram = tmp_path / "ram"
    backend = f"memory-backend-file,id=pc.ram,size={MEMORY},mem-path={ram},share=on"
    async with Qemu(
        guest_files, "-object", backend, *VGA_AND_RNG, machine=f"{machine},memory-backend=pc.ram"
    ) as vm:
        await vm.tick()
        await vm.stop()
        visible = await vm.save_visible_ranges(tmp_path)
    assert_ram_equals(ram.read_bytes(), visible)
    shown = np.zeros(MEMORY, bool)
    for part in visible:
        if part.region == "pc.ram":
            shown[part.block_offset : part.block_offset + part.length] = True
    hidden = np.flatnonzero(~shown)
    assert (hidden[0], hidden[-1] + 1, hidden.size) == (0xA0000, 0xC0000, 0x20000)
    assert {part.region for part in visible} == {"pc.ram", "vga.vram", "pc.bios"}


async def test_the_guest_notices_a_wrong_byte(guest_files: Guest, tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    backend = f"memory-backend-file,id=pc.ram,size={MEMORY},mem-path={ram},share=on"
    amid_blob = guest_files.initrd.read_bytes()[-BLOB_LENGTH // 2 :][:64]
    async with Qemu(guest_files, "-object", backend, machine="pc,memory-backend=pc.ram") as vm:
        await vm.tick()
        await vm.stop()
        with ram.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            start = -1
            while (start := memory.find(amid_blob, start + 1)) >= 0:
                memory[start] ^= 1
        await vm.cont()
        await vm.wait_serial("MD5BAD")
        with pytest.raises(AssertionError, match=r"the guest's RAM is wrong: tick .* MD5BAD"):
            await vm.tick()


def test_a_difference_is_found(stock_checkpoint: StockCheckpoints) -> None:
    checkpoint = stock_checkpoint()
    ram = bytearray(pc_ram(checkpoint.path.read_bytes()))
    ram[0xA0000] ^= 1  # in the window: can't be seen
    assert_ram_equals(ram, checkpoint.visible)
    ram[0xC0000] ^= 1
    with pytest.raises(AssertionError, match=r"1 bytes differ, the first at block_offset 0xc0000"):
        assert_ram_equals(ram, checkpoint.visible)


async def test_a_guest_that_dirties_memory_is_saved_live(stock_checkpoint: StockCheckpoints) -> None:
    checkpoint = stock_checkpoint(memory="256M", append="dirty=64", live=True)
    async with checkpoint.qemu() as vm:
        await vm.load(checkpoint.path)
        assert (await vm.wait_serial(r"^dirty \d+ (OK|BAD)\s"))[1] == "OK"
        assert (await vm.wait_serial(r"^dirty \d+ (OK|BAD)\s"))[1] == "OK"
        assert vm.ticks()


async def test_a_save_that_fails_says_why_and_the_guest_goes_on(
    guest_files: Guest, tmp_path: Path, small_disk: Path
) -> None:
    async with Qemu(guest_files) as vm:
        first = await vm.tick()
        with pytest.raises(QmpError, match="No such file or directory"):
            await vm.migrate_to(tmp_path / "nowhere" / "migfile")
        with pytest.raises(RuntimeError, match=r"migration failed: .*No space left on device"):
            await vm.migrate_to(small_disk / "migfile")
        assert await vm.tick() > first


async def test_a_file_that_is_no_checkpoint_shows_in_the_notes(guest_files: Guest, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk" * 1000)
    with pytest.raises(EOFError) as caught:
        async with Qemu(guest_files, incoming="defer") as vm:
            await vm.load(junk)
    assert any("Not a migration stream" in note for note in caught.value.__notes__)


async def test_nothing_stays_behind(guest_files: Guest) -> None:
    before = open_descriptors()
    vm = Qemu(guest_files)
    with pytest.raises(trio.TooSlowError) as caught:  # noqa: PT012 - what is left when the block is left
        async with vm:
            with trio.fail_after(0):
                await vm.wait_serial("what it never prints")
    with pytest.raises(ProcessLookupError):
        os.kill(vm.pid, 0)
    assert not vm.qmp_path.parent.exists()
    wait_until_open(before)
    assert any("its serial line" in note for note in caught.value.__notes__)


async def test_quit_ends_it(guest_files: Guest) -> None:
    async with Qemu(guest_files) as vm:
        await vm.quit()
        with pytest.raises(EOFError, match="ended before its guest printed"):
            await vm.wait_serial("anything")


async def test_arguments_that_qemu_refuses_show_in_the_notes(guest_files: Guest) -> None:
    with pytest.raises(EOFError) as caught:
        async with Qemu(guest_files, "-no-such-option"):
            pass
    assert any("-no-such-option: invalid option" in note for note in caught.value.__notes__)
