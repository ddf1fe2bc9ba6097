"""What it costs to save a domain of libvirt and to resume it, libvirt's ways beside ours, in one run.

    python -m tests.benchmarks.domains save [MIB]
    python -m tests.benchmarks.domains resume [MIB]

In `save`, the guest rewrites MIB MiB (64) of its memory as fast as it can. "off" is how long the guest does not
run: from the beginning of a save that ends it to its end, or its longest pause, as libvirt's events tell. "runs
after" is from the command to the moment when its guest has verified memory once.

In `resume`, the domain has MIB MiB (4096) of memory, full of what can't be packed, of which the guest uses 16 MiB.
It is resumed in turns, three times each, from files of which nothing is cached.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from tests.libvirt.daemon import Domain, Libvirtd
from tests.mount.harness import BIN, Mounted, adopt_orphans
from tests.qemu.stepper import BASE, build_stepper

_ROUNDS = 3


def main() -> None:
    """Measure, and print a table."""
    what, *length = sys.argv[1:] or ["save"]
    measure, usual = {"save": (_save, 64), "resume": (_resume, 4096)}[what]
    adopt_orphans()
    libvirtd = Libvirtd()
    libvirtd.start()
    try:
        measure(libvirtd, int(*length or [usual]))
    finally:
        libvirtd.close()


def _domain(libvirtd: Libvirtd, length: int, memory: int) -> Domain:
    stepper = build_stepper(libvirtd.directory, length << 20)
    stepper.rom.chmod(0o644)
    vm = Domain(libvirtd, "vm", stepper, memory=memory)
    vm.define()
    vm.start()
    return vm


def _save(libvirtd: Libvirtd, length: int) -> None:
    directory = libvirtd.directory
    vm = _domain(libvirtd, length, length + 64)
    print(
        f"{length} MiB of {vm.memory} MiB\n"
        "| save | off, s | took, s | image, MiB | runs after, s |\n|---|---|---|---|---|"
    )
    for kind in ("raw", "sparse"):
        image = directory / kind
        took = _timed(lambda image=image, kind=kind: libvirtd.virsh("save", "vm", image, "--image-format", kind))
        _row(f"virsh save ({kind})", took, took, image, _timed(lambda image=image: _restore(vm, image)))
    image = directory / "memory"
    memspec = f"file={image},snapshot=external"
    off, took = _paused(vm, lambda: libvirtd.virsh("snapshot-create-as", "vm", "s", "--memspec", memspec, "--live"))
    libvirtd.virsh("snapshot-delete", "vm", "s", "--metadata")
    libvirtd.virsh("destroy", "vm")
    _row("virsh snapshot-create-as --memspec --live", off, took, image, _timed(lambda: _restore(vm, image)))
    checkpoint = directory / "checkpoint"
    command = [BIN / "ckptfs", "save", "--qmp", "libvirt:vm", "--libvirt-uri", libvirtd.uri, checkpoint]
    off, took = _paused(vm, lambda: subprocess.run(command, check=True, capture_output=True))
    libvirtd.virsh("destroy", "vm")
    mounted = _mounted(libvirtd, checkpoint)
    lazily = _timed(lambda: _restore(vm, mounted.path / "libvirt-save"))
    _row("ckptfs save --qmp libvirt:NAME (RAM its own)", off, took, checkpoint, lazily)
    mounted.ctl("qmp libvirt:vm")
    off, took = _paused(vm, lambda: mounted.ctl("save"))
    libvirtd.virsh("destroy", "vm")
    mounted.ctl("qmp none")
    mounted.ctl("reset")
    lazily = _timed(lambda: _restore(vm, mounted.path / "libvirt-save"))
    _row("save (RAM on the mount)", off, took, checkpoint, lazily)
    vm.remove()
    mounted.clean_up()


def _resume(libvirtd: Libvirtd, memory: int) -> None:
    directory, used = libvirtd.directory, 16
    vm = _domain(libvirtd, used, memory)
    raw, sparse = directory / "raw", directory / "sparse"
    libvirtd.virsh("save", "vm", sparse, "--image-format", "sparse")
    mounted = _mounted(libvirtd, sparse)
    with (mounted.ram / "pc.ram").open("r+b") as ram:
        ram.seek(BASE + (used << 20))
        for _ in range(memory - used - 1):
            ram.write(np.random.default_rng().bytes(1 << 20))
    mounted.ctl("save")
    mounted.clean_up()
    libvirtd.virsh("restore", sparse)
    vm.goes_on(1)
    libvirtd.virsh("save", "vm", raw)

    def by_libvirt(image: Path, *options: str) -> Callable[[], float]:
        return lambda: _timed(lambda: _restore(vm, image, *options))

    def lazily() -> float:
        started = time.monotonic()
        mounted = _mounted(libvirtd, sparse)
        _restore(vm, mounted.path / "libvirt-save")
        took = time.monotonic() - started
        libvirtd.virsh("destroy", "vm")
        mounted.clean_up()
        return took

    ways = {
        "virsh restore (raw)": by_libvirt(raw),
        "virsh restore (sparse)": by_libvirt(sparse),
        "virsh restore (sparse), 2 channels": by_libvirt(sparse, "--parallel-channels", "2"),
        "mount.ckptfs, virsh restore DIR/libvirt-save": lazily,
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            _forget(raw, sparse)
            took[name].append(way())
            if way is not lazily:
                libvirtd.virsh("destroy", "vm")
    print(f"{memory} MiB, median of {_ROUNDS}\n| resume | runs after, s | |\n|---|---|---|")
    for name, seconds in took.items():
        print(f"| {name} | {median(seconds):.2f} | {', '.join(f'{one:.2f}' for one in seconds)} |")
    vm.remove()


def _mounted(libvirtd: Libvirtd, path: Path) -> Mounted:
    options = f"allow_other,uid=libvirt-qemu,libvirt_uri={libvirtd.uri}"
    return Mounted(path, libvirtd.directory / "mnt", libvirtd.directory / "log", options)


def _forget(*paths: Path) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _restore(vm: Domain, image: Path, *options: str) -> None:
    vm.libvirtd.virsh("restore", image, *options)
    vm.goes_on(1)


def _timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _paused(vm: Domain, work: Callable[[], object]) -> tuple[float, float]:
    """The longest pause in `work`, and how long it took."""
    command = ["virsh", "-c", vm.libvirtd.uri, "event", "--loop", "--timestamp", "--event", "lifecycle"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as events:
        time.sleep(0.5)  # until it listens
        took = _timed(work)
        vm.goes_on(1)
        events.terminate()
        assert events.stdout is not None
        lines = events.stdout.read().splitlines()
    pauses, since = [0.0], 0.0
    for line in lines:
        at = time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")) + float(line[19:23])
        if "Suspended" in line:
            since = at
        elif "Resumed" in line and since:
            pauses.append(at - since)
    return max(pauses), took


def _row(name: str, off: float, took: float, image: Path, runs_after: float) -> None:
    stored = image.stat().st_blocks * 512 / (1 << 20)
    print(f"| {name} | {off:.3f} | {took:.2f} | {stored:.0f} | {runs_after:.2f} |", flush=True)


if __name__ == "__main__":
    main()
