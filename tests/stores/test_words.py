"""What goes wrong at a store, in words; and no secret in any of them."""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.cli.conftest import RunCkptfs
from tests.mount.conftest import Mount
from tests.mount.decode import PAGE
from tests.mount.harness import DEADLINE, mount_entry, run_mount
from tests.stores.relay import Relay
from tests.stores.seaweed import Seaweed
from tests.stores.test_reading import read_direct, small


@pytest.fixture(scope="module")
def stored(seaweed: Seaweed) -> str:
    bucket = seaweed.bucket()
    seaweed.put(bucket, "vm1", small(b"a"))
    seaweed.put(bucket, "letters", b"Dear Sir or Madam")
    return bucket


@pytest.mark.parametrize(
    ("spec", "environment", "words"),
    [
        ("vm2", {}, "vm2: no such object. For a new guest"),
        ("letters", {}, "letters: at byte 0x0: Not a migration stream"),
        ("vm1", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials: set AWS_ACCESS_KEY_ID"),
        ("vm1", {"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "the store refuses these credentials"),
        ("vm1", {"AWS_ACCESS_KEY_ID": "nobody"}, "the store refuses these credentials"),
        ("vm1", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "the store can't be reached"),
        ("nobucket", {}, "there is no such bucket"),
    ],
)
def test_what_can_t_be_mounted(
    stored: str, seaweed: Seaweed, tmp_path: Path, spec: str, environment: dict[str, str], words: str
) -> None:
    (tmp_path / "mnt").mkdir()
    url = "s3://nobucket/vm1" if spec == "nobucket" else f"s3://{stored}/{spec}"
    home = {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    result = run_mount(url, tmp_path / "mnt", environment=home | environment)
    assert result.returncode == 32
    assert result.stderr.startswith(f"mount.ckptfs: {url}: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    for secret in (seaweed.secret_key, seaweed.access_key, "wrong-secret"):
        assert secret not in result.stderr


def test_a_profile_has_the_keys_and_nobody_sees_them(
    stored: str, seaweed: Seaweed, mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = f"[lab]\naws_access_key_id = {seaweed.access_key}\naws_secret_access_key = {seaweed.secret_key}\n"
    (tmp_path / "credentials").write_text(profile)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    mounted = mount(f"s3://{stored}/vm1")
    assert read_direct(mounted.ram / "pc.ram", 0) == b"a" * PAGE
    assert mounted.ctl(f"save s3://{stored}/copy").startswith("ok ")
    entry = mount_entry(mounted.path)
    seen = f"{entry} {(mounted.path / 'status').read_text()} {mounted.log.read_text()}"
    assert seaweed.secret_key not in seen
    assert seaweed.access_key not in seen


def test_nothing_of_a_store_is_there_before_the_daemon_forks(tmp_path: Path) -> None:
    """A fork after its first use would hang in the child."""
    program = """
import sys, threading
from ckptfs.cli import mount
mount.run_in_background = lambda serve: print({"obstore", "botocore"} & set(sys.modules), threading.active_count())
mount.main()
"""
    arguments = ["-c", program, "s3://bucket/vm1", str(tmp_path), "-o", f"exclusive,cache={tmp_path}/cache"]
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=DEADLINE)
    assert (result.stdout, result.stderr) == ("set() 1\n", "")


def test_info_fetches_what_it_tells_and_no_pages(stored: str, relay: Relay, run_ckptfs: RunCkptfs) -> None:
    assert "pc.ram" in run_ckptfs("info", f"s3://{stored}/vm1").stdout
    assert relay.count("GET") <= 3
    assert "no such object" in run_ckptfs("info", f"s3://{stored}/vm2", code=1).stderr


class _Web(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Python's own web server: it knows neither ranges nor ETags."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web/vm1").write_bytes(small(b"a"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Web, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/vm1"
    server.shutdown()
    server.server_close()


def test_a_web_server_without_versions_is_refused(web: str, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    result = run_mount(web, tmp_path / "mnt")
    assert result.returncode == 32
    assert "the server tells no version of the file (no strong ETag)" in result.stderr


@pytest.fixture
def rude(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A server that sends what is in the list, whatever it is asked, and hangs up."""
    words = [b""]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")

        def serve() -> None:
            with contextlib.suppress(OSError):  # shut down
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(words[0])

        thread = threading.Thread(target=serve)
        thread.start()
        yield words
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "the connection to the store broke"),
        (b"HTTP/1.1 206 Partial", "the connection to the store broke"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "the store's answer is of no use"),
    ],
)
def test_what_is_no_answer(rude: list[bytes], run_ckptfs: RunCkptfs, answer: bytes, words: str) -> None:
    rude[0] = answer
    assert words in run_ckptfs("info", "s3://b/vm1", code=1).stderr
