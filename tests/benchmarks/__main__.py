"""``python -m tests.benchmarks [--quick] [--size SIZE] [--plot FILE] [NAME...]``: see docs/benchmarks.md."""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ckptfs.migration.size import parse_size
from tests.benchmarks import captures, checksums, daemon, machines, storage
from tests.benchmarks.plot import plot
from tests.benchmarks.rows import GiB, MiB, Row, heading
from tests.benchmarks.setting import Setting
from tests.mount.disk import Disk
from tests.mount.harness import adopt_orphans

BENCHMARKS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "save": storage.save,
    "stock": machines.stock,
    "again": storage.again,
    "read": storage.read,
    "random": storage.random,
    "touches": storage.touches,
    "writes": storage.writes,
    "restore": storage.restore,
    "checksums": checksums.checksums,
    "mount": storage.mount,
    "start": storage.start,
    "live": machines.live,
    "running": machines.running,
    "recorded": machines.recorded,
    "run": machines.mapped,
    "clones": machines.clones,
    "busy": captures.busy,
    "memory": daemon.memory,
    "writers": daemon.writers,
    "sizes": machines.sizes,
}

OF_A_FILE_SYSTEM = ("save", "stock", "again", "live", "read", "random", "touches")
"""What depends on the file system, and is measured on others, too."""

WITH_GOALS = (*OF_A_FILE_SYSTEM, "writes", "mount", "start", "busy", "memory", "recorded", "sizes")
"""What is measured if several file systems are, and nothing is named."""

OTHERS = ("xfs", "btrfs")

SCRATCH = Path(__file__).parents[2] / ".cache"


def main() -> None:
    """Run benchmarks and print their rows as they come."""
    arguments = _parser().parse_args()
    names = arguments.names or list(WITH_GOALS if arguments.file_systems else BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise SystemExit(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if os.geteuid() != 0:
        raise SystemExit("only root can drop caches and tune a mount: run this as root")
    arguments.directory.mkdir(exist_ok=True)
    started = time.perf_counter()
    rows = _measure(arguments, names, arguments.directory)
    for kind in OTHERS if arguments.file_systems else ():
        with _file_system(kind, arguments.directory, 2 * GiB if arguments.quick else 20 * GiB) as directory:
            rows += _measure(arguments, [name for name in names if name in OF_A_FILE_SYSTEM], directory)
    if arguments.plot is not None and any(row.at for row in rows):
        plot(rows, arguments.plot)
    missed = sum(row.missed for row in rows)
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{missed} of {sum(bool(row.goal) for row in rows)} goals missed (!); {minutes:.1f} minutes")


def _measure(arguments: argparse.Namespace, names: list[str], directory: Path) -> list[Row]:
    """Print the rows of some benchmarks as they come, and return them."""
    print(_machine(directory), end="\n\n")
    print(heading(), flush=True)
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory(dir=directory, prefix="benchmark-") as scratch:
            for row in BENCHMARKS[name](_setting(arguments, name, Path(scratch))):
                print(row, flush=True)
                rows.append(row)
    print(flush=True)
    return rows


@contextmanager
def _file_system(kind: str, directory: Path, length: int) -> Iterator[Path]:
    """An empty file system of that kind, on a loop device."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="benchmark-") as scratch:
        disk = Disk(kind, Path(scratch) / "image", Path(scratch) / kind, length)
        try:
            # otherwise what is cold there comes from the page cache of the image
            subprocess.run(["losetup", "--direct-io=on", _source(disk.path)], check=True)
            yield disk.path
        finally:
            disk.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure ckptfs.")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(BENCHMARKS)}; all of them by default")
    parser.add_argument("--quick", action="store_true", help="small and twice: does it run, not how fast is it")
    parser.add_argument("--size", type=parse_size, help="RAM of the benchmarks without a guest: 1G by default")
    parser.add_argument(
        "--file-systems", action="store_true", help=f"on {' and '.join(OTHERS)}, too (loop devices)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what `sizes` measures")
    parser.add_argument(
        "--directory", type=Path, default=SCRATCH, help="where to work: the file system that is measured"
    )
    return parser


def _setting(arguments: argparse.Namespace, name: str, directory: Path) -> Setting:
    if arguments.quick:
        few = (256 * MiB,)
        return Setting(directory, arguments.size or 64 * MiB, guest_sizes=few, plot_sizes=few, rounds=1)
    setting = Setting(directory, arguments.size or (4 * GiB if name in _OF_4_GIB else Setting.size))
    return replace(setting, rounds=3, guest_sizes=setting.guest_sizes[-1:]) if arguments.file_systems else setting


_OF_4_GIB = ("save", "stock", "again")


def _source(path: Path) -> str:
    """The device that is mounted on a directory."""
    command = ["findmnt", "--noheadings", "--output", "SOURCE", path]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()


def _machine(directory: Path) -> str:
    """What the figures depend on."""
    kind = subprocess.run(
        ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", directory],
        check=True,
        text=True,
        capture_output=True,
    ).stdout.strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return f"{os.cpu_count()} CPUs, {memory} GiB, Linux {os.uname().release}, {kind}"


if __name__ == "__main__":
    adopt_orphans()
    main()
