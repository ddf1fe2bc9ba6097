"""The entry of checksums: what goes in comes out, and what is damaged is none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.mapped_ram.bitmap import Run
from ckptfs.mapped_ram.checksums import UNKNOWN, ZEROS, Checksums, checksum

LENGTHS = {"pc.ram": 40 << 20, "odd\udcff": 5 << 12, "none": 64 << 10}


def filled(seed: int) -> Checksums:
    sums = Checksums.of_zeros(LENGTHS)
    rng = np.random.default_rng(seed)
    windows = sums.windows["pc.ram"]
    for _ in range(int(rng.integers(0, 8))):
        start, length = (int(number) for number in rng.integers(0, [windows.size, 90]))
        windows[start : start + length] = rng.integers(0, 1 << 32, windows[start : start + length].size)
    sums.windows["odd\udcff"][0] = 7
    return sums


@pytest.mark.parametrize("seed", range(20))
def test_what_goes_in_comes_out(seed: int) -> None:
    sums = filled(seed)
    found = Checksums.parse(sums.entry(LENGTHS).payload, LENGTHS)
    assert found is not None
    assert found.window_length == 64 << 10
    assert list(found.windows) == list(LENGTHS)
    assert all(np.array_equal(found.windows[idstr], sums.windows[idstr]) for idstr in LENGTHS)


def test_blocks_of_another_size_have_none() -> None:
    payload = filled(1).entry(LENGTHS).payload
    found = Checksums.parse(payload, {"pc.ram": 41 << 20, "none": 64 << 10})
    assert found is not None
    assert list(found.windows) == ["none"]


@given(st.data())
def test_any_bytes_are_checksums_or_none(data: st.DataObject) -> None:
    payload = bytearray(filled(3).entry(LENGTHS).payload)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 80) | st.integers(0, len(payload) - 1))
        payload[place] = data.draw(st.integers(0, 255))
    found = Checksums.parse(bytes(payload[: data.draw(st.integers(0, len(payload)))]), LENGTHS)
    if found is not None:
        assert all(sums.size == -(-LENGTHS[idstr] // found.window_length) for idstr, sums in found.windows.items())


def test_windows_grow_with_ram() -> None:
    for terabytes, window_length in ((0.5, 64 << 10), (0.6, 128 << 10), (4, 512 << 10), (16, 1 << 20)):
        sums = Checksums.of_zeros({"pc.ram": int(terabytes * (1 << 40))})
        assert sums.window_length == window_length
    assert len(sums.entry({"pc.ram": 1 << 44}).payload) < 100  # what is all zeros takes no room


def test_zeros_of_any_length_and_nothing_else() -> None:
    for length in (4096, 64 << 10, 12345):
        assert checksum(memoryview(bytes(length))) == ZEROS
        assert checksum(memoryview(bytes(length - 1) + b"\1")) > UNKNOWN


def test_the_windows_of_large_pages_and_of_a_last_part() -> None:
    sums = Checksums.of_zeros(LENGTHS)
    assert sums.around(Run(17, 18), 4096, 100) == Run(16, 32)
    assert sums.around(Run(97, 98), 4096, 100) == Run(96, 100)
    assert sums.around(Run(3, 5), 64 << 10, 100) == Run(3, 5)
    data = bytearray(5 << 12)
    sums.windows["odd\udcff"][0] = checksum(memoryview(data))
    assert sums.wrong("odd\udcff", Run(0, 5), memoryview(data), 4096) == []
    data[-1] = 1
    assert sums.wrong("odd\udcff", Run(0, 5), memoryview(data), 4096) == [Run(0, 5)]
    assert sums.known(LENGTHS) == (640 + 1 + 1, 640 + 1 + 1)
