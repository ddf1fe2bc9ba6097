"""``python -m tests.torture [--minutes N] [--seed S] [NAME...]``: see docs/reliability.md. Root alone."""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from tests.mount.harness import adopt_orphans
from tests.torture import commanders, programs
from tests.torture.frame import FAULTS, Torture, rounds, table

TORTURES: dict[str, Torture] = {
    "programs": programs.torture,
    "commanders": commanders.torture,
}

SCRATCH = Path(__file__).parents[2] / ".cache"


def main() -> int:
    """Run tortures, print each round that went wrong, and a table; 1 if anything did."""
    arguments = _parser().parse_args()
    names = arguments.names or list(TORTURES)
    if unknown := [name for name in names if name not in TORTURES]:
        raise SystemExit(f"no such torture: {', '.join(unknown)}; there are {', '.join(TORTURES)}")
    if os.geteuid() != 0:
        raise SystemExit("torture mounts, drops caches and ends connections by force: run this as root")
    adopt_orphans()
    arguments.directory.mkdir(exist_ok=True)
    print(f"{', '.join(names)}: {arguments.minutes:g} minutes from seed {arguments.seed} on", flush=True)
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    chosen = {name: TORTURES[name] for name in names}
    for name, this in rounds(chosen, arguments.minutes * 60, arguments.seed, arguments.directory):
        counts[name] += this.counts
        for note in this.notes:
            print(f"{name}, seed {this.seed}: {note}", flush=True)
    print(table(counts))
    return int(any(counts[name][fault] for name in names for fault in FAULTS))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="Do to ckptfs what nobody should.")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(TORTURES)}; all in turn by default")
    parser.add_argument("--minutes", type=float, default=5, help="how long (5)")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)), help="the first round's seed")
    parser.add_argument("--directory", type=Path, default=SCRATCH, help="where checkpoints are written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
