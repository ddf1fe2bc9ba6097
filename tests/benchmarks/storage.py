"""Saving and restoring RAM, without a guest, against fio on the same file system."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

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


def _readers(jobs: int) -> str:
    return "1 reader" if jobs == 1 else f"{jobs} readers"
