"""A live checkpoint of a running QEMU, and a start from a checkpoint, against what stock QEMU does by itself."""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tests.benchmarks.daemon import memory_of
from tests.benchmarks.rows import GiB, MiB, Row, Samples, TiB
from tests.benchmarks.setting import Mount, Setting, drop_caches, fill, make_cold, settle, sparse_checkpoint
from tests.mount.harness import BIN
from tests.qemu.guest import Guest, build_guest
from tests.qemu.machine import Qemu
from tests.qemu.qmp import Qmp

CHANNELS = 4
STOCK_SAVE = "stock QEMU, stop to completed, multifd 4, direct-io"
STOCK_LOAD = "stock QEMU, multifd 4, direct-io"


def live(setting: Setting) -> Iterator[Row]:
    """`echo save > ctl` on a running guest that does little, and stock QEMU's save of the same guest."""
    for memory in setting.guest_sizes:
        yield from trio.run(_live, setting, memory)


async def _live(setting: Setting, memory: int) -> list[Row]:
    guest = build_guest(setting.directory)
    reported: Samples = []
    seen: Samples = []
    whole: Samples = []
    stock: Samples = []
    stock_file = setting.directory / "stock"
    async with _guest_on_mount(setting, guest, memory) as (mount, vm, monitor):
        mount.ctl("save")
        async with Qemu(guest, memory=_mebibytes(memory), incoming="defer") as other:
            await other.load(setting.checkpoint, multifd=CHANNELS, direct_io=True)
            await other.stop()

            async def ours() -> None:
                settle(setting.directory)
                await vm.tick()
                await monitor.execute("query-status")
                monitor.events.clear()
                whole.append(mount.ctl("save"))
                reported.append(float(mount.status()["downtime"]))
                seen.append(await _pause(monitor))

            async def theirs() -> None:
                stock_file.unlink(missing_ok=True)
                settle(setting.directory)
                await other.cont()
                await other.tick()
                started = time.perf_counter()
                await other.stop()
                await other.migrate_to(stock_file, multifd=CHANNELS, direct_io=True)
                stock.append(time.perf_counter() - started)

            for _ in range(setting.rounds):
                await ours()
                await vm.stop()  # neither takes the other's processor time
                await theirs()
                await vm.cont()
    stock_ms = [seconds * 1000 for seconds in stock]
    size = _name(memory)
    return [
        Row(f"guest pause of a live save, {size}, by status", "ms", reported, stock_ms, STOCK_SAVE),
        Row(f"guest pause of a live save, {size}, STOP to RESUME", "ms", seen, stock_ms, STOCK_SAVE),
        Row(f"the whole live save, {size}", "s", whole, stock, STOCK_SAVE, _whole_goal(setting, memory)),
    ]


def _whole_goal(setting: Setting, memory: int) -> str:
    if memory != max(setting.guest_sizes):
        return ""
    return "<= 0.1" if setting.shares_extents else "<= 1.2"


def stock(setting: Setting) -> Iterator[Row]:
    """A save of RAM that was just filled, until it is durable: against stock QEMU's, and fdatasync."""
    yield trio.run(_stock, setting)


async def _stock(setting: Setting) -> Row:
    guest = build_guest(setting.directory)
    memory = max(setting.size, 256 * MiB)
    file, theirs_file = setting.directory / "save", setting.directory / "stock"
    ours: Samples = []
    theirs: Samples = []
    async with _guest_on_mount(setting, guest, memory) as (mount, *_):
        mount.ctl("save")
    async with Qemu(guest, memory=_mebibytes(memory), incoming="defer") as other:
        await other.load(setting.checkpoint, multifd=CHANNELS, direct_io=True)
        await other.stop()
        setting.checkpoint.unlink()
        for _ in range(setting.rounds):
            settle(setting.directory)
            with Mount(setting, f"ram=pc.ram:{memory}") as mount:
                fill(mount.ram, memory)
                ours.append(mount.ctl(f"save {file}"))
            file.unlink()
            settle(setting.directory)
            started = time.perf_counter()
            await other.migrate_to(theirs_file, multifd=CHANNELS, direct_io=True)
            fd = os.open(theirs_file, os.O_RDONLY)
            os.fdatasync(fd)
            os.close(fd)
            theirs.append(time.perf_counter() - started)
            theirs_file.unlink()
    what = "stock QEMU, multifd 4, direct-io, then fdatasync"
    return Row(f"save, {_name(memory)}", "s", ours, theirs, what, "<= 1.0")


