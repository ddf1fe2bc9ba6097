"""A real S3 server on the loopback: SeaweedFS, one process with a directory and ports of its own.

It calls nobody (-master.telemetry=false), and nobody but this host reaches it (-ip, -ip.bind).
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

WEED = Path(sys.executable).parent / "weed"
DEADLINE = 60.0
REGION = "us-east-1"


class Seaweed:
    """The server, from construction to `end`; `client` is botocore's, a judge that is none of ours."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.access_key, self.secret_key = f"KEY{secrets.token_hex(8)}", f"secret{secrets.token_hex(16)}"
        identity = {
            "name": "ckptfs",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._ports = _free_ports(8)
        self.url = f"http://127.0.0.1:{self._ports[3]}"
        session = botocore.session.Session()
        session.set_credentials(self.access_key, self.secret_key)
        config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, read_timeout=DEADLINE)
        self.client: Any = session.create_client("s3", REGION, endpoint_url=self.url, config=config)
        self.start()

    def start(self) -> None:
        """Start it, on the data that it has, and wait until it takes an object."""
        master, volume, filer, s3, *grpc = self._ports
        arguments = {
            "dir": self.directory,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            "master.port": master,
            "master.port.grpc": grpc[0],
            "master.volumeSizeLimitMB": 1024,
            "master.electionTimeout": "1s",
            "volume.port": volume,
            "volume.port.grpc": grpc[1],
            "volume.max": 1000,  # a bucket takes seven
            "volume.preStopSeconds": 0,
            "filer": "true",
            "filer.port": filer,
            "filer.port.grpc": grpc[2],
            "filer.localSocket": self.directory / "filer.sock",
            "s3": "true",
            "s3.port": s3,
            "s3.port.grpc": grpc[3],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": self.directory / "s3.json",
            "iam": "false",
        }
        with (self.directory / "log").open("a") as log:
            self._process = subprocess.Popen(
                [WEED, "server", *(f"-{name}={value}" for name, value in arguments.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
            )
        try:
            self._wait_until_it_takes_objects()
        except BaseException:
            self.kill()
            raise

    def _wait_until_it_takes_objects(self) -> None:
        end = time.monotonic() + DEADLINE
        while not self._takes_objects():
            words = (self.directory / "log").read_text()[-4000:]
            assert self._process.poll() is None, words
            assert time.monotonic() < end, f"SeaweedFS takes no objects:\n{words}"
            time.sleep(0.05)

    def _takes_objects(self) -> bool:
        try:
            self.client.create_bucket(Bucket="first")
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
                return False
        except BotoCoreError:
            return False
        try:
            self.client.put_object(Bucket="first", Key="first", Body=b"first")
        except (BotoCoreError, ClientError):
            return False
        return True

    @property
    def environment(self) -> dict[str, str]:
        """What ckptfs is told of it, and nothing else of any store."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self) -> str:
        """A new bucket."""
        name = f"b{secrets.token_hex(8)}"
        self.client.create_bucket(Bucket=name)
        return name

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def get(self, bucket: str, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return data

    def keys(self, bucket: str) -> list[str]:
        return [found["Key"] for found in self.client.list_objects_v2(Bucket=bucket).get("Contents", [])]

    def uploads(self, bucket: str) -> list[str]:
        """The multipart uploads that have begun and not ended."""
        return [found["Key"] for found in self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; it stands still when this returns, if that is SIGSTOP."""
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(DEADLINE)

    def end(self) -> None:
        """Nobody wants its data any more, and to end in order takes it a quarter of a minute."""
        self.kill()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
