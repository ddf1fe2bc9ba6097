"""Real mounts below real QEMUs, and checkpoints of running guests."""

import shutil
from collections.abc import Iterator

import pytest

from tests.cli.conftest import run_ckptfs
from tests.live.machines import LiveCheckpoints
from tests.mount.conftest import Mount, _adopt_orphans, mount, public
from tests.qemu.guest import Guest

__all__ = ["Mount", "_adopt_orphans", "mount", "public", "run_ckptfs"]


@pytest.fixture(scope="session")
def checkpoints(
    guest_files: Guest, tmp_path_factory: pytest.TempPathFactory, _adopt_orphans: None
) -> Iterator[LiveCheckpoints]:
    """`checkpoints.live(MACHINE)` and `checkpoints.stock(MACHINE)`."""
    directory = tmp_path_factory.mktemp("live")
    yield LiveCheckpoints(guest_files, directory)
    shutil.rmtree(directory)  # hundreds of MiB that pytest would keep