def recorded(setting: Setting) -> Iterator[Row]:
    """The first tick of a cold guest on a mount, with a recorded working set and without."""
    yield trio.run(_recorded, setting)


async def _recorded(setting: Setting) -> Row:
    guest = build_guest(setting.directory)
    memory = max(setting.guest_sizes)
    async with _guest_on_mount(setting, guest, memory) as (mount, *_):
        mount.ctl("save")
    await _start_lazily(setting, guest, memory, _Starts(), recording=True)
    with_it, without = _Starts(), _Starts()
    for _ in range(setting.rounds):
        make_cold(setting.checkpoint)
        await _start_lazily(setting, guest, memory, with_it, "prefetch=recorded")
        make_cold(setting.checkpoint)
        await _start_lazily(setting, guest, memory, without)
    what = f"first tick with a recorded working set, {_name(memory)}"
    return Row(what, "s", with_it.tick, without.tick, "without", "<= 0.7")


def sizes(setting: Setting) -> Iterator[Row]:
    """Pause, save time, time to the first tick, and the daemon's memory, by the size of RAM: the plot."""
    for memory in setting.plot_sizes:
        yield from trio.run(_size, setting, memory)
    sparse_checkpoint(setting.checkpoint, TiB, every_page=True)
    with Mount(setting) as mount:
        yield Row("by size: daemon's memory", "MiB", [memory_of(mount.pid)], [], "", "<= 60", TiB)
        yield Row("by size: mount.ckptfs until it answers", "s", [mount.mounted_after], [], "", "", TiB)


async def _size(setting: Setting, memory: int) -> list[Row]:
    guest = build_guest(setting.directory)
    async with _guest_on_mount(setting, guest, memory) as (mount, vm, _):
        settle(setting.directory)
        save = mount.ctl("save")
        await vm.tick()
        mount.ctl("save")
        pause = float(mount.status()["downtime"]) / 1000
    starts = _Starts()
    make_cold(setting.checkpoint)
    await _start_lazily(setting, guest, memory, starts)
    with Mount(setting) as mount:
        kept, mounted_after = memory_of(mount.pid), mount.mounted_after
    return [
        Row("by size: guest pause of a live save", "s", [pause], [], "", at=memory),
        Row("by size: first save, until durable", "s", [save], [], "", at=memory),
        Row("by size: first tick of a cold guest", "s", starts.tick, [], "", at=memory),
        Row("by size: mount.ckptfs until it answers", "s", [mounted_after], [], "", at=memory),
        Row("by size: daemon's memory", "MiB", [kept], [], "", "<= 60", memory),
    ]


@asynccontextmanager
async def _guest_on_mount(setting: Setting, guest: Guest, memory: int) -> AsyncIterator[tuple[Mount, Qemu, Qmp]]:
    """A new guest that ticks, no page of its RAM zero; and a monitor that keeps its events whole."""
    setting.checkpoint.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as sockets:
        path = Path(sockets) / "events"
        vm = Qemu(
            guest,
            *_backend(setting, memory),
            "-qmp", f"unix:{path},server=on,wait=off",
            memory=_mebibytes(memory), machine="pc,memory-backend=pc.ram",
        )  # fmt: skip
        with Mount(setting, f"ram=pc.ram:{memory}", f"qmp={vm.qmp_path}") as mount:
            fill(mount.ram, memory)  # what the guest's kernel has no use for stays like this
            async with vm, await trio.open_unix_socket(path) as stream:
                monitor = Qmp(stream)
                await monitor.greet()
                await vm.tick()
                yield mount, vm, monitor


async def idle_pauses(setting: Setting, memory: int) -> Samples:
    """Milliseconds for which live saves pause a guest that does little."""
    pauses = []
    async with _guest_on_mount(setting, build_guest(setting.directory), memory) as (mount, vm, monitor):
        for _ in range(setting.rounds):
            settle(setting.directory)
            await vm.tick()
            await monitor.execute("query-status")
            monitor.events.clear()
            mount.ctl("save")
            pauses.append(await _pause(monitor))
    setting.checkpoint.unlink()
    return pauses


