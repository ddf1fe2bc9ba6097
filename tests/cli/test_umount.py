"""ckptfs umount, and umount(8) with its helper: when they return, the daemon is gone and the storage is free."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import RunCkptfs
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import Mounted, is_mounted

MiB = 1 << 20
LENGTH = 8 * MiB
SLOWLY = f"max_bandwidth={4 * MiB}"
"""With it a save takes two seconds."""


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own for checkpoints, which can be unmounted when nobody uses it."""
    directory = tmp_path / "storage"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", directory], capture_output=True)


@pytest.fixture
def written(mount: Mount, storage: Path) -> Mounted:
    """A guest that was never saved."""
    mounted = mount(storage / "vm", f"ram=pc.ram:{LENGTH}", SLOWLY)
    with (mounted.ram / "pc.ram").open("r+b", buffering=0) as file:
        file.write(np.random.default_rng(1).bytes(LENGTH))
    return mounted


def assert_free(mounted: Mounted, storage: Path) -> None:
    """The daemon has ended, and nobody uses the storage."""
    assert not is_mounted(mounted.path)
    assert mounted.wait() == 0
    subprocess.run(["umount", storage], check=True)


def test_what_is_dropped_is_told(written: Mounted, storage: Path, run_ckptfs: RunCkptfs) -> None:
    result = run_ckptfs("umount", written.path)
    assert result.stderr == f"{written.path}: 2048 written pages (8 MiB) not saved\n"
    assert os.listdir(storage) == []
    assert_free(written, storage)


def test_what_is_dropped_as_json(written: Mounted, storage: Path, run_ckptfs: RunCkptfs) -> None:
    result = run_ckptfs("umount", "--json", written.path)
    assert json.loads(result.stdout) == {"answer": "unmounted, 2048 written pages (8 MiB) not saved"}
    assert result.stderr == ""
    assert_free(written, storage)


def test_umount_with_save(written: Mounted, storage: Path, run_ckptfs: RunCkptfs) -> None:
    ram = (written.ram / "pc.ram").read_bytes()
    result = run_ckptfs("umount", "--save", "--json", written.path)
    *_, saved, unmounted = map(json.loads, result.stdout.splitlines())
    assert saved["answer"].startswith(f"saved {storage}/vm")
    assert unmounted == {"answer": "unmounted"}
    assert decode(storage / "vm").blocks["pc.ram"].tobytes() == ram
    assert_free(written, storage)


def test_a_save_that_is_running_is_waited_for(written: Mounted, storage: Path, run_ckptfs: RunCkptfs) -> None:
    written.ctl("save nowait")
    run_ckptfs("umount", "-q", written.path)
    assert os.listdir(storage) == ["vm"]
    assert_free(written, storage)


def test_nothing_is_unmounted_if_the_save_fails(written: Mounted, storage: Path, run_ckptfs: RunCkptfs) -> None:
    written.ctl("save nowait")
    written.wait_for(lambda status: status["migration"].get("status") == "active")
    written.expect_log("was made by somebody else")
    (storage / "vm").write_bytes(b"QEVM")
    assert "was made by somebody else" in run_ckptfs("umount", "-q", written.path, code=1).stderr
    assert "was made by somebody else" in run_ckptfs("umount", "-q", "--save", written.path, code=1).stderr
    assert is_mounted(written.path)


def test_one_that_is_in_use(written: Mounted, run_ckptfs: RunCkptfs) -> None:
    with (written.ram / "pc.ram").open("rb"):
        assert "busy" in run_ckptfs("umount", written.path, code=1).stderr
    assert is_mounted(written.path)


def test_one_whose_daemon_is_dead(written: Mounted, run_ckptfs: RunCkptfs, tmp_path: Path) -> None:
    written.kill()
    run_ckptfs("umount", written.path)
    assert not is_mounted(written.path)
    assert "no guest's RAM is mounted here" in run_ckptfs("umount", tmp_path, code=1).stderr
