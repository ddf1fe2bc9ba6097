"""ckptfs diff, of two checkpoints that are equal: all of both is read."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.fio import fio
from tests.benchmarks.rows import MiB, Row, in_turn
from tests.benchmarks.setting import Setting, make_cold
from tests.benchmarks.storage import CHANNELS
from tests.mount.harness import BIN


def diff(setting: Setting) -> Iterator[Row]:
    """From the disk against fio, and from the page cache against cmp(1); with the start of either program."""
    files = setting.make_checkpoint(), setting.directory / "other"
    subprocess.run(["cp", "--reflink=never", *files], check=True)

    def timed(*command: str | Path) -> float:
        started = time.perf_counter()
        subprocess.run([*command, *files], check=True, stdout=subprocess.DEVNULL)
        return 2 * setting.size / (time.perf_counter() - started) / MiB

    def cold() -> float:
        for file in files:
            make_cold(file)
        return timed(BIN / "ckptfs", "diff")

    def disk() -> float:
        rates = [fio(file, "read", size=setting.size, block=MiB, jobs=CHANNELS, direct=True) for file in files]
        return 2 / sum(1 / rate for rate in rates) / MiB

    yield Row("diff, cold", "MiB/s", *in_turn(setting.rounds, cold, disk), "fio, 4 readers, O_DIRECT")
    subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
    samples = in_turn(setting.rounds, lambda: timed(BIN / "ckptfs", "diff"), lambda: timed("cmp"))
    yield Row("diff, from the page cache", "MiB/s", *samples, "cmp")
