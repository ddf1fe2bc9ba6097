"""Saving and restoring RAM, without a guest, against fio on the same file system."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from tests.benchmarks.fio import fio
from tests.benchmarks.rows import GiB, MiB, Row, in_turn
from tests.benchmarks.setting import Mount, Setting, fill, make_cold, settle, sparse_checkpoint

CHANNELS = 4
"""multifd-channels of a mount, unless told otherwise; so many jobs has fio where it stands against them."""

PAGE = 4096
TiB = 1 << 40


def save(setting: Setting) -> Iterator[Row]:
    """`echo save > ctl` on RAM that was just filled; it returns when the checkpoint is durable."""
    file = setting.directory / "fio"

    def ours() -> float:
        settle(setting.directory)
        with Mount(setting, f"ram=pc.ram:{setting.size}") as mount:
            fill(mount.ram, setting.size)
            seconds = mount.ctl("save")
        setting.checkpoint.unlink()
        return setting.size / seconds / MiB

    def theirs() -> float:
        settle(setting.directory)
        rate = fio(file, "write", size=setting.size, block=MiB, jobs=CHANNELS, direct=True)
        file.unlink()
        return rate / MiB

    yield Row("save", "MiB/s", *in_turn(setting.rounds, ours, theirs), "fio, 4 writers, O_DIRECT, fsync")


def again(setting: Setting) -> Iterator[Row]:
    """A save after which 1 % of RAM was written, in runs of 1 MiB and as single pages: against the first save.

    Where the file system can't share extents, a save writes all of it again: against cp(1) and fsync.
    """
    copied = setting.directory / "copied"
    for what, length in (("runs of 1 MiB", MiB), ("single pages", PAGE)):
        times: list[tuple[float, float, float]] = []
        spaces: list[tuple[float, float]] = []
        for _ in range(setting.rounds):
            with Mount(setting, f"ram=pc.ram:{setting.size}") as mount:
                fill(mount.ram, setting.size)
                first, first_space = _saved(setting, mount, "first")
                _write_some(mount.ram, setting.size, length)
                second, second_space = _saved(setting, mount, "second")
            make_cold(setting.directory / "first")
            times.append((first, second, _copy(setting.directory / "first", copied)))
            spaces.append((first_space, second_space))
            for path in (copied, setting.directory / "first", setting.directory / "second"):
                path.unlink()
        firsts, seconds, copies = (list(samples) for samples in zip(*times, strict=True))
        yield Row(f"save again, 1 % written in {what}", "s", seconds, firsts, "the first save")
        yield Row(f"save again, 1 % written in {what}", "s", seconds, copies, "cp of the file, and fsync")
        former, newer = (list(samples) for samples in zip(*spaces, strict=True))
        yield Row(f"its new space, 1 % written in {what}", "MiB", newer, former, "the first save's")


def _saved(setting: Setting, mount: Mount, name: str) -> tuple[float, float]:
    """Save to a new name; return seconds, and MiB that are in use since."""
    settle(setting.directory)
    before = shutil.disk_usage(setting.directory).used
    seconds = mount.ctl(f"save {setting.directory / name}")
    settle(setting.directory)
    return seconds, (shutil.disk_usage(setting.directory).used - before) / MiB


def _write_some(path: Path, size: int, length: int) -> None:
    """Write a hundredth of a file of RAM, at random places, ``length`` bytes at each."""
    fd = os.open(path, os.O_WRONLY)
    for place in Random(1).sample(range(size // length), max(1, size // length // 100)):
        os.pwrite(fd, os.urandom(length), place * length)
    os.close(fd)


def _copy(source: Path, target: Path) -> float:
    """Copy all bytes of a file, and sync; return how many seconds it took."""
    settle(source.parent)
    started = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return time.perf_counter() - started


def read(setting: Setting) -> Iterator[Row]:
    """Sequential reads of ram/pc.ram, cold and warm."""
    checkpoint = setting.make_checkpoint()
    for jobs in (1, CHANNELS):
        samples = in_turn(
            setting.rounds,
            partial(_cold, setting, "read", MiB, jobs),
            partial(_direct, setting, "read", MiB, jobs),
        )
        yield Row(f"cold read, {_readers(jobs)}", "MiB/s", *samples, f"fio, {_readers(jobs)}, O_DIRECT")
        samples = in_turn(
            setting.rounds,
            partial(_cold, setting, "read", MiB, jobs),
            partial(_bindfs, setting, "read", MiB, jobs),
        )
        yield Row(f"cold read, {_readers(jobs)}", "MiB/s", *samples, f"bindfs, {_readers(jobs)}")

    def warm(path: Path) -> float:
        return fio(path, "read", size=setting.size, block=MiB, direct=False, invalidate=False) / MiB

    with Mount(setting) as mount:
        for path in (mount.ram, checkpoint):
            warm(path)
        samples = in_turn(setting.rounds, partial(warm, mount.ram), partial(warm, checkpoint))
    yield Row("warm read, 1 reader", "MiB/s", *samples, "fio, 1 reader, a file in the page cache")


def random(setting: Setting) -> Iterator[Row]:
    """Cold reads of 4 KiB at random places."""
    setting.make_checkpoint()
    for jobs in (1, CHANNELS):
        samples = in_turn(
            setting.rounds,
            partial(_cold, setting, "randread", PAGE, jobs),
            partial(_direct, setting, "randread", PAGE, jobs),
        )
        what = f"cold random reads of 4 KiB, {_readers(jobs)}"
        yield Row(what, "1/s", *samples, f"fio, {_readers(jobs)}, O_DIRECT")
        samples = in_turn(
            setting.rounds,
            partial(_cold, setting, "randread", PAGE, jobs),
            partial(_bindfs, setting, "randread", PAGE, jobs),
        )
        yield Row(what, "1/s", *samples, f"bindfs, {_readers(jobs)}")


def restore(setting: Setting) -> Iterator[Row]:
    """`echo restore > ctl`: everything into memory."""
    setting.make_checkpoint()

    def ours() -> float:
        make_cold(setting.checkpoint)
        with Mount(setting) as mount:
            return setting.size / mount.ctl("restore") / MiB

    samples = in_turn(setting.rounds, ours, partial(_direct, setting, "read", MiB, CHANNELS))
    yield Row("restore", "MiB/s", *samples, "fio, 4 readers, O_DIRECT")


def mount(setting: Setting) -> Iterator[Row]:
    """mount.ckptfs, from its start until it has returned and the mount answers."""

    def mounting(length: int, every_page: bool) -> float:
        sparse_checkpoint(setting.checkpoint, length, every_page=every_page)
        with Mount(setting) as mount:
            return mount.mounted_after * 1000

    for every_page in (False, True):
        samples = in_turn(
            setting.rounds,
            partial(mounting, TiB, every_page),
            partial(mounting, GiB, every_page),
        )
        what = f"mount of 1 TiB, {'every page' if every_page else 'no page'} in the checkpoint"
        yield Row(what, "ms", *samples, "the same with 1 GiB")


def _cold(setting: Setting, what: str, block: int, jobs: int) -> float:
    """fio on ram/pc.ram of a new mount: blocks a second."""
    make_cold(setting.checkpoint)
    with Mount(setting) as mount:
        return fio(mount.ram, what, size=setting.size, block=block, jobs=jobs, direct=False) / block


def _direct(setting: Setting, what: str, block: int, jobs: int) -> float:
    """fio on the checkpoint itself: blocks a second."""
    make_cold(setting.checkpoint)
    return fio(setting.checkpoint, what, size=setting.size, block=block, jobs=jobs, direct=True) / block


def _bindfs(setting: Setting, what: str, block: int, jobs: int) -> float:
    """fio on the checkpoint as bindfs shows it, a FUSE file system written in C: blocks a second."""
    make_cold(setting.checkpoint)
    path = setting.directory / "bindfs"
    path.mkdir(exist_ok=True)
    subprocess.run(["bindfs", "--multithreaded", setting.directory, path], check=True)
    try:
        file = path / setting.checkpoint.name
        return fio(file, what, size=setting.size, block=block, jobs=jobs, direct=False) / block
    finally:
        subprocess.run(["umount", path], check=True)


def _readers(jobs: int) -> str:
    return "1 reader" if jobs == 1 else f"{jobs} readers"
