"""One SeaweedFS for all of these tests, and mounts of objects in it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.cli.conftest import run_ckptfs
from tests.live.conftest import checkpoints
from tests.mount.conftest import Mount, _adopt_orphans, mount, public
from tests.stores.relay import Relay
from tests.stores.seaweed import Seaweed

__all__ = ["Mount", "_adopt_orphans", "checkpoints", "mount", "public", "run_ckptfs"]


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    yield server
    server.end()
    shutil.rmtree(server.directory)  # hundreds of MiB that pytest would keep


@pytest.fixture
def bucket(seaweed: Seaweed) -> str:
    return seaweed.bucket()


@pytest.fixture
def relay(seaweed: Seaweed) -> Iterator[Relay]:
    """The way to the server that everything takes in tests that use `at_store` or mount with it."""
    relay = Relay(urlsplit(seaweed.url).port or 0)
    yield relay
    relay.close()


@pytest.fixture(autouse=True)
def _at_store(seaweed: Seaweed, relay: Relay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ckptfs finds in its environment."""
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("TMPDIR", str(work))
