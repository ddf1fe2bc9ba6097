"""Sparse tars against GNU tar, in both directions, and broken ones."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import CheckpointError
from ckptfs.foreign.sparse_tar import JOINED, SparseMap, end_of_tar, join_extents, read_sparse_head, sparse_head
from tests.doubles.migration_file import BytesSource

KiB = 1 << 10
LENGTH = 3 << 20


def rows(*extents: tuple[int, int]) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    return np.array(extents, np.int64).reshape(-1, 2)


def packed(name: str, content: bytes, extents: list[tuple[int, int]]) -> bytes:
    head, sparse_map = sparse_head(name, len(content), rows(*extents), 1700000000)
    data = b"".join(content[a:b] for a, b in sparse_map.file_extents(0, sparse_map.stored_length))
    return head + data + end_of_tar(sparse_map.stored_length)


def content_of(tar: bytes) -> bytes:
    found = read_sparse_head(BytesSource(tar))
    content = bytearray(found.length)
    for start, stop in found.extents(0, found.length):
        at = found.data_offset + found.stored_before(start)
        content[start:stop] = tar[at : at + stop - start]
    return bytes(content)


def with_data(*extents: tuple[int, int]) -> bytes:
    content = bytearray(LENGTH)
    for start, stop in extents:
        content[start:stop] = np.random.default_rng(start).bytes(stop - start)
    return bytes(content)


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [(0, LENGTH)],
        [(4096, 8192), (1 << 20, (1 << 20) + 300_000)],
        [(0, 4096), (LENGTH - 5, LENGTH)],
    ],
)
@pytest.mark.parametrize("name", ["vm1", "vm 1 \u00e4" + "x" * 150])
def test_gnu_tar_makes_the_same_file_of_it(tmp_path: Path, extents: list[tuple[int, int]], name: str) -> None:
    content = with_data(*extents)
    tar = packed(name, content, extents)
    subprocess.run(["tar", "-xSf", "-", "-C", tmp_path], input=tar, check=True)
    (path,) = tmp_path.iterdir()
    assert path.name == name
    assert path.read_bytes() == content == content_of(tar)
    assert path.stat().st_blocks * 512 <= sum(stop - start for start, stop in extents) + 16 * KiB


def test_what_gnu_tar_makes_is_read(tmp_path: Path) -> None:
    content = with_data((64 * KiB, 128 * KiB), (1 << 20, 2 << 20))
    with (tmp_path / "vm1").open("wb") as file:
        for start, stop in [(64 * KiB, 128 * KiB), (1 << 20, 2 << 20)]:
            os.pwrite(file.fileno(), content[start:stop], start)
        file.truncate(LENGTH)
    for options in (["-S", "--format=pax"], ["-S", "--format=gnu"], ["--format=ustar"]):
        command = ["tar", *options, "-cf", "-", "-C", tmp_path, "vm1"]
        assert content_of(subprocess.run(command, check=True, capture_output=True).stdout) == content


def test_a_tar_that_is_cut_short_or_lies_is_refused() -> None:
    tar = packed("vm1", with_data((4096, 8192)), [(4096, 8192)])
    found = read_sparse_head(BytesSource(tar))
    for length in (100, 512, 1000, 1536, found.data_offset + 100):
        with pytest.raises(CheckpointError):
            read_sparse_head(BytesSource(tar[:length]))
    for former, broken in [(b"2\n4096\n4096", b"2\n9999999999\n4096"), (b"2\n4096\n", b"99999999999\n4096\n")]:
        with pytest.raises(CheckpointError):
            read_sparse_head(BytesSource(tar.replace(former, broken)))


@given(st.lists(st.integers(0, 50), min_size=2, max_size=12, unique=True).map(sorted), st.data())
def test_a_map_tells_where_everything_is(edges: list[int], data: st.DataObject) -> None:
    extents = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    found = SparseMap(60, rows(*extents), 7)
    stored = [byte for start, stop in extents for byte in range(start, stop)]
    start = data.draw(st.integers(0, 60))
    stop = data.draw(st.integers(start, 60))
    assert found.stored_length == len(stored)
    assert found.stored_before(start) == sum(byte < start for byte in stored)
    inside = [byte for a, b in found.extents(start, stop) for byte in range(a, b)]
    assert inside == [byte for byte in stored if start <= byte < stop]
    first, last = sorted((min(start, len(stored)), min(stop, len(stored))))
    assert [byte for a, b in found.file_extents(first, last) for byte in range(a, b)] == stored[first:last]


def test_short_holes_are_joined() -> None:
    extents = rows((0, 10), (10 + JOINED - 1, 20 + JOINED), (3 * JOINED, 4 * JOINED))
    assert join_extents(extents).tolist() == [[0, 20 + JOINED], [3 * JOINED, 4 * JOINED]]
    assert join_extents(rows()).tolist() == []
