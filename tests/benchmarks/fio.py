"""The yardstick: fio, with requests like those of ckptfs."""

import json
import subprocess
from pathlib import Path


def fio(
    path: Path, what: str, *, size: int, block: int, jobs: int = 1, direct: bool, invalidate: bool = True
) -> float:
    """Run fio's workload `what` (write, read, randread) on `size` bytes of `path`; return bytes a second.

    Each of `jobs` threads has a part of the file for itself. Random reads end after some thousand requests.
    A write ends with an fsync that counts.
    """
    part = size // jobs
    output = subprocess.run(
        [
            "fio", f"--name={what}", f"--filename={path}", f"--rw={what}", "--ioengine=psync", f"--bs={block}",
            f"--direct={direct:d}", "--thread", f"--numjobs={jobs}", "--group_reporting",
            f"--size={part}", f"--offset_increment={part}", f"--io_size={_io_size(what, part, block)}",
            f"--invalidate={invalidate:d}", "--fallocate=none", "--end_fsync=1", "--randrepeat=0",
            "--output-format=json",
        ],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout  # fmt: skip
    (job,) = json.loads(output)["jobs"]
    rate: float = job["write" if what == "write" else "read"]["bw_bytes"]
    return rate


RANDOM_READS = 8192
"""Of each job: few enough that hardly any page of a small file is met twice."""


def _io_size(what: str, part: int, block: int) -> int:
    return min(part, RANDOM_READS * block) if what == "randread" else part
