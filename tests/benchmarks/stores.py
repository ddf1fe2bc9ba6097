"""A guest that comes from an object store, against its file on the local disk, and against downloading it first."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import trio

from tests.benchmarks.machines import Starts, guest_on_mount, name_of, start_lazily
from tests.benchmarks.rows import MiB, Row
from tests.benchmarks.setting import Setting, make_cold, settle
from tests.qemu.guest import Guest, build_guest
from tests.stores.seaweed import Seaweed


def store(setting: Setting) -> Iterator[Row]:
    """From the start of mount.ckptfs, or of the download, to the guest's next tick; everything is cold."""
    directory = setting.directory / "seaweed"
    directory.mkdir()
    seaweed = Seaweed(directory)
    os.environ.update(seaweed.environment | {"TMPDIR": str(setting.directory)})
    try:
        for memory in setting.guest_sizes:
            yield from trio.run(_store, setting, seaweed, memory)
    finally:
        seaweed.end()


async def _store(setting: Setting, seaweed: Seaweed, memory: int) -> list[Row]:
    guest = build_guest(setting.directory)
    bucket = seaweed.bucket()
    async with guest_on_mount(setting, guest, memory) as (mount, *_):
        mount.ctl("save")
        mount.ctl(f"save s3://{bucket}/vm1")
    length = seaweed.client.head_object(Bucket=bucket, Key="vm1")["ContentLength"]
    lazily, local, downloaded = Starts(), Starts(), Starts()
    for _ in range(setting.rounds):
        _make_cold(setting)
        await start_lazily(setting, guest, memory, lazily, spec=f"s3://{bucket}/vm1")
        _make_cold(setting)
        await start_lazily(setting, guest, memory, local)
        _make_cold(setting)
        await _start_downloaded(setting, seaweed, bucket, guest, memory, downloaded)
    what = f"from a store, until its first tick, {name_of(memory)}"
    return [
        Row(what, "s", lazily.tick, local.tick, "a mount of the file on the local disk"),
        Row(what, "s", lazily.tick, downloaded.tick, "downloading it (GET, tar -xS), and a mount of that"),
        Row(
            f"fetched from the store by then, {name_of(memory)}",
            "MiB", lazily.read_tick, [length / MiB], "the whole object",
        ),
    ]  # fmt: skip


async def _start_downloaded(
    setting: Setting, seaweed: Seaweed, bucket: str, guest: Guest, memory: int, starts: Starts
) -> None:
    started = time.perf_counter()
    path = setting.directory / "downloaded"
    _download(seaweed, bucket, path)
    took, mounted = time.perf_counter() - started, Starts()
    await start_lazily(setting, guest, memory, mounted, spec=str(path))
    starts.tick.append(took + mounted.tick[0])
    os.unlink(path)


def _download(seaweed: Seaweed, bucket: str, path: Path) -> None:
    arguments = ["tar", "-xSf", "-", "-C", path.parent, f"--transform=s/.*/{path.name}/"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE) as tar:
        assert tar.stdin is not None
        for part in seaweed.client.get_object(Bucket=bucket, Key="vm1")["Body"].iter_chunks(MiB):
            tar.stdin.write(part)
    assert tar.returncode == 0


def _make_cold(setting: Setting) -> None:
    settle(setting.directory)
    for path in (setting.checkpoint, *(setting.directory / "seaweed").rglob("*.dat")):
        make_cold(path)
