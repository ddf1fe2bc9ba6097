"""Dozens of saves, restores and resets: descriptors, threads and memory of the daemon stay flat."""

import os
from pathlib import Path

from tests.control.footprint import footprint, memory_length, thread_count
from tests.mount.conftest import Mount

MiB = 1 << 20
LENGTH = 8 * MiB
ROUNDS = 40
WARM_ROUNDS = 10


def test_saves_restores_and_resets_leave_nothing(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", f"ram=pc.ram:{LENGTH},ram=vga.vram:1M")
    targets = [tmp_path / "checkpoint", tmp_path / "other"]
    data = os.urandom(LENGTH // 2)

    def do_round(number: int) -> None:
        with (mounted.ram / "pc.ram").open("r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), data, number % 7 * 4096) == len(data)
            assert os.pwrite(file.fileno(), data[: 1000 + number], LENGTH - MiB) == 1000 + number
        mounted.ctl(f"save {targets[number % 2]}")
        with (mounted.ram / "vga.vram").open("r+b", buffering=0) as file:
            file.write(b"dropped again")
        mounted.ctl("reset")
        mounted.ctl("prefetch")
        assert (mounted.ram / "vga.vram").read_bytes() == bytes(MiB)

    for number in range(WARM_ROUNDS):
        do_round(number)
    before = footprint(mounted.pid), memory_length(mounted.pid)
    threads = thread_count(mounted.pid)
    for number in range(WARM_ROUNDS, WARM_ROUNDS + ROUNDS):
        do_round(number)
    # It is one target or the other that is the base; an even number of rounds ends as it began.
    assert footprint(mounted.pid) == before[0]
    assert thread_count(mounted.pid) <= threads + 2
    assert memory_length(mounted.pid) < before[1] + 16 * MiB  # what is leaked each round would be more
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "log1", "mnt1", "other"]


def test_mounts_filled_restored_and_saved_leave_nothing(mount: Mount, tmp_path: Path) -> None:
    # Once all is in memory every save keeps it there: no checkpoint is held open.
    mounted = mount(tmp_path / "checkpoint", f"ram=pc.ram:{LENGTH}")
    data = os.urandom(LENGTH // 2)

    def do_round(number: int) -> None:
        with (mounted.ram / "pc.ram").open("r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), data, number % 7 * 4096) == len(data)
        mounted.ctl("save")
        mounted.ctl("restore")

    for number in range(WARM_ROUNDS):
        do_round(number)
    before, memory, threads = footprint(mounted.pid), memory_length(mounted.pid), thread_count(mounted.pid)
    for number in range(WARM_ROUNDS, WARM_ROUNDS + ROUNDS):
        do_round(number)
    assert footprint(mounted.pid) == before
    assert str(tmp_path / "checkpoint") not in before.descriptors
    assert thread_count(mounted.pid) <= threads + 2
    assert memory_length(mounted.pid) < memory + 2 * MiB
