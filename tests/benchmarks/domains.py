"""What it costs to save a domain of libvirt and to resume it, libvirt's ways beside ours, in one run.

    python -m tests.benchmarks.domains [MIB]

The guest rewrites MIB MiB (64) of its memory as fast as it can. "off" is how long the guest does not run: from the
beginning of a save that ends it to its end, or its longest pause, as libvirt's events tell. "runs after" is from
the command to the moment when its guest has verified memory once.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.libvirt.daemon import Domain, Libvirtd
from tests.mount.harness import BIN, Mounted, adopt_orphans
from tests.qemu.stepper import build_stepper


def main() -> None:
    """Measure, and print a table."""
    length = int(sys.argv[1] if sys.argv[1:] else 64)
    adopt_orphans()
    libvirtd = Libvirtd()
    libvirtd.start()
    try:
        _measure(libvirtd, length)
    finally:
        libvirtd.close()


def _measure(libvirtd: Libvirtd, length: int) -> None:
    directory = libvirtd.directory
    stepper = build_stepper(directory, length << 20)
    stepper.rom.chmod(0o644)
    vm = Domain(libvirtd, "vm", stepper, memory=length + 64)
    vm.define()
    vm.start()
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
    mounted = Mounted(
        checkpoint, directory / "mnt", directory / "log", f"allow_other,uid=libvirt-qemu,libvirt_uri={libvirtd.uri}"
    )
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


def _restore(vm: Domain, image: Path) -> None:
    vm.libvirtd.virsh("restore", image)
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
