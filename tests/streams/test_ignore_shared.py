"""Capability x-ignore-shared: RAM that stays in a file of its own, written by stock QEMU and by a mount."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptfs.channels.backing_file import FileSource
from ckptfs.mapped_ram.checkpoint import read_checkpoint
from ckptfs.namespace.names import encode_name
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import decode as decode_mapped
from tests.mount.harness import Mounted, run_mount
from tests.qemu.machine import Qemu
from tests.qemu.stock_checkpoint import StockCheckpoint, StockCheckpoints
from tests.streams.decode import PAGE, decode

IGNORE_SHARED = [{"capability": "x-ignore-shared", "state": True}]


def on_ram_file(checkpoint: StockCheckpoint, ram: Path) -> Qemu:
    """The checkpoint's machine, with its main memory in a shared file."""
    backend = f"memory-backend-file,id=pc.ram,size=128M,mem-path={ram},share=on"
    return checkpoint.qemu("-object", backend, machine_options=",memory-backend=pc.ram")


async def save_shared(checkpoint: StockCheckpoint, directory: Path) -> tuple[Path, Path]:
    """What stock QEMU makes of the checkpoint with x-ignore-shared: the stream, and the file of its RAM."""
    stream, ram = directory / "stream", directory / "ram"
    async with on_ram_file(checkpoint, ram) as vm:
        await vm.load(checkpoint.path)
        await vm.qmp("migrate-set-capabilities", capabilities=IGNORE_SHARED)
        await vm.migrate_to(stream, mapped_ram=False)
    return stream, ram


async def runs_on(checkpoint: StockCheckpoint, stream: Path, ram: Path) -> None:
    """See that stock QEMU goes on from a stream and a copy of its RAM file."""
    copy = stream.with_name("copy")
    shutil.copy(ram, copy)
    async with on_ram_file(checkpoint, copy) as vm:
        await vm.qmp("migrate-set-capabilities", capabilities=IGNORE_SHARED)
        await vm.load(stream, mapped_ram=False)
        await vm.cont()
        assert await vm.tick() > checkpoint.last_tick


def assert_ram(mounted: Mounted, blocks: dict[str, np.ndarray[Any, np.dtype[np.uint8]]]) -> None:
    for idstr, expected in blocks.items():
        ram = np.fromfile(mounted.ram / encode_name(idstr).decode(), np.uint8)
        assert np.array_equal(ram, expected), idstr


def refusal(spec: Path, directory: Path, *options: str) -> str:
    """What mount.ckptfs says when it refuses."""
    directory.mkdir()
    result = run_mount(spec, directory, *options)
    assert result.returncode == 32
    return result.stderr


async def test_ram_that_stays_in_its_file(stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path) -> None:
    checkpoint = stock_checkpoint()
    source = decode_mapped(checkpoint.path).blocks
    stream, ram = await save_shared(checkpoint, tmp_path)
    stock = decode(stream)
    assert stock.capabilities == ["x-ignore-shared"]
    assert not stock.blocks["pc.ram"].records

    message = f"{stream}: leaves out pc.ram (x-ignore-shared): name its file, -o shared=pc.ram:PATH"
    assert message in refusal(stream, tmp_path / "refused")
    mounted = mount(stream, f"shared=pc.ram:{ram}", "multifd=off,mapped_ram=off,x_ignore_shared=on")
    assert_ram(mounted, source)
    again = tmp_path / "again"
    mounted.ctl(f"save {again}")
    assert_ram(mounted, source)
    saved = decode(again)
    assert (saved.machine, saved.configuration) == (stock.machine, stock.configuration)
    assert again.stat().st_size < stream.stat().st_size + (1 << 20)
    for idstr, block in saved.blocks.items():
        assert (block.used_length, block.address) == (stock.blocks[idstr].used_length, stock.blocks[idstr].address)
        assert set(block.records) == set(stock.blocks[idstr].records)
        assert np.array_equal(block.ram, stock.blocks[idstr].ram)
    assert saved.device_sections == stock.device_sections  # the vmdesc, too
    mounted.umount()
    await runs_on(checkpoint, again, ram)
    assert_ram(mount(again, f"shared=pc.ram:{ram}"), source)