async def _pause(monitor: Qmp) -> float:
    """Milliseconds between the one STOP and the one RESUME that came, by QEMU's own clock."""
    await monitor.execute("query-status")  # what came before its reply has been read now
    moments = {event["event"]: event["timestamp"] for event in monitor.events}
    stop, resume = (
        moments[name]["seconds"] * 1000 + moments[name]["microseconds"] / 1000 for name in ("STOP", "RESUME")
    )
    return float(resume - stop)


def running(setting: Setting) -> Iterator[Row]:
    """From the start of mount.ckptfs to a running guest, and stock QEMU's load of the same file; both cold."""
    for memory in setting.guest_sizes:
        yield from trio.run(_running, setting, memory)


async def _running(setting: Setting, memory: int) -> list[Row]:
    guest = build_guest(setting.directory)
    async with _guest_on_mount(setting, guest, memory) as (mount, *_):
        mount.ctl("save")
    size = _name(memory)
    all_of_it = [memory / MiB]
    rows = []
    for what, make_cold_for in _COLDNESS.items():
        ours, theirs = _Starts(), _Starts()
        for _ in range(setting.rounds):
            make_cold_for(setting)
            await _start_lazily(setting, guest, memory, ours)
            make_cold_for(setting)
            await _start_stock(setting, guest, memory, theirs)
        rows += [
            Row(f"{what}: until the guest runs, {size}", "s", ours.running, theirs.running, STOCK_LOAD),
            Row(f"{what}: until its first tick, {size}", "s", ours.tick, theirs.tick, STOCK_LOAD),
        ]
    return [
        *rows,
        Row(f"read when the guest runs, {size}", "MiB", ours.read_running, all_of_it, "all of RAM"),
        Row(f"read at its first tick, {size}", "MiB", ours.read_tick, all_of_it, "all of RAM"),
    ]


_COLDNESS: dict[str, Callable[[Setting], None]] = {
    "checkpoint cold": lambda setting: make_cold(setting.checkpoint),
    "all caches dropped": lambda setting: drop_caches(),
}


@dataclass(frozen=True)
class _Starts:
    """Seconds from the beginning, and MiB of RAM read from the checkpoint by then."""

    running: Samples = field(default_factory=list)
    tick: Samples = field(default_factory=list)
    read_running: Samples = field(default_factory=list)
    read_tick: Samples = field(default_factory=list)


async def _start_lazily(
    setting: Setting, guest: Guest, memory: int, starts: _Starts, *options: str, recording: bool = False
) -> None:
    started = time.perf_counter()
    with Mount(setting, *options) as mount:
        async with Qemu(
            guest,
            *_backend(setting, memory),
            memory=_mebibytes(memory),
            machine="pc,memory-backend=pc.ram",
            incoming=f"file:{mount.path}/vmstate",
        ) as vm:
            await _until_running(vm)
            starts.running.append(time.perf_counter() - started)
            starts.read_running.append(_mebibytes_read(mount))
            await vm.tick()
            starts.tick.append(time.perf_counter() - started)
            starts.read_tick.append(_mebibytes_read(mount))
            if recording:
                mount.ctl("record")


def mapped(setting: Setting) -> Iterator[Row]:
    """`ckptfs run` of a cold checkpoint until its guest ticks, against a mount and QEMU, and stock QEMU's load."""
    for memory in setting.guest_sizes:
        yield from trio.run(_mapped, setting, memory)


async def _mapped(setting: Setting, memory: int) -> list[Row]:
    guest = build_guest(setting.directory)
    async with _guest_on_mount(setting, guest, memory) as (mount, *_):
        mount.ctl("save")
    size = _name(memory)
    rows = []
    for what, make_cold_for in _COLDNESS.items():
        run, mounted, stock = _Starts(), _Starts(), _Starts()
        for _ in range(setting.rounds):
            make_cold_for(setting)
            await _start_run(setting, guest, memory, run)
            make_cold_for(setting)
            await _start_lazily(setting, guest, memory, mounted)
            make_cold_for(setting)
            await _start_stock(setting, guest, memory, stock)
        rows += [
            Row(
                f"{what}: ckptfs run until its first tick, {size}",
                "s",
                run.tick,
                mounted.tick,
                "mount.ckptfs + QEMU",
            ),
            Row(f"{what}: ckptfs run until its first tick, {size}", "s", run.tick, stock.tick, STOCK_LOAD),
        ]
    return rows


