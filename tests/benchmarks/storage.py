"""Saving and restoring RAM, without a guest, against fio on the same file system."""

import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

from tests.benchmarks.fio import fio
from tests.benchmarks.rows import GiB, MiB, Row, TiB, in_turn
from tests.benchmarks.setting import Mount, Setting, fill, make_cold, settle, sparse_checkpoint

CHANNELS = 4
"""multifd-channels of a mount, unless told otherwise; so many jobs has fio where it stands against them."""

PAGE = 4096


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

    yield Row("save", "MiB/s", *in_turn(setting.rounds, ours, theirs), "fio, 4 writers, O_DIRECT, fsync", ">= 0.9")


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
        shares = setting.shares_extents
        goal = {MiB: "<= 0.06", PAGE: "<= 0.4"}[length] if shares else ""
        yield Row(f"save again, 1 % written in {what}", "s", seconds, firsts, "the first save", goal)
        goal = "" if shares else "<= 1.0"
        yield Row(f"save again, 1 % written in {what}", "s", seconds, copies, "cp of the file, and fsync", goal)
        former, newer = (list(samples) for samples in zip(*spaces, strict=True))
        goal = "<= 0.05" if shares else ""
        yield Row(f"its new space, 1 % written in {what}", "MiB", newer, former, "the first save's", goal)


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
        yield Row(f"cold read, {_readers(jobs)}", "MiB/s", *samples, f"fio, {_readers(jobs)}, O_DIRECT", ">= 0.9")
        samples = in_turn(
            setting.rounds,
            partial(_cold, setting, "read", MiB, jobs),
            partial(_bindfs, setting, "read", MiB, jobs),
        )
        yield Row(f"cold read, {_readers(jobs)}", "MiB/s", *samples, f"bindfs, {_readers(jobs)}", ">= 1.0")

    def warm(path: Path) -> float:
        return fio(path, "read", size=setting.size, block=MiB, direct=False, invalidate=False) / MiB

    with Mount(setting) as mount:
        for path in (mount.ram, checkpoint):
            warm(path)
        samples = in_turn(setting.rounds, partial(warm, mount.ram), partial(warm, checkpoint))
    yield Row("warm read, 1 reader", "MiB/s", *samples, "fio, 1 reader, a file in the page cache", ">= 0.9")


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
        yield Row(what, "1/s", *samples, f"bindfs, {_readers(jobs)}", ">= 0.6" if jobs == 1 else ">= 0.4")


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
        yield Row(what, "ms", *samples, "the same with 1 GiB", "<= 1.3")


FIRST_VERSION = "daef2e4"
"""The commit with the first mount.ckptfs."""


def start(setting: Setting) -> Iterator[Row]:
    """mount.ckptfs until it answers, against the first version's; that is taken out of git, so no git, no row."""
    root = Path(__file__).parents[2]
    first = setting.directory / "first"
    first.mkdir()
    archive = subprocess.run(
        ["git", "-C", root, "archive", FIRST_VERSION, "ckptfs"], capture_output=True, check=False
    )
    if archive.returncode:
        return
    subprocess.run(["tar", "--extract", "--directory", first], input=archive.stdout, check=True)
    sparse_checkpoint(setting.checkpoint, GiB, every_page=True)
    samples = in_turn(2 * setting.rounds, partial(_mounting, setting, root), partial(_mounting, setting, first))
    yield Row("mount.ckptfs until it answers", "ms", *samples, "the first version", "<= 0.5")


def _mounting(setting: Setting, tree: Path) -> float:
    """Milliseconds that the mount.ckptfs of a source tree takes."""
    path = setting.directory / "mnt"
    path.mkdir(exist_ok=True)
    program = "import sys; sys.argv[0] = 'mount.ckptfs'; from ckptfs.cli.mount import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": ""}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, setting.checkpoint, path], check=True, env=environment)
    seconds = time.perf_counter() - started
    subprocess.run(["umount", path], check=True)
    return seconds * 1000


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
    with bindfs(setting.directory, setting.directory / "bindfs") as path:
        file = path / setting.checkpoint.name
        return fio(file, what, size=setting.size, block=block, jobs=jobs, direct=False) / block


def touches(setting: Setting) -> Iterator[Row]:
    """Pages at random places, touched through a new mapping, each for the first time: cold."""
    setting.make_checkpoint()

    def ours() -> float:
        make_cold(setting.checkpoint)
        with Mount(setting) as mount:
            return _touched(mount.ram, setting.size)

    def theirs() -> float:
        make_cold(setting.checkpoint)
        with bindfs(setting.directory, setting.directory / "bindfs") as path:
            return _touched(path / setting.checkpoint.name, setting.size)

    samples = in_turn(setting.rounds, ours, theirs)
    yield Row("cold scattered touches through mmap", "1/s", *samples, "bindfs", ">= 1.0")


TOUCHES = 512


def _touched(path: Path, size: int) -> float:
    """Touches a second."""
    fd = os.open(path, os.O_RDONLY)
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as memory:
        os.close(fd)
        places = Random(1).sample(range(size // PAGE), min(TOUCHES, size // MiB))
        started = time.perf_counter()
        for place in places:
            memory[place * PAGE]
        return len(places) / (time.perf_counter() - started)


def writes(setting: Setting) -> Iterator[Row]:
    """write(2) of 4 KiB and of 512 bytes into RAM, one after another, against bindfs on a tmpfs."""
    length = min(setting.size, 64 * MiB)
    plain = setting.directory / "tmpfs"
    plain.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * length}", "none", plain], check=True)
    try:
        (plain / "file").write_bytes(bytes(length))
        with Mount(setting, f"ram=pc.ram:{length}") as mount, bindfs(plain, setting.directory / "bindfs") as path:
            for size in (PAGE, 512):
                samples = in_turn(
                    setting.rounds,
                    partial(_written, mount.ram, length, size),
                    partial(_written, path / "file", length, size),
                )
                yield Row(f"write(2) of {size} bytes into RAM", "1/s", *samples, "bindfs on tmpfs", ">= 0.5")
    finally:
        subprocess.run(["umount", plain], check=True)


def _written(path: Path, length: int, size: int) -> float:
    """Calls of write(2) a second, through a file that is 64 MiB at most."""
    fd = os.open(path, os.O_WRONLY)
    data = os.urandom(size)
    count = min(length // size, 16384)
    started = time.perf_counter()
    for number in range(count):
        os.pwrite(fd, data, number * size)
    seconds = time.perf_counter() - started
    os.close(fd)
    return count / seconds


@contextmanager
def bindfs(directory: Path, path: Path) -> Iterator[Path]:
    """A directory as a FUSE file system written in C shows it, at ``path``."""
    path.mkdir(exist_ok=True)
    subprocess.run(["bindfs", "--multithreaded", directory, path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def _readers(jobs: int) -> str:
    return "1 reader" if jobs == 1 else f"{jobs} readers"
