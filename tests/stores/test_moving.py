"""docs/howto/move.md as it stands there, on two hosts that see nothing of one another but a store and a disk."""

import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.examples.conftest import PATIENCE, ROOT, make_tools
from tests.mount.harness import BIN, DEADLINE, is_mounted, unmount_by_force
from tests.qemu.guest import Guest
from tests.stores.relay import Relay
from tests.stores.seaweed import Seaweed

BLOCKS = re.findall(r"^```sh\n# on ([AB])\n(.*?)^```$", (ROOT / "docs/howto/move.md").read_text(), re.M | re.S)


class Host:
    """A network namespace from which nothing can be reached but the store, and a directory to work in."""

    def __init__(self, directory: Path, environment: dict[str, str], store: int) -> None:
        """`store` is the port of the store at this end of the wire."""
        directory.mkdir()
        self.directory = directory
        self._process = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"], stdout=-1)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"\n"  # it has its own network now
        network = f"198.18.{secrets.randbelow(256)}.{secrets.randbelow(64) * 4}"
        start, _, last = network.rpartition(".")
        address, peer = f"{start}.{int(last) + 1}", f"{start}.{int(last) + 2}"
        link = f"ck{secrets.token_hex(4)}"
        there = f"nsenter --net=/proc/{self._process.pid}/ns/net"
        script = f"""
            ip link add {link} type veth peer name eth0 netns {self._process.pid}
            ip address add {address}/30 dev {link}
            ip link set {link} up
            {there} ip address add {peer}/30 dev eth0
            {there} ip link set eth0 up
            {there} ip link set lo up
        """
        subprocess.run(["bash", "-euc", script], check=True, timeout=DEADLINE)
        self._way = Relay(store, address)
        self._environment = {
            **os.environ,
            **environment,
            "TMPDIR": str(directory),
            "AWS_ENDPOINT_URL": self._way.url,
        }

    def run(self, script: str) -> None:
        result = subprocess.run(
            [
                "nsenter",
                f"--net=/proc/{self._process.pid}/ns/net",
                "bash",
                "-euo",
                "pipefail",
                "-c",
                PATIENCE + script,
            ],
            cwd=self.directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE,
        )
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"

    def ticks(self) -> list[int]:
        """What the guest has counted here."""
        log = self.directory / "serial.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        assert "MD5BAD" not in text
        return [int(number) for number in re.findall(r"^tick (\d+) MD5OK\s", text, re.M)]

    def fetched(self) -> int:
        """Bytes that were asked of the store."""
        ranges = (
            re.search(r"^range: bytes=(\d+)-(\d+)", request.headers, re.M | re.I) for request in self._way.requests
        )
        return sum(int(found[2]) + 1 - int(found[1]) for found in ranges if found)

    def next_tick(self) -> int:
        """Wait for one that has not been there."""
        count, end = len(self.ticks()), time.monotonic() + DEADLINE
        while len(ticks := self.ticks()) == count:
            assert time.monotonic() < end, f"{self.directory}: no tick"
        return ticks[count]

    def end(self) -> None:
        pidfile = self.directory / "vm1.pid"
        if pidfile.exists():
            subprocess.run(["kill", "-9", pidfile.read_text().strip()], check=False)
        if is_mounted(self.directory / "vm1"):
            unmount_by_force(self.directory / "vm1")
        self._way.close()
        self._process.kill()  # and its end of the wire is gone, and so is ours
        self._process.communicate()


@pytest.fixture
def hosts(guest_files: Guest, bucket: str, seaweed: Seaweed, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    disk = tmp_path / "shared-disk.img"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    tools = make_tools(tmp_path / "tools", guest_files)
    environment = {
        "PATH": f"{tools}:{BIN}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "DISK": str(disk),
        "CHECKPOINT": f"s3://{bucket}/vm1",
    }
    with ExitStack() as stack:
        both = []
        for name in "AB":
            both.append(Host(tmp_path / name, environment, urlsplit(seaweed.url).port or 0))
            stack.callback(both[-1].end)
        yield both[0], both[1]


def test_a_guest_moves_and_counts_on(hosts: tuple[Host, Host], seaweed: Seaweed, bucket: str) -> None:
    here, there = hosts
    assert [name for name, _ in BLOCKS] == ["A", "B", "A", "B", "B"]
    start, prepare, leave, arrive, finish = (script for _, script in BLOCKS)
    here.run(start)
    here.next_tick()
    there.run(prepare)
    stopped = time.monotonic()
    here.run(leave)
    last = here.ticks()[-1]
    there.run(arrive)
    assert there.next_tick() in (last + 1, last + 2)  # the first may have been cut off by the new serial line
    assert 0 < there.fetched() < seaweed.client.head_object(Bucket=bucket, Key="vm1")["ContentLength"]
    print(f"stood still for at most {time.monotonic() - stopped:.2f} s, after tick {last}")
    there.next_tick()
    there.run(finish)
    assert sorted(seaweed.keys(bucket)) == ["vm1", "vm1.lock"]
