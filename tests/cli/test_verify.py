"""ckptfs verify as a user runs it, and a mount with verify=on."""

import errno
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import RunCkptfs
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.harness import BIN

PAGE = 4096
CONTENT = np.random.default_rng(1).bytes(64 * PAGE)


@pytest.fixture
def saved(mount: Mount, tmp_path: Path) -> Path:
    """64 pages of data, which lie from 1 MiB on."""
    mounted = mount(tmp_path / "saved", "ram=pc.ram:1M")
    with (mounted.ram / "pc.ram").open("r+b") as ram:
        ram.write(CONTENT)
    mounted.ctl("save")
    mounted.umount()
    return tmp_path / "saved"


def flip(path: Path, file_offset: int) -> None:
    fd = os.open(path, os.O_RDWR)
    (byte,) = os.pread(fd, 1, file_offset)
    os.pwrite(fd, bytes([byte ^ 1]), file_offset)
    os.close(fd)


def test_words_and_json(saved: Path, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    assert run_ckptfs("verify", saved).stdout == f"{saved}: sound: 4 checksums of RAM right\n"
    assert "verify   all windows of 64 KiB have checksums" in run_ckptfs("info", saved).stdout.splitlines()
    checksums = json.loads(run_ckptfs("info", "--json", saved).stdout)["checksums"]
    assert checksums == {"window-length": 64 << 10, "windows": 16, "known": 16}
    stock = tmp_path / "stock"
    MigrationFile(blocks=[Block("pc.ram", 16, {1: b"one"})]).write(stock)
    words = "sound as far as can be told: it has no checksums, and QEMU's rules are kept"
    assert run_ckptfs("verify", stock).stdout == f"{stock}: {words}\n"
    flip(saved, (1 << 20) + 20 * PAGE + 5)
    assert run_ckptfs("verify", saved, code=1).stderr == (
        f"{saved}: pc.ram: pages 16 to 31: the checksum is wrong\n"
    )
    cut = tmp_path / "cut"
    cut.write_bytes(stock.read_bytes()[:3000])
    command = [BIN / "ckptfs", "verify", "--json", saved, stock, cut]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    first, second, third = json.loads(done.stdout)
    assert first == {
        "file": str(saved),
        "sound": False,
        "checksums": {"windows": 4, "without": 0},
        "left-out": [],
        "problems": [{"block": "pc.ram", "pages": [16, 32], "problem": "the checksum is wrong"}],
    }
    assert (second["sound"], second["checksums"]) == (True, None)
    assert not third["sound"]
    assert "at byte" in third["problems"][0]["problem"]


def test_a_mount_gives_eio_for_a_wrong_window_alone(saved: Path, mount: Mount) -> None:
    flip(saved, (1 << 20) + 20 * PAGE + 5)
    mounted = mount(saved, "verify=on")
    mounted.expect_log("pc.ram: the checksum of pages 16 to 31 is wrong")
    fd = os.open(mounted.ram / "pc.ram", os.O_RDONLY)
    for page in range(64):
        if 16 <= page < 32:
            with pytest.raises(OSError, match="Input/output error") as error:
                os.pread(fd, PAGE, page * PAGE)
            assert error.value.errno == errno.EIO
        else:
            assert os.pread(fd, PAGE, page * PAGE) == CONTENT[page * PAGE : (page + 1) * PAGE]
    os.close(fd)
    status = mounted.status()
    assert status["verify"] == "on: 16 of 16 windows have checksums"
    assert {(bad["block"], bad["page"]) for bad in status["bad-pages"]} == {
        ("pc.ram", page) for page in range(16, 32)
    }
    assert "the checksum of pages 16 to 31 is wrong" in status["bad-pages"][0]["error"]
    with pytest.raises(OSError, match="the checksum of pages 16 to 31 is wrong") as error:
        mounted.ctl("restore")
    assert error.value.errno == errno.EIO


def test_a_file_without_checksums_is_mounted_and_that_is_told(mount: Mount, tmp_path: Path) -> None:
    MigrationFile(blocks=[Block("pc.ram", 16, {1: b"one"})]).write(tmp_path / "stock")
    mounted = mount(tmp_path / "stock", "verify=on")
    mounted.expect_log("has no checksums, so what is read of it is not verified")
    assert mounted.status()["verify"] == "on: this checkpoint has no checksums"
    mounted.ctl(f"save {tmp_path}/own")
    assert mounted.status()["verify"] == "on: 1 of 1 windows have checksums"
