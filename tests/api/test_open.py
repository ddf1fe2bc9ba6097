"""`ckptfs.open`: blocks, physical memory, registers and devices of a file."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ckptfs
from ckptfs.errors import CheckpointError, CommandError, StorageError
from tests.doubles.checkpoints import fill
from tests.doubles.migration_file import Block, Device, MigrationFile
from tests.mount.decode import decode
from tests.physical.conftest import SavedGuests, saved

__all__ = ["saved"]

PAGES = {0: b"first", 5: b"sixth", 1500: b"far"}
BLOCKS = [Block("pc.ram", 2000, PAGES), Block("vga.vram", 3)]
SOUND = MigrationFile(blocks=BLOCKS)
STALE = MigrationFile(blocks=[Block("pc.ram", 2000, PAGES, stale={7: b"old"}), Block("vga.vram", 3)])
UNALIGNED = MigrationFile(blocks=BLOCKS, stream_offset=0x1001, alignment=4096)
PLAIN = MigrationFile(blocks=BLOCKS, capabilities=())


@pytest.mark.parametrize("file", [SOUND, STALE, UNALIGNED, PLAIN], ids=["sound", "stale", "unaligned", "plain"])
def test_blocks_hold_what_the_bitmaps_say(file: MigrationFile, tmp_path: Path) -> None:
    file.write(tmp_path / "ckpt")
    expected = fill(2000, PAGES)
    with ckptfs.open(tmp_path / "ckpt", offset=file.stream_offset) as checkpoint:
        ram = checkpoint.blocks["pc.ram"]
        assert list(checkpoint.blocks) == ["pc.ram", "vga.vram"]
        assert (len(ram), ram.page_size, ram.page_count) == (2000 * 4096, 4096, 2000)
        assert np.flatnonzero(ram.has_data()).tolist() == [0, 5, 1500]
        assert ram[5 * 4096 - 3 : 6 * 4096 + 3].tobytes() == expected[5 * 4096 - 3 : 6 * 4096 + 3]
        assert ram.read(5 * 4096 - 3, 4096) == expected[5 * 4096 - 3 :][:4096]
        assert ram.read(2000 * 4096 - 2, 100) == bytes(2)
        assert ram.read(2000 * 4096, 1) == b""
        assert ram[-4096:].size == 4096
        assert ram[9:3].size == 0
        assert ram.read(0, 1 << 40) == expected
        whole = np.asarray(ram)
        assert not np.asarray(checkpoint.blocks["vga.vram"]).any()
        with pytest.raises(ValueError, match="read-only"):
            ram[:4096][0] = 1
        with pytest.raises(TypeError, match=r"\[start:stop\]"):
            ram[::2]
    assert whole.tobytes() == expected  # still there when the file is closed


def test_a_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    SOUND.write(tmp_path / "ckpt")
    with ckptfs.open(tmp_path / "ckpt") as checkpoint:
        ram = checkpoint.blocks["pc.ram"]
        assert np.shares_memory(ram[:4096], ram[4095:8192])
        assert str(tmp_path / "ckpt") in Path("/proc/self/maps").read_text()


def test_only_what_is_looked_at_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLAIN.write(tmp_path / "ckpt")
    with ckptfs.open(tmp_path / "ckpt") as checkpoint:
        ram, asked = checkpoint.blocks["pc.ram"], []
        real = ram.read_pages
        monkeypatch.setattr(ram, "read_pages", lambda *pages: asked.append(pages) or real(*pages))
        for _ in range(2):
            assert ram[4096 : 7 * 4096].tobytes() == fill(2000, PAGES)[4096 : 7 * 4096]
        assert asked == [(5, 6)]


def test_a_block_that_the_file_leaves_out(tmp_path: Path) -> None:
    blocks = [Block("a", 4, {1: b"one"}), Block("b", 4, ignored=True)]
    MigrationFile(blocks=blocks, capabilities=("x-ignore-shared", "mapped-ram")).write(tmp_path / "ckpt")
    with ckptfs.open(tmp_path / "ckpt", map=["a@0", "b@16k"]) as checkpoint:
        assert list(checkpoint.blocks) == ["a"]
        assert checkpoint.physical.read(4096, 3) == b"one"
        with pytest.raises(CheckpointError, match="the RAM of b is not in the file"):
            checkpoint.physical.read(16 << 10, 1)


def test_a_file_that_becomes_shorter_is_an_error_and_no_signal(tmp_path: Path) -> None:
    SOUND.write(tmp_path / "ckpt")
    with ckptfs.open(tmp_path / "ckpt") as checkpoint:
        os.truncate(tmp_path / "ckpt", 1 << 20)
        with pytest.raises(StorageError, match="inside a page that it lists"):
            checkpoint.blocks["pc.ram"].read(5 * 4096, 4096)


def test_physical_memory_by_a_map_of_ones_own(tmp_path: Path) -> None:
    SOUND.write(tmp_path / "ckpt")
    with ckptfs.open(tmp_path / "ckpt", map=["pc.ram@1M"]) as checkpoint:
        assert checkpoint.physical.regions == ((1 << 20, 2000 * 4096, "pc.ram", 0),)
        assert checkpoint.physical.read((1 << 20) + 5 * 4096, 5) == b"sixth"
        assert list(checkpoint.physical.places("vga.vram", 0, 5)) == [(0, 5, None)]
        with pytest.raises(CheckpointError, match="there is no RAM at 0xfffff"):
            checkpoint.physical.read((1 << 20) - 1, 2)
    with ckptfs.open(tmp_path / "ckpt") as checkpoint, pytest.raises(CheckpointError, match="is not known"):
        _ = checkpoint.physical


def test_where_bytes_of_a_block_are_seen(tmp_path: Path) -> None:
    SOUND.write(tmp_path / "ckpt")
    with ckptfs.open(tmp_path / "ckpt", map=["pc.ram@4G+64k:1M", "pc.ram@0+64k:64k"]) as checkpoint:
        assert list(checkpoint.physical.places("pc.ram", 0, 2000 * 4096)) == [
            (0, 64 << 10, None),
            (64 << 10, 64 << 10, 0),
            (128 << 10, (1 << 20) - (128 << 10), None),
            (1 << 20, 64 << 10, 4 << 30),
            ((1 << 20) + (64 << 10), 2000 * 4096 - (1 << 20) - (64 << 10), None),
        ]
        assert list(checkpoint.physical.places("pc.ram", 70 << 10, 4096)) == [(70 << 10, 4096, 6 << 10)]


def test_devices_by_name(tmp_path: Path) -> None:
    devices = [Device("a", b"\1\2"), Device("b", b"first"), Device("b", b"second", instance_id=7)]
    MigrationFile(devices=devices).write(tmp_path / "ckpt")
    with ckptfs.open(tmp_path / "ckpt") as checkpoint:
        assert checkpoint.devices == [("a", 0), ("b", 0), ("b", 7)]
        assert checkpoint.device("b").values() == {"data": b"first"}
        assert checkpoint.device("b", 7).payload == b"second"
        with pytest.raises(CommandError, match="has no device c"):
            checkpoint.device("c")
        with pytest.raises(CommandError, match="has no device b 5"):
            checkpoint.device("b", 5)


def test_without_a_vmdesc_no_field_is_guessed(tmp_path: Path) -> None:
    MigrationFile(vmdesc=False).write(tmp_path / "ckpt")
    with ckptfs.open(tmp_path / "ckpt") as checkpoint:
        with pytest.raises(CheckpointError, match="has no vmdesc"):
            checkpoint.device("timer")
        with pytest.raises(CheckpointError, match="has no vCPU"):
            checkpoint.registers()


def test_what_stock_qemu_saved(saved: SavedGuests) -> None:
    linux = saved.linux()
    with ckptfs.open(linux.path) as checkpoint:
        assert checkpoint.machine.startswith("pc-i440fx-")
        assert checkpoint.run_state == "paused"
        assert [one.named() for one in linux.registers()] == checkpoint.registers()
        assert checkpoint.registers()[1]["cr3"] % 4096 == 0
        assert len(checkpoint.device("mc146818rtc").value("cmos_data")) == 128
        assert checkpoint.device("cpu", 1).value("env.efer") == checkpoint.registers()[1]["efer"]
        assert checkpoint.device("timer").value("cpu_ticks_offset") != 0
        with pytest.raises(CheckpointError, match="no device vmcoreinfo"):
            checkpoint.vmcoreinfo()
        content = decode(linux.path).blocks["pc.ram"]
        assert np.array_equal(checkpoint.blocks["pc.ram"], content)
        address = linux.physical[0xFFFFFFFF81000000]
        assert address is not None
        assert checkpoint.physical.read(address, 4096) == content[address : address + 4096].tobytes()


def test_the_package_itself_costs_nothing() -> None:
    program = "import sys, ckptfs; print(*{'numpy', 'trio', 'pyfuse3'} & set(sys.modules), len(dir(ckptfs)) > 0)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "True\n"
    program = "import sys, ckptfs; ckptfs.mounted; print(*{'numpy', 'trio', 'pyfuse3'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "\n"
    with pytest.raises(AttributeError, match="'nosuch'"):
        _ = ckptfs.nosuch  # type: ignore[attr-defined]
