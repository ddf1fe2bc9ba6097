"""-o exclusive of an object: the lease is an object beside it, and the store decides who has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.conftest import Mount
from tests.mount.harness import DEADLINE, mount_entry, run_mount
from tests.mount.test_lease import SHORT_TERM
from tests.stores.relay import Relay, Request
from tests.stores.seaweed import Seaweed
from tests.stores.test_reading import read_direct, small

PAGE = 4096


def test_of_sixteen_daemons_one_has_it(seaweed: Seaweed, bucket: str, tmp_path: Path) -> None:
    seaweed.put(bucket, "vm1", small(b"a"))
    directories = [tmp_path / f"mnt{number}" for number in range(16)]
    for directory in directories:
        directory.mkdir()
    try:
        url = f"s3://{bucket}/vm1"
        result = subprocess.run(
            [sys.executable, "-m", "tests.doubles.many_mounts", "10", url, "exclusive,log=/dev/null", *directories],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            cwd=Path(__file__).parents[2],
        )
        assert result.returncode == 0, result.stderr
        answers = json.loads(result.stdout)
        (winner,) = (path for path, (code, _) in zip(directories, answers, strict=True) if code == 0)
        pid = json.loads((winner / "status.json").read_bytes())["pid"]
        for code, words in sorted(answers)[1:]:
            assert code == 32
            assert words.splitlines()[-1].startswith(
                f"mount.ckptfs: {url}.lock: is held by process {pid} on host {os.uname().nodename}, since "
            )
        assert read_direct(winner / "ram/pc.ram", 0) == b"a" * PAGE
    finally:
        for directory in directories:
            if mount_entry(directory) is not None:
                pid = json.loads((directory / "status.json").read_bytes())["pid"]
                subprocess.run(["umount", directory], check=True, timeout=DEADLINE)
                os.waitpid(pid, 0)


def test_it_is_given_back_lost_when_the_store_falls_silent_and_stolen(
    seaweed: Seaweed, bucket: str, relay: Relay, mount: Mount, tmp_path: Path
) -> None:
    seaweed.put(bucket, "vm1", small(b"a"))
    url = f"s3://{bucket}/vm1"
    first = mount(url, "exclusive", program=(sys.executable, SHORT_TERM, "4"))
    assert first.ctl("save").startswith("ok ")

    def refuse(request: Request) -> bytes | None:
        if request.method == "PUT" and request.path.endswith(".lock"):
            return b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        return None

    relay.meddle = refuse
    first.expect_log(r"ERROR: .*vm1.lock: the lease is lost: it has not been renewed for . s \(.*refuses")
    first.expect_log(r"WARNING: .*vm1.lock: is held again")
    first.wait_for(lambda status: "it has not been renewed" in status["lease"])
    with pytest.raises(OSError, match="this mount has lost its lease"):
        first.ctl("save")
    assert read_direct(first.ram / "pc.ram", 8 << 20) == b"a" * PAGE
    relay.meddle = lambda request: None
    first.wait_for(lambda status: status["lease"] == "held")
    second = mount(url)
    second.expect_log("WARNING: .*vm1.lock: taken from process")
    first.expect_log(f"ERROR: .*vm1.lock: the lease is lost: process {second.pid} on host")
    assert second.ctl("lock steal").startswith("ok ")
    first.wait_for(lambda status: "has taken it" in status["lease"])
    second.umount()
    (tmp_path / "third").mkdir()
    assert run_mount(url, tmp_path / "third", "exclusive", flags=("-f",)).stderr == ""  # free at once