async def _start_run(setting: Setting, guest: Guest, memory: int, starts: _Starts) -> None:
    started = time.perf_counter()
    program = (BIN / "ckptfs", "run", setting.checkpoint)
    async with Qemu(guest, memory=_mebibytes(memory), program=program) as vm:
        await vm.tick()
        starts.tick.append(time.perf_counter() - started)


COUNT = 50
"""Clones that run at once."""


def clones(setting: Setting) -> Iterator[Row]:
    """`ckptfs run --count` of the smallest guest: until all of them tick, and the memory of all."""
    memory = setting.guest_sizes[0]
    guest = build_guest(setting.directory)
    trio.run(_checkpoint, setting, guest, memory)
    many, one, pss = [], [], []
    for _ in range(setting.rounds):
        seconds, mebibytes = _run_clones(setting, memory, COUNT)
        many.append(seconds)
        pss.append(mebibytes)
        one.append(_run_clones(setting, memory, 1)[0])
    size = _name(memory)
    yield Row(f"{COUNT} clones of {size} until all have ticked", "s", many, one, "one clone")
    yield Row(
        f"PSS of {COUNT} clones of {size}", "MiB", pss, [COUNT * memory / MiB], "all of the RAM that they have"
    )


async def _checkpoint(setting: Setting, guest: Guest, memory: int) -> None:
    async with _guest_on_mount(setting, guest, memory) as (mount, *_):
        mount.ctl("save")


def _run_clones(setting: Setting, memory: int, count: int) -> tuple[float, float]:
    """Seconds until all have ticked, and the MiB that all of them hold then (PSS, proc(5)); caches are cold."""
    make_cold(setting.checkpoint)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        command = [
            BIN / "ckptfs", "run", "--count", str(count), "--directory", directory, setting.checkpoint, "--",
            "-accel", "tcg,thread=single", "-nodefaults", "-serial", "stdio", "-m", _mebibytes(memory),
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                serials = [Path(directory) / f"{number}.serial" for number in range(1, count + 1)]
                while not all(serial.exists() and "MD5OK" in serial.read_text() for serial in serials):
                    if process.poll() is not None:
                        raise RuntimeError(f"ckptfs run ended with {process.returncode}")
                    time.sleep(0.02)
                return time.perf_counter() - started, _pss_of_children(process.pid)
            finally:
                process.terminate()


def _pss_of_children(pid: int) -> float:
    """MiB that the children of a process hold, what they share counted once."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    rollups = [Path(f"/proc/{child}/smaps_rollup").read_text() for child in children]
    return sum(int(re.findall(r"^Pss: +(\d+)", rollup, re.MULTILINE)[0]) for rollup in rollups) / 1024


async def _start_stock(setting: Setting, guest: Guest, memory: int, starts: _Starts) -> None:
    started = time.perf_counter()
    async with Qemu(guest, memory=_mebibytes(memory), incoming="defer") as vm:
        await vm.load(setting.checkpoint, multifd=CHANNELS, direct_io=True)
        await _until_running(vm)
        starts.running.append(time.perf_counter() - started)
        await vm.tick()
        starts.tick.append(time.perf_counter() - started)


async def _until_running(vm: Qemu) -> None:
    while await vm.run_state() != "running":  # noqa: ASYNC110 - its event may have come before anybody heard it
        await trio.sleep(0.001)


def _mebibytes_read(mount: Mount) -> float:
    """RAM that was served from the checkpoint; a page that was written since had been read before."""
    status = mount.status()
    return (int(status["read-pages"]) + int(status["written-pages"])) * 4096 / MiB


def _backend(setting: Setting, memory: int) -> tuple[str, str]:
    path = setting.directory / "mnt" / "ram" / "pc.ram"
    return "-object", f"memory-backend-file,id=pc.ram,size={memory},mem-path={path},share=on"


def _mebibytes(memory: int) -> str:
    return f"{memory // MiB}M"


def _name(memory: int) -> str:
    return f"{memory // GiB} GiB" if memory % GiB == 0 else f"{memory // MiB} MiB"
