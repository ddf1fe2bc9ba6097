"""What a start touches, kept beside a file."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs.channels.working_set import ByteRange, join, read_working_set, touched, write_working_set

KiB = 1 << 10
MiB = 1 << 20


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of 8 MiB."""
    (tmp_path / "file").write_bytes(os.urandom(8 * MiB))
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd
    os.close(fd)


def test_what_is_near_is_read_in_one_piece() -> None:
    far, near = ByteRange(4 * MiB, 5 * MiB), ByteRange(0, 4 * KiB)
    assert join([far, ByteRange(200 * KiB, 300 * KiB), near, ByteRange(8 * KiB, 12 * KiB)]) == [
        ByteRange(0, 300 * KiB),
        far,
    ]
    assert join([]) == []


def test_kept_and_read_again(fd: int, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    assert read_working_set(path, fd) == []
    assert write_working_set(path, fd, [ByteRange(MiB, 2 * MiB), ByteRange(6 * MiB, 6 * MiB + 4096)]) == MiB + 4096
    assert read_working_set(path, fd) == [ByteRange(MiB, 2 * MiB), ByteRange(6 * MiB, 6 * MiB + 4096)]
    assert sorted(os.listdir(tmp_path)) == ["file", "file.working-set"]
    assert (tmp_path / "file.working-set").stat().st_mode & 0o777 == 0o600


def test_that_of_another_version_is_none(fd: int, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    write_working_set(path, fd, [ByteRange(0, MiB)])
    os.utime(fd, ns=(1, 1))
    assert read_working_set(path, fd) == []


@pytest.mark.parametrize(
    "line", ["", "0x0", "x y", "0x5 0x5", "-0x5 0x5", "0x0 0xffffffffffff", "0x0 0x1 0x2", "\0", "\xff" * 1000]
)
def test_nonsense_in_it_is_passed_over(fd: int, tmp_path: Path, line: str) -> None:
    path = tmp_path / "file"
    write_working_set(str(path), fd, [])
    with path.with_name("file.working-set").open("a") as file:
        file.write(line + "\n")
    assert read_working_set(str(path), fd) == []


def test_what_a_process_has_touched(fd: int) -> None:
    with mmap.mmap(fd, 4 * MiB, mmap.MAP_PRIVATE, offset=2 * MiB) as memory:
        memory.madvise(mmap.MADV_RANDOM)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        memory[MiB : MiB + 5] = b"write"
        assert memory[3 * MiB + 4096] is not None
        found = touched(os.getpid(), fd)
    assert all(2 * MiB <= start < stop <= 6 * MiB for start, stop in found)
    assert any(start <= 3 * MiB < stop for start, stop in found)
    assert any(start <= 5 * MiB + 4096 < stop for start, stop in found)
    assert sum(stop - start for start, stop in found) < MiB
