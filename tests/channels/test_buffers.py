import gc
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from ckptfs.channels.buffers import BUFFER_LENGTH, AlignedBuffers


@pytest.fixture(autouse=True)
def _reference_counts_alone() -> Iterator[None]:
    """Buffers come back the moment the last view dies, not when a garbage collection happens to run."""
    gc.disable()
    yield
    gc.enable()


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


@pytest.mark.parametrize("length", [1, 4096, BUFFER_LENGTH])
def test_a_buffer_is_writable_page_aligned_and_as_long_as_asked(length: int) -> None:
    buffer = AlignedBuffers().take(length)
    assert (len(buffer), buffer.readonly, buffer.itemsize) == (length, False, 1)
    assert address(buffer) % 4096 == 0


@pytest.mark.parametrize("length", [-1, 0, BUFFER_LENGTH + 1])
def test_a_buffer_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"not {length}"):
        AlignedBuffers().take(length)


def test_a_buffer_comes_back_when_its_only_view_dies() -> None:
    buffers = AlignedBuffers()
    first = buffers.take(8192)
    where = address(first)
    del first
    assert address(buffers.take(100)) == where


def test_a_buffer_stays_out_while_a_slice_lives() -> None:
    buffers = AlignedBuffers()
    whole = buffers.take(8192)
    where = address(whole)
    part = whole[4096:]
    part[:] = b"x" * 4096
    whole.release()
    del whole
    other = buffers.take(8192)
    assert address(other) != where
    other[:] = bytes(8192)
    assert bytes(part) == b"x" * 4096
    slice_of_slice = part[1:2]
    del part
    assert address(buffers.take(1)) not in (where, address(other))
    del slice_of_slice
    assert address(buffers.take(1)) == where


def test_a_buffer_stays_out_while_an_array_on_it_lives() -> None:
    buffers = AlignedBuffers()
    view = buffers.take(4096)
    where = address(view)
    array = np.frombuffer(view[:8], np.uint64)
    del view
    assert address(buffers.take(1)) != where
    del array
    assert address(buffers.take(1)) == where


def test_no_two_buffers_that_are_out_share_a_byte() -> None:
    buffers = AlignedBuffers(keep=2)
    views = [buffers.take(BUFFER_LENGTH) for _ in range(8)]
    starts = sorted(address(view) for view in views)
    assert all(later - earlier >= BUFFER_LENGTH for earlier, later in pairwise(starts))


def test_only_some_idle_buffers_are_kept() -> None:
    buffers = AlignedBuffers(keep=2)
    views = [buffers.take(1) for _ in range(5)]
    kept = {address(view) for view in views[:2]}
    while views:
        views.pop(0)  # the first two to come back are kept
    again = [buffers.take(1) for _ in range(2)]
    assert {address(view) for view in again} == kept


def test_a_view_outlives_the_pool() -> None:
    view = AlignedBuffers().take(4096)
    gc.collect()
    view[:] = b"y" * 4096
    assert bytes(view) == b"y" * 4096
