"""Files of another kind are named. The programs that make them are the judges, wherever there are such here."""

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptfs.errors import CheckpointError
from ckptfs.foreign.content import read_content
from ckptfs.foreign.magics import TABLE, Row, describe
from ckptfs.physical.lime import headers
from ckptfs.physical.memory_map import MemoryMap, Region
from tests.cli.conftest import RunCkptfs
from tests.doubles.migration_file import BytesSource, MigrationFile
from tests.mapped_ram.conftest import QemuCommands

CHECKPOINT = MigrationFile().data()


def named(data: bytes, offset: int = 0) -> str:
    """What a file with this content is called, in the error that opening it gives."""
    with pytest.raises(CheckpointError) as caught:
        read_content(BytesSource(data), offset)
    assert str(caught.value).startswith(f"at byte {offset:#x}: Not a migration stream")
    assert "\n" not in str(caught.value)
    return str(caught.value).partition("Not a migration stream")[2].removeprefix(": ")


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("vm1", data)
    return file.getvalue()


def tarred(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("vm1")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-c"], input=data, capture_output=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(
    ("pack", "what"),
    [
        (gzip.compress, "this is a gzip file: unpack it, and give the file that was in it (gunzip)"),
        (bz2.compress, "this is a bzip2 file: unpack it"),
        (lzma.compress, "this is an xz file: unpack it"),
        (zstd, "this is a zstd file: unpack it"),
        (zipped, "this is a zip archive: unpack it"),
        (tarred, "this is a tar archive: unpack it"),
    ],
)
def test_packed_files(pack: Callable[[bytes], bytes], what: str) -> None:
    assert named(pack(CHECKPOINT)).startswith(what)


def finish(execute: Callable[..., Any], job: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        [state] = [entry for entry in execute("query-jobs") if entry["id"] == job]
        if state["status"] == "concluded":
            break
        assert time.monotonic() < deadline, state
    assert "error" not in state, state
    execute("job-dismiss", id=job)


def test_what_qemu_itself_writes(qemu_commands: QemuCommands, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    raw = {"driver": "file", "filename": f"{tmp_path}/disk"}
    with qemu_commands("-machine", "pc", "-m", "16M") as execute:
        execute("blockdev-create", **{"job-id": "a", "options": {**raw, "size": 0}})
        finish(execute, "a")
        execute("blockdev-add", **raw, **{"node-name": "raw"})
        qcow2 = {"driver": "qcow2", "file": "raw"}
        execute("blockdev-create", **{"job-id": "b", "options": {**qcow2, "size": 64 << 20}})
        finish(execute, "b")
        disk = (tmp_path / "disk").read_bytes()
        execute("blockdev-add", **qcow2, **{"node-name": "disk"})
        execute("snapshot-save", **{"job-id": "c", "tag": "one", "vmstate": "disk", "devices": ["disk"]})
        finish(execute, "c")
        for driver in ("vmdk", "vdi", "vhdx", "vpc", "qed"):
            image = {"driver": "file", "filename": f"{tmp_path}/{driver}"}
            execute("blockdev-create", **{"job-id": driver, "options": {**image, "size": 0}})
            finish(execute, driver)
            execute("blockdev-add", **image, **{"node-name": f"raw-{driver}"})
            options = {"driver": driver, "file": f"raw-{driver}", "size": 1 << 20}
            options |= {"force-size": True} if driver == "vpc" else {}
            execute("blockdev-create", **{"job-id": driver, "options": options})
            finish(execute, driver)
        for name, settings in {
            "elf": {},
            "flat": {"format": "kdump-zlib"},
            "kdump": {"format": "kdump-raw-zlib"},
        }.items():
            execute("dump-guest-memory", paging=False, protocol=f"file:{tmp_path}/{name}", **settings)
    assert named(disk).startswith("this is a qcow2 disk image: a checkpoint holds RAM and devices")
    found = {
        "disk": "this is a qcow2 image with internal snapshots (savevm): start QEMU with -loadvm NAME -S",
        "elf": "this is an ELF core: it has RAM, but no machine",
        "flat": "this is a flattened kdump file",
        "kdump": "this is a kdump file",
        "vmdk": "this is a VMDK disk image: a checkpoint holds RAM and devices, and disks are other files",
        "vdi": "this is a VDI disk image",
        "vhdx": "this is a VHDX disk image",
        "vpc": "this is a VHD disk image",
        "qed": "this is a QED disk image",
    }
    for name, what in found.items():
        line = run_ckptfs("info", tmp_path / name, code=1).stderr
        assert line.startswith(f"{tmp_path}/{name}: at byte 0x0: Not a migration stream: {what}")


def test_what_is_exported_here() -> None:
    memory = MemoryMap((Region(0, 4096, "pc.ram", 0),), "as told")
    [(head, _)] = headers(memory)
    assert named(head + bytes(4096)).startswith("this is a LiME dump: it has RAM, but no machine")


def test_raw_memory_of_a_pc() -> None:
    vectors = bytes.fromhex("53ff00f053ff00f0c3e200f053ff00f0")  # as SeaBIOS leaves them, below Linux too
    assert named(vectors + bytes(8192)).startswith("this is probably raw memory of a PC")


def test_an_elf_program() -> None:
    with open("/proc/self/exe", "rb") as file:
        assert named(file.read()) == "this is an ELF program or library, not a checkpoint"


def test_a_stream_at_another_offset() -> None:
    plain = MigrationFile(capabilities=()).data()
    assert named(bytes(7) + b"x" * 93 + plain).startswith("a stream begins at byte 0x64: say so")
    assert named(plain, 5).startswith("a stream begins at byte 0x0: say so")
    assert named(b"x" * (2 << 20) + plain) == " (or it begins at another offset)"


def test_what_is_not_known_is_not_guessed_at() -> None:
    assert describe(BytesSource(b"junk" * 5000)) is None
    assert describe(BytesSource(bytes(5000))) is None
    assert describe(BytesSource(b"")) == "this file is empty"
    assert describe(BytesSource(b"short")) is None


@pytest.mark.parametrize("row", TABLE, ids=lambda row: repr(row.magic))
def test_every_row_is_reached_and_says_what_to_do(row: Row) -> None:
    for head in (bytes(row.offset) + row.magic, (bytes(row.offset) + row.magic).ljust(5000, b"\0")):
        what = describe(BytesSource(head))
        assert what is not None
        assert what.startswith("this is ")
        assert isinstance(row.what, str) is (what == f"this is {row.what}")
        assert ": " in what or "not a checkpoint" in what