async def test_pages_that_were_written_are_not_left_out(
    stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    checkpoint = stock_checkpoint()
    stream, ram = await save_shared(checkpoint, tmp_path)
    before = ram.read_bytes()
    mounted = mount(stream, f"shared=pc.ram:{ram}", "multifd=off,mapped_ram=off,x_ignore_shared=on")
    with (mounted.ram / "pc.ram").open("r+b") as file:
        file.seek(5 * PAGE)
        file.write(b"written")
    again = tmp_path / "again"
    with pytest.raises(
        OSError, match=r"pc.ram: pages were written, .*switch x-ignore-shared off, or `reset`"
    ) as error:
        mounted.ctl(f"save {again}")
    assert error.value.errno == errno.EPERM
    assert not any("again" in name for name in os.listdir(tmp_path))
    mounted.ctl("migrate_set_capability x-ignore-shared off")
    mounted.ctl(f"save {again}")  # with all RAM, from now on also in the mount
    saved = decode(again)
    assert saved.capabilities == []
    assert saved.blocks["pc.ram"].ram[5 * PAGE :][:7].tobytes() == b"written"
    mounted.ctl("migrate_set_capability x-ignore-shared on")
    mounted.ctl(f"save {again}")
    assert set(decode(again).blocks["pc.ram"].records) == set(range((128 << 20) // PAGE))
    assert ram.read_bytes() == before


async def test_together_with_mapped_ram(stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path) -> None:
    checkpoint = stock_checkpoint()
    source = decode_mapped(checkpoint.path).blocks
    stream, ram = await save_shared(checkpoint, tmp_path)
    mounted = mount(stream, f"shared=pc.ram:{ram}", "x_ignore_shared=on")
    both = tmp_path / "both"
    warning = "QEMU 10.2 and older can't load mapped-ram with x-ignore-shared"
    mounted.expect_log(warning)
    assert mounted.ctl(f"save {both}").endswith(f"; {warning}")
    assert both.stat().st_size < 64 << 20
    assert_ram(mounted, source)
    mounted.ctl("migrate_set_capability x-ignore-shared off")
    complete = tmp_path / "complete"
    mounted.ctl(f"save {complete}")
    mounted.umount()

    with both.open("rb") as file:
        header, file_bmaps = read_checkpoint(FileSource(file.fileno()))
    assert header.capabilities == ("x-ignore-shared", "mapped-ram")
    assert [block.idstr for block in header.blocks if block.ignored] == ["pc.ram"]
    assert "pc.ram" not in file_bmaps
    stock = decode(stream).blocks
    assert {block.idstr: block.address for block in header.blocks} == {
        idstr: block.address for idstr, block in stock.items()
    }
    assert "leaves out pc.ram" in refusal(both, tmp_path / "refused")
    assert_ram(mount(both, f"shared=pc.ram:{ram}"), source)

    decoded = decode_mapped(complete)
    assert all(np.array_equal(decoded.blocks[idstr], expected) for idstr, expected in source.items())
    async with checkpoint.qemu() as vm:
        await vm.load(complete, multifd=2)
        await vm.cont()
        assert await vm.tick() > checkpoint.last_tick


@pytest.mark.parametrize("capabilities", [["x-ignore-shared"], ["x-ignore-shared", "mapped-ram"]])
def test_a_ram_file_that_is_too_short_is_refused(capabilities: list[str], tmp_path: Path) -> None:
    stream, ram = tmp_path / "stream", tmp_path / "ram"
    blocks = [Block("pc.ram", 8, ignored=True), Block("vga.vram", 2, {1: b"x"})]
    MigrationFile(blocks, capabilities=capabilities).write(stream)
    ram.write_bytes(bytes(7 * PAGE))
    message = refusal(stream, tmp_path / "refused", f"shared=pc.ram:{ram}")
    assert f"{ram}: has {7 * PAGE} bytes, block pc.ram has {8 * PAGE}" in message


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "No such file or directory"),
        (os.mkdir, "is not a regular file"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    ],
    ids=["nothing", "directory", "FIFO", "device"],
)
def test_what_is_no_ram_file_is_refused_by_its_own_name(
    make: Callable[[Path], None], text: str, tmp_path: Path
) -> None:
    stream, ram = tmp_path / "stream", tmp_path / "ram"
    MigrationFile([Block("pc.ram", 8, ignored=True)], capabilities=["x-ignore-shared"]).write(stream)
    make(ram)
    assert f"{ram}: {text}" in refusal(stream, tmp_path / "refused", f"shared=pc.ram:{ram}")
