"""fio writes RAM in several ways, reads it back, and finds what it wrote."""

import json
import subprocess

import pytest

from tests.mount.harness import DEADLINE, Mounted

LENGTH = 16 << 20
WAYS = [
    ["--ioengine=psync"],
    ["--ioengine=mmap"],
    ["--ioengine=libaio", "--direct=1", "--iodepth=8"],
]


@pytest.mark.parametrize("way", WAYS, ids=["psync", "mmap", "libaio-direct"])
def test_what_fio_verifies(way: list[str], fresh: Mounted) -> None:
    path = fresh.ram / "pc.ram"
    workload = [f"--size={LENGTH}", "--rw=randwrite", "--bsrange=4k-256k", "--fallocate=none", "--randseed=1"]
    verify = ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--output-format=json"]
    result = subprocess.run(
        ["fio", "--name=verify", f"--filename={path}", *workload, *verify, *way],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    jobs = json.loads(result.stdout)["jobs"]
    assert sum(job["read"]["io_bytes"] for job in jobs) == sum(job["write"]["io_bytes"] for job in jobs) == LENGTH
    assert path.stat().st_size == LENGTH
    fresh.ctl("save")
