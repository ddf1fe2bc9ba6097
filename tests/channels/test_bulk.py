"""Reading much of a file at once: what is read, and what becomes of the page cache."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptfs.channels.buffers import BUFFER_LENGTH
from ckptfs.channels.bulk import BulkReader, new_array
from ckptfs.errors import StorageError
from tests.doubles.storage import open_descriptors

MiB = 1 << 20
CONTENT = np.random.default_rng(1).bytes(2 * MiB + 100)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(CONTENT)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    os.fsync(fd)
    yield fd
    os.close(fd)


def cached(fd: int) -> int:
    """How many bytes of it are in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", f"/proc/{os.getpid()}/fd/{fd}"]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("place", [0, 4096, MiB, 100], ids=hex)
@pytest.mark.parametrize("length", [4096, MiB, MiB + 7], ids=hex)
def test_what_is_read(file: int, is_warm: bool, place: int, length: int) -> None:
    if not is_warm:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    before = open_descriptors()
    reader = BulkReader(file)
    array = new_array(length)
    reader.pread_exactly(array, place)
    assert array.tobytes() == CONTENT[place : place + length]
    reader.close()
    assert open_descriptors() == before


def test_what_was_not_cached_is_not_afterwards(file: int) -> None:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    reader = BulkReader(file)
    reader.pread_exactly(new_array(MiB), MiB)
    assert cached(file) <= 4096  # it was asked for
    os.pread(file, len(CONTENT), 0)
    before = cached(file)
    assert before >= len(CONTENT)
    reader.pread_exactly(new_array(MiB), MiB)
    assert cached(file) == before
    reader.close()


def test_a_file_that_ends(file: int) -> None:
    reader = BulkReader(file)
    with pytest.raises(StorageError, match=f"ends at byte {len(CONTENT):#x}"):
        reader.pread_exactly(new_array(MiB), 2 * MiB)
    reader.close()


def test_arrays_are_aligned_up_to_the_length_of_a_buffer() -> None:
    arrays = [new_array(BUFFER_LENGTH) for _ in range(3)]
    assert [array.ctypes.data % 4096 for array in arrays] == [0, 0, 0]
    arrays[0][:] = 1
    arrays[1][:] = 2
    assert int(arrays[0].sum()) == BUFFER_LENGTH
    assert new_array(BUFFER_LENGTH + 1).size == BUFFER_LENGTH + 1
