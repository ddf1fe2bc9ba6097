"""``python -m tests.benchmarks [--quick] [--size SIZE] [NAME...]``: see docs/benchmarks.md."""

import argparse
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ckptfs.migration.size import parse_size
from tests.benchmarks import captures, checksums, compare, daemon, machines, storage, stores
from tests.benchmarks.rows import MiB, Row, heading
from tests.benchmarks.setting import Setting
from tests.mount.harness import adopt_orphans

BENCHMARKS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "save": storage.save,
    "again": storage.again,
    "read": storage.read,
    "random": storage.random,
    "restore": storage.restore,
    "checksums": checksums.checksums,
    "diff": compare.diff,
    "mount": storage.mount,
    "live": machines.live,
    "running": machines.running,
    "run": machines.mapped,
    "clones": machines.clones,
    "store": stores.store,
    "busy": captures.busy,
    "memory": daemon.memory,
    "writers": daemon.writers,
}

SCRATCH = Path(__file__).parents[2] / ".cache"


def main() -> None:
    """Run benchmarks and print their rows as they come."""
    arguments = _parser().parse_args()
    names = arguments.names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise SystemExit(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if os.geteuid() != 0:
        raise SystemExit("only root can drop caches and tune a mount: run this as root")
    arguments.directory.mkdir(exist_ok=True)
    print(_machine(arguments.directory), end="\n\n")
    print(heading(), flush=True)
    for name in names:
        with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="benchmark-") as directory:
            for row in BENCHMARKS[name](_setting(arguments, Path(directory))):
                print(row, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure ckptfs.")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(BENCHMARKS)}; all of them by default")
    parser.add_argument("--quick", action="store_true", help="small and twice: does it run, not how fast is it")
    parser.add_argument("--size", type=parse_size, help="RAM of the benchmarks without a guest: 1G by default")
    parser.add_argument(
        "--directory", type=Path, default=SCRATCH, help="where to work: the file system that is measured"
    )
    return parser


def _setting(arguments: argparse.Namespace, directory: Path) -> Setting:
    if arguments.quick:
        return Setting(directory, arguments.size or 64 * MiB, guest_sizes=(256 * MiB,), rounds=2)
    return Setting(directory, arguments.size or Setting.size)


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
