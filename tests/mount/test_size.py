"""A block of RAM has one size, and nothing that a program does to its file takes RAM away."""

import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.live.machines import SMALL, goes_on
from tests.mount.conftest import Mount
from tests.mount.harness import Mounted
from tests.qemu.guest import Guest

MiB = 1 << 20
LENGTH = 16 * MiB


def shell(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line as a user would, in `directory`."""
    return subprocess.run(["bash", "-c", command], cwd=directory, capture_output=True, text=True)


SLIPS = {
    "cp": "cp other pc.ram",
    "cp of the right length": "cp whole pc.ram",
    "echo": "echo > pc.ram",
    "dd": "dd if=other of=pc.ram status=none",
    "truncate to nothing": "truncate -s 0 pc.ram",
    "truncate to less": "truncate -s 1M pc.ram",
    "truncate to more": "truncate -s 1G pc.ram",
}


async def test_slips_on_the_ram_of_a_machine_that_was_never_saved(
    mount: Mount, guest_files: Guest, tmp_path: Path
) -> None:
    mounted = mount(tmp_path / "checkpoint", SMALL.ram_option)
    (tmp_path / "other").write_bytes(b"x" * MiB)
    os.truncate(tmp_path / "other", 3 * MiB)
    (tmp_path / "whole").touch()
    os.truncate(tmp_path / "whole", 128 * MiB)
    async with SMALL.on(mounted.ram, guest_files) as vm:
        await vm.tick()
        for number, command in enumerate(SLIPS.values(), 1):
            result = shell(command.replace("pc.ram", f"{mounted.ram}/pc.ram"), tmp_path)
            assert result.returncode != 0, command
            assert "busy" in result.stderr or "not permitted" in result.stderr, result
            assert (mounted.ram / "pc.ram").stat().st_size == 128 * MiB
            assert mounted.log.read_text().count(" was refused to process ") == number, "one line each"
        mounted.expect_log(r"O_TRUNC was refused to process \d+: pc\.ram: somebody has it open")
        mounted.expect_log(r"truncate was refused to process \d+: pc\.ram: has 134217728 bytes")
        await goes_on(vm)


def test_the_file_of_a_fresh_guest_takes_a_whole_copy(fresh: Mounted, tmp_path: Path) -> None:
    source = tmp_path / "source"
    ram = np.random.default_rng(1).bytes(MiB)
    with source.open("wb") as file:
        file.write(ram)
        file.seek(9 * MiB)  # a hole in the middle, and one at the end
        file.write(ram)
        file.truncate(LENGTH)
    assert shell(f"cp {source} {fresh.ram}/pc.ram && cmp {source} {fresh.ram}/pc.ram", tmp_path).returncode == 0
    fresh.ctl("save")


@pytest.mark.parametrize("saved", [False, True], ids=["never saved", "saved"])
def test_a_file_that_holds_data_is_not_emptied(saved: bool, fresh: Mounted, tmp_path: Path) -> None:
    ram = fresh.fill(1)
    if saved:
        fresh.ctl("save")
    (tmp_path / "other").write_bytes(b"x" * MiB)
    fresh.expect_log(r"O_TRUNC was refused to process \d+: pc\.ram: contains data.*conv=notrunc")
    for command in ("cp other", "echo >", "dd status=none if=other of="):
        result = shell(f"{command} {fresh.ram}/pc.ram".replace("= ", "="), tmp_path)
        assert "Operation not permitted" in result.stderr
        assert (fresh.ram / "pc.ram").read_bytes() == ram
    newer = ram[::-1]
    (tmp_path / "newer").write_bytes(newer)
    assert shell(f"dd status=none if=newer of={fresh.ram}/pc.ram conv=notrunc bs=1M", tmp_path).returncode == 0
    assert (fresh.ram / "pc.ram").read_bytes() == newer


def test_reset_makes_room_for_a_copy(fresh: Mounted, tmp_path: Path) -> None:
    ram = fresh.fill(1)
    (tmp_path / "source").write_bytes(ram[::-1])
    fresh.ctl("reset")
    assert shell(f"cp source {fresh.ram}/pc.ram", tmp_path).returncode == 0
    assert (fresh.ram / "pc.ram").read_bytes() == ram[::-1]


@pytest.mark.parametrize("length", [0, MiB, LENGTH - 4096, LENGTH + 4096, 1 << 30, LENGTH + 1])
def test_a_block_keeps_the_size_that_ram_gave_it(length: int, fresh: Mounted) -> None:
    fresh.expect_log(rf"truncate was refused to process \d+: pc\.ram: has {LENGTH} bytes")
    with pytest.raises(PermissionError):
        os.truncate(fresh.ram / "pc.ram", length)
    with (fresh.ram / "pc.ram").open("r+b") as file, pytest.raises(PermissionError):
        file.truncate(length)
    assert (fresh.ram / "pc.ram").stat().st_size == LENGTH
    os.truncate(fresh.ram / "pc.ram", LENGTH)  # as it is


def test_a_block_keeps_the_size_that_it_was_given_first(fresh: Mounted) -> None:
    path = fresh.ram / "vga.vram"
    fresh.expect_log(rf"truncate was refused to process \d+: vga\.vram: has {MiB} bytes")
    with path.open("xb") as file:
        file.truncate(MiB)
        with pytest.raises(PermissionError):
            file.truncate(2 * MiB)
    with pytest.raises(PermissionError):
        os.truncate(path, 0)
    assert path.stat().st_size == MiB


def test_a_block_gets_no_size_while_somebody_else_has_it_open(fresh: Mounted) -> None:
    path = fresh.ram / "vga.vram"
    fresh.expect_log(r"truncate was refused to process \d+: vga\.vram: somebody else has it open")
    with path.open("xb") as mine, path.open("rb") as other:
        for truncate in (lambda: mine.truncate(MiB), lambda: os.truncate(path, MiB)):
            with pytest.raises(OSError, match="busy") as caught:
                truncate()
            assert caught.value.errno == errno.EBUSY
        other.close()
        mine.truncate(MiB)
    assert path.stat().st_size == MiB


def test_what_else_could_change_a_size(fresh: Mounted) -> None:
    for options in ("-l 1M", "-l 1G", "-p -l 1M", "-z -l 1M", "-c -l 1M", "-i -l 1M", "-d"):
        result = shell(f"fallocate {options} {fresh.ram}/pc.ram", fresh.ram)
        assert "supported" in result.stderr, options
    with (fresh.ram / "pc.ram").open("r+b", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        os.pwrite(file.fileno(), b"x", LENGTH)
    assert (fresh.ram / "pc.ram").stat().st_size == LENGTH
