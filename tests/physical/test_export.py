"""ckptfs export, with views/, QEMU's own dump and stock QEMU as the judges."""

import contextlib
import os
import signal
import struct
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptfs.cli.export import run
from ckptfs.errors import CkptfsError
from tests.doubles.checkpoints import ram_in
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.disk import Disk
from tests.mount.harness import BIN
from tests.physical.conftest import SavedGuests
from tests.physical.elf import read_elf
from tests.qemu.guest import Guest
from tests.qemu.machine import Qemu

Export = Callable[..., str]


@pytest.fixture
def export() -> Export:
    """`export(FILE_OR_DIR, OUT, "raw")` is its answer, or with ``code`` its words on stderr."""

    def export(source: Path, out: Path | str, kind: str, *more: str, code: int = 0) -> str:
        done = subprocess.run(
            [BIN / "ckptfs", "export", source, out, "--format", kind, *more],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return export


def lime_ranges(path: Path) -> dict[int, bytes]:
    """Each range of a LiME file by its address (LiME, doc/README)."""
    data, ranges, position = path.read_bytes(), {}, 0
    while position < len(data):
        magic, version, start, last = struct.unpack_from("<IIQQ8x", data, position)
        assert (magic, version) == (0x4C694D45, 1)
        ranges[start] = data[position + 32 : position + 32 + last + 1 - start]
        position += 32 + last + 1 - start
    return ranges


def same(path: Path, other: Path) -> bool:
    """Whether they have the same bytes; holes are passed over."""
    with path.open("rb") as one, other.open("rb") as two:
        ranges = [*data_ranges(one.fileno()), *data_ranges(two.fileno())]
        if os.fstat(one.fileno()).st_size != os.fstat(two.fileno()).st_size:
            return False
        return all(os.pread(one.fileno(), *place) == os.pread(two.fileno(), *place) for place in ranges)


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """(length, offset) of what is no hole."""
    position = 0
    with contextlib.suppress(OSError):  # ENXIO: nothing but a hole is left
        while True:
            start = os.lseek(fd, position, os.SEEK_DATA)
            position = os.lseek(fd, start, os.SEEK_HOLE)
            yield position - start, start


def test_a_core_is_that_of_views_and_of_qemu(
    saved: SavedGuests, mount: Mount, export: Export, tmp_path: Path
) -> None:
    linux, mounted = saved.linux(), mount(saved.linux().path)
    export(linux.path, tmp_path / "core", "elf")
    assert same(tmp_path / "core", mounted.path / "views" / "vmcore")
    export(mounted.path, tmp_path / "of-mount", "elf")
    assert same(tmp_path / "core", tmp_path / "of-mount")
    assert linux.dump is not None
    core = read_elf(tmp_path / "core")
    assert core.notes == linux.dump.notes
    for load in linux.dump.loads:
        assert core.read(load.physical, load.length) == linux.dump.read(load.physical, load.length)
    stored = (tmp_path / "core").stat()
    assert stored.st_blocks * 512 < linux.path.stat().st_blocks * 512 + (1 << 20)
    with (tmp_path / "piped").open("wb") as file:
        command = [BIN / "ckptfs", "export", linux.path, "-", "--format", "elf"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as piped:
            subprocess.run(["cat"], stdin=piped.stdout, stdout=file, check=True)
        assert piped.returncode == 0
    assert same(tmp_path / "core", tmp_path / "piped")


def test_flat_and_lime(saved: SavedGuests, mount: Mount, export: Export, tmp_path: Path) -> None:
    linux, mounted = saved.linux(), mount(saved.linux().path)
    (tmp_path / "flat").write_text("whatever was there")
    export(linux.path, tmp_path / "flat", "raw")
    export(mounted.path, tmp_path / "flat-of-mount", "raw")
    assert same(tmp_path / "flat", tmp_path / "flat-of-mount")
    assert (tmp_path / "flat").stat().st_blocks * 512 < 128 << 20 < (tmp_path / "flat").stat().st_size
    with (tmp_path / "flat").open("rb") as flat:
        ram = (mounted.ram / "pc.ram").read_bytes()
        assert flat.read(len(ram)) == ram
    export(linux.path, tmp_path / "lime", "lime")
    export(mounted.path, tmp_path / "lime-of-mount", "lime")
    assert same(tmp_path / "lime", tmp_path / "lime-of-mount")
    assert lime_ranges(tmp_path / "lime") == {0: ram, 0xFFFC0000: (mounted.ram / "pc.bios").read_bytes()}


async def test_stock_qemu_goes_on_from_a_copy(
    saved: SavedGuests, guest_files: Guest, export: Export, tmp_path: Path
) -> None:
    linux = saved.linux()
    export(linux.path, tmp_path / "copy", "mapped-ram")
    assert ram_in(tmp_path / "copy") == ram_in(linux.path)
    async with Qemu(guest_files, "-smp", "2", incoming="defer") as vm:
        await vm.load(tmp_path / "copy", multifd=2)
        await vm.cont()
        await vm.tick()


def test_a_copy_is_clean(export: Export, tmp_path: Path) -> None:
    file = MigrationFile(blocks=[Block("pc.ram", 600, {1: b"one", 300: bytes(4096)}, stale={2: b"stale"})])
    file.write(tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "copy", "mapped-ram")
    data = (tmp_path / "copy").read_bytes()
    assert b"one" in data
    assert b"stale" not in data
    assert ram_in(tmp_path / "copy") == ram_in(tmp_path / "ckpt")
    assert (tmp_path / "copy").stat().st_blocks * 512 < 64 << 10


def test_a_plain_stream_at_an_offset(saved: SavedGuests, mount: Mount, export: Export, tmp_path: Path) -> None:
    mounted = mount(saved.linux().path)
    mounted.ctl("migrate_set_capability multifd off")
    mounted.ctl("migrate_set_capability mapped-ram off")
    mounted.ctl(f"save file:{tmp_path}/plain,offset=0x1001")
    export(tmp_path / "plain", tmp_path / "core", "elf", "--offset", "0x1001")
    assert same(tmp_path / "core", mounted.path / "views" / "vmcore")
    export(tmp_path / "plain", tmp_path / "copy", "mapped-ram", "--offset", "0x1001")
    assert ram_in(tmp_path / "copy") == ram_in(saved.linux().path)


def test_a_map_by_hand(export: Export, tmp_path: Path) -> None:
    MigrationFile(blocks=[Block("a", 16, {1: b"one"}), Block("b", 16, {2: b"two"})]).write(tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "flat", "raw", "--map", "b@0", "--map", "a@1M+8k:4k")
    flat = (tmp_path / "flat").read_bytes()
    assert len(flat) == (1 << 20) + 8192
    assert flat[2 * 4096 :].startswith(b"two")
    assert flat[1 << 20 :].startswith(b"one")


def refusal(source: Path, out: Path | str, kind: str, *places: str) -> str:
    """What is said, without a process for each."""
    arguments = Namespace(path=str(source), out=str(out), format=kind, map=list(places), offset=0)
    with pytest.raises((CkptfsError, OSError)) as error:
        run(Namespace(**vars(arguments), quiet=True, json=False))
    return str(error.value)


def test_what_is_refused(mount: Mount, tmp_path: Path) -> None:
    MigrationFile(blocks=[Block("a", 16, {1: b"one"})]).write(tmp_path / "ckpt")
    before = (tmp_path / "ckpt").read_bytes()
    (tmp_path / "link").symlink_to("ckpt")
    for out in ("ckpt", "link"):
        assert "is the file to be exported" in refusal(tmp_path / "ckpt", tmp_path / out, "raw")
    assert "directory" in refusal(tmp_path / "ckpt", tmp_path, "raw", "a@0")
    assert "not a regular file" in refusal(tmp_path / "ckpt", "/dev/null", "raw", "a@0")
    assert "--map" in refusal(tmp_path / "ckpt", tmp_path / "out", "raw")
    assert "x86-64" in refusal(tmp_path / "ckpt", tmp_path / "out", "elf", "a@0")
    assert "name a file" in refusal(tmp_path / "ckpt", "-", "mapped-ram")
    assert "No such file" in refusal(tmp_path / "nosuch", tmp_path / "out", "raw")
    assert "no guest's RAM" in refusal(tmp_path, tmp_path / "out", "raw")
    fresh = mount(tmp_path / "new", "ram=pc.ram:1M")
    assert "there is no checkpoint yet" in refusal(fresh.path, tmp_path / "out", "raw")
    mounted = mount(tmp_path / "ckpt", "map=a@0")
    assert "is what is mounted" in refusal(mounted.path, tmp_path / "ckpt", "raw")
    assert "is what is mounted" in refusal(mounted.path, tmp_path / "ckpt", "mapped-ram")
    assert "on this mount" in refusal(mounted.path, mounted.path / "out", "raw")
    with (mounted.ram / "a").open("r+b") as ram:
        ram.write(b"changed")
    mounted.expect_log(r"views/phys was refused to process \d+: pages have been written since the checkpoint")
    assert "written since the checkpoint" in refusal(mounted.path, tmp_path / "out", "raw")
    assert (tmp_path / "ckpt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("*out*")) == []


def test_of_a_mount_that_was_written_there_is_a_mapped_ram_copy(
    mount: Mount, export: Export, tmp_path: Path
) -> None:
    MigrationFile(blocks=[Block("a", 16, {1: b"one"})]).write(tmp_path / "ckpt")
    mounted = mount(tmp_path / "ckpt")
    with (mounted.ram / "a").open("r+b") as ram:
        ram.write(b"changed")
    export(mounted.path, tmp_path / "copy", "mapped-ram")
    assert ram_in(tmp_path / "copy")["a"].startswith(b"changed")


def test_a_full_disk_leaves_nothing(export: Export, tmp_path: Path) -> None:
    pages = dict.fromkeys(range(64), b"data")
    MigrationFile(blocks=[Block("a", 64, pages)]).write(tmp_path / "ckpt")
    disk = Disk("tmpfs", tmp_path / "image", tmp_path / "small", 128 << 10)
    try:
        (disk.path / "out").write_text("former")
        words = export(tmp_path / "ckpt", disk.path / "out", "raw", "--map", "a@1M", code=1)
        assert words.splitlines()[-1] == f"{disk.path}/out: No space left on device"
        assert (disk.path / "out").read_text() == "former"
        assert os.listdir(disk.path) == ["out"]
    finally:
        disk.close()


def test_there_has_to_be_a_directory(export: Export, tmp_path: Path) -> None:
    MigrationFile(blocks=[Block("a", 16, {1: b"one"})], vmdesc=False).write(tmp_path / "ckpt")
    words = export(tmp_path / "ckpt", tmp_path / "nosuch" / "out", "raw", "--map", "a@1M", code=1)
    assert words == f"{tmp_path}/nosuch/out: No such file or directory\n"


def test_interrupted_it_leaves_nothing(export: Export, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pages = {page: rng.bytes(4096) for page in range(64)}
    MigrationFile(blocks=[Block("a", 64, pages)]).write(tmp_path / "ckpt")
    command = [BIN / "ckptfs", "export", tmp_path / "ckpt", "-", "--format", "raw", "--map", "a@0"]
    # a pipe that nobody reads holds it up, so that it is there to be interrupted
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.buffer.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        words = process.stderr.read()
    assert process.returncode == 1
    assert words.endswith("-: interrupted: the incomplete file was removed\n")
