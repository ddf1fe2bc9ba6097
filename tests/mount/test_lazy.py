"""What is restored is what is read, and a page that can't be restored fails alone."""

import mmap
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import PAGE
from tests.mount.harness import DEADLINE, Mounted

MiB = 1 << 20
GiB = 1 << 30


def io(mounted: Mounted) -> dict[str, int]:
    """What the daemon has read and written so far (proc(5), /proc/PID/io)."""
    lines = Path(f"/proc/{mounted.pid}/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


def dense_checkpoint(path: Path, length: int) -> None:
    """A checkpoint of which every page is listed; what is not written to it are holes."""
    MigrationFile(blocks=[Block("pc.ram", length // PAGE)]).write(path)
    with path.open("r+b") as file:
        bitmap_offset = file.read(4096).index(b"\6pc.ram") + 7 + 8 + 28
        file.seek(bitmap_offset)
        file.write(b"\xff" * (length // PAGE // 8))


@contextmanager
def slow_reads(mounted: Mounted, log: Path) -> Iterator[None]:
    """Every read of the daemon from a file takes a tenth of a second."""
    delay = ["-e", "trace=preadv,preadv2", "-e", "inject=preadv,preadv2:delay_enter=100000"]
    process = subprocess.Popen(
        ["strace", "-f", "-p", str(mounted.pid), "-o", log, *delay], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process:
        try:
            assert "attached" in process.stderr.readline()
            yield
        finally:
            process.terminate()
            process.communicate(timeout=DEADLINE)


def test_64_kib_of_a_gib_cost_no_more_than_a_few_mib(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    dense_checkpoint(path, GiB)
    place = 777 * MiB
    content = np.random.default_rng(1).bytes(64 << 10)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), content, MiB + place)  # pages begin at the first MiB
        os.fsync(file.fileno())
    mounted = mount(path)
    assert mounted.status()["direct-io"].startswith("on")
    with (mounted.ram / "pc.ram").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), len(content), place) == content
    read = io(mounted)  # since the daemon began: mounting counts, too
    assert len(content) <= read["rchar"] <= 4 * MiB
    assert read["read_bytes"] <= 4 * MiB
    status = mounted.status()
    assert len(content) // PAGE <= status["read-pages"] <= 4 * MiB // PAGE
    assert status["time-to-first-byte"] is not None
    assert status["time-to-full"] is None


def test_what_the_kernel_has_cached_is_not_read_again(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    dense_checkpoint(path, 8 * MiB)
    mounted = mount(path)
    for _ in range(2):
        before = io(mounted)["rchar"]
        assert (mounted.ram / "pc.ram").read_bytes() == bytes(8 * MiB)
        read = io(mounted)["rchar"] - before
    assert read < MiB  # requests: open, close


def test_zero_pages_cost_no_io(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", 4096, {}, stale={7: b"stale"})]).write(path)
    mounted = mount(path)
    before = io(mounted)
    assert (mounted.ram / "pc.ram").read_bytes() == bytes(16 * MiB)
    # What it reads are requests of the kernel: none is longer than a page.
    assert io(mounted)["rchar"] - before["rchar"] < MiB
    assert mounted.status()["time-to-first-byte"] is None


def test_a_block_of_1_tib(mount: Mount, tmp_path: Path) -> None:
    length = 1 << 40
    path = tmp_path / "checkpoint"
    places = {0: b"first", length // 2 - 3: b"half", length - 7: b"the end"}
    mounted = mount(path, f"ram=pc.ram:{length}")
    with (mounted.ram / "pc.ram").open("r+b", buffering=0) as file:
        for offset, content in places.items():
            assert os.pwrite(file.fileno(), content, offset) == len(content)
    mounted.ctl("save")
    mounted.umount()
    assert path.stat().st_size > length
    assert path.stat().st_blocks * 512 < 64 * MiB
    mounted = mount(path)
    assert (mounted.ram / "pc.ram").stat().st_size == length
    assert (mounted.path / "pages/pc.ram").stat().st_size == length // PAGE
    with (mounted.ram / "pc.ram").open("rb", buffering=0) as file:
        for offset, content in places.items():
            assert os.pread(file.fileno(), len(content), offset) == content
        assert os.pread(file.fileno(), 4096, length // 3) == bytes(4096)
    assert mounted.status()["page-count"] == length // PAGE
    memory = Path(f"/proc/{mounted.pid}/status").read_text()
    resident = int(next(line for line in memory.splitlines() if line.startswith("VmRSS:")).split()[1]) << 10
    assert resident < 400 * MiB


def test_pages_that_are_cut_off_fail_alone(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    dense_checkpoint(path, 4 * MiB)
    content = np.random.default_rng(1).bytes(4 * MiB)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), content, MiB)
    mounted = mount(path)
    mounted.expect_log("ERROR: pc.ram: page.* can't be read from the checkpoint")
    os.truncate(path, MiB + 600 * PAGE)  # in the middle of the third MiB
    with (mounted.ram / "pc.ram").open("r+b", buffering=0) as file:
        fd = file.fileno()
        for page in (0, 599, 256, 512):
            assert os.pread(fd, PAGE, page * PAGE) == content[page * PAGE : (page + 1) * PAGE]
        for page in (600, 700, 1023):
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(fd, PAGE, page * PAGE)
        assert os.pwrite(fd, content[:PAGE], 700 * PAGE) == PAGE  # what is written is there again
        assert os.pread(fd, PAGE, 700 * PAGE) == content[:PAGE]
        assert os.pread(fd, 600 * PAGE, 0) == content[: 600 * PAGE]
    status = mounted.status()
    bad = {(bad["block"], bad["page"]) for bad in status["bad-pages"]}
    assert {("pc.ram", 600), ("pc.ram", 1023)} <= bad
    assert not any(page < 600 for _, page in bad)
    assert "bad-page pc.ram 600 " in (mounted.path / "status").read_text()
    with pytest.raises(OSError, match="can't be read"):
        mounted.ctl(f"save {tmp_path}/other")
    assert not (tmp_path / "other").exists()


def test_a_file_that_is_replaced_is_still_the_one_that_was_mounted(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    MigrationFile().write(path)
    mounted = mount(path)
    other = tmp_path / "other"
    other.write_bytes(b"other" * 1000)
    other.rename(path)
    assert (mounted.ram / "pc.ram").read_bytes().startswith(b"first\0")


def test_readers_of_one_page_share_one_read(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    dense_checkpoint(path, MiB)
    mounted = mount(path)
    fds = [os.open(mounted.ram / "pc.ram", os.O_RDONLY | os.O_DIRECT) for _ in range(4)]
    buffers = [mmap.mmap(-1, MiB) for _ in fds]
    before = io(mounted)["rchar"]
    with slow_reads(mounted, tmp_path / "strace"), ThreadPoolExecutor() as threads:
        assert list(threads.map(lambda fd, buffer: os.preadv(fd, [buffer], 0), fds, buffers)) == [MiB] * 4
    assert io(mounted)["rchar"] - before < 2 * MiB
    for fd in fds:
        os.close(fd)


def test_a_cancelled_save_takes_no_reader_with_it(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    dense_checkpoint(path, 8 * MiB)
    mounted = mount(path)
    fd = os.open(mounted.ram / "pc.ram", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, MiB)
    with slow_reads(mounted, tmp_path / "strace"), ThreadPoolExecutor() as threads:
        mounted.ctl(f"save {tmp_path}/other nowait")
        mounted.wait_for(lambda status: status["migration"].get("status") == "active")
        reads = [threads.submit(os.preadv, fd, [buffer], place * MiB) for place in range(8)]
        mounted.ctl("cancel")
        assert [read.result(DEADLINE) for read in reads] == [MiB] * 8
    os.close(fd)
