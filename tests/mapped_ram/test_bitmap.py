import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.mapped_ram.bitmap import SEGMENT_WORDS, PagesBitmap, Run, bitmap_length

SEGMENT = 64 * SEGMENT_WORDS
PAGE_COUNT = 3 * 64 * 8 + 13  # several words, a partial last one, more than run_at looks at first


def runs_of(pages: set[int], start: int, stop: int) -> list[Run]:
    runs: list[Run] = []
    for page in range(start, stop):
        if page in pages:
            if runs and runs[-1].stop == page:
                runs[-1] = Run(runs[-1].start, page + 1)
            else:
                runs.append(Run(page, page + 1))
    return runs


def pages_of(bitmap: PagesBitmap) -> set[int]:
    return set(np.flatnonzero(bitmap.expand(0, bitmap.page_count)).tolist())


@st.composite
def ranges(draw, page_count=PAGE_COUNT):
    start = draw(st.integers(0, page_count))
    return start, draw(st.integers(start, page_count))


@st.composite
def bitmaps(draw, page_count=PAGE_COUNT):
    bitmap, pages = PagesBitmap(page_count), set()
    for is_set, (start, stop) in draw(st.lists(st.tuples(st.booleans(), ranges(page_count)), max_size=8)):
        if is_set:
            bitmap.set(start, stop)
            pages |= set(range(start, stop))
        else:
            bitmap.clear(start, stop)
            pages -= set(range(start, stop))
    return bitmap, pages


@given(bitmaps(), st.sampled_from([1, 7, 16, 32, 64, 128, 5000]))
def test_any_of_each(given_bitmap, width):
    bitmap, pages = given_bitmap
    expected = [not pages.isdisjoint(range(start, start + width)) for start in range(0, PAGE_COUNT, width)]
    assert bitmap.any_of_each(width).tolist() == expected


@given(bitmaps())
def test_set_and_clear(given_bitmap):
    bitmap, pages = given_bitmap
    assert pages_of(bitmap) == pages


@given(bitmaps(), ranges())
def test_questions_about_a_range(given_bitmap, given_range):
    bitmap, pages = given_bitmap
    start, stop = given_range
    inside = [page for page in range(start, stop) if page in pages]
    assert bitmap.count(start, stop) == len(inside)
    assert bitmap.any(start, stop) == bool(inside)
    assert bitmap.all(start, stop) == (len(inside) == stop - start)
    assert list(bitmap.runs(start, stop)) == runs_of(pages, start, stop)
    assert bitmap.expand(start, stop).tolist() == [int(page in pages) for page in range(start, stop)]
    if start < stop:
        is_set, end = bitmap.run_at(start, stop)
        assert is_set == bitmap.test(start) == (start in pages)
        assert all((page in pages) == is_set for page in range(start, end))
        assert end == stop or (end in pages) != is_set


@given(bitmaps(), st.integers(0, PAGE_COUNT), st.data())
def test_set_mask(given_bitmap, start, data):
    bitmap, pages = given_bitmap
    mask = data.draw(st.lists(st.booleans(), max_size=PAGE_COUNT - start))
    bitmap.set_mask(start, np.array(mask, dtype=np.bool_))
    assert pages_of(bitmap) == pages | {start + i for i, is_set in enumerate(mask) if is_set}


@given(bitmaps(), bitmaps())
def test_union_and_difference(a, b):
    assert pages_of(a[0].union(b[0])) == a[1] | b[1]
    assert pages_of(a[0].difference(b[0])) == a[1] - b[1]


@given(bitmaps(), bitmaps(), ranges())
def test_add(a, b, given_range):
    start, stop = given_range
    a[0].add(b[0], start, stop)
    assert pages_of(a[0]) == a[1] | (b[1] & set(range(start, stop)))


@given(bitmaps(), st.integers(0, 2 * PAGE_COUNT))
def test_resized(given_bitmap, page_count):
    bitmap, pages = given_bitmap
    resized = bitmap.resized(page_count)
    assert resized.page_count == page_count
    assert pages_of(resized) == {page for page in pages if page < page_count}
    assert PagesBitmap.from_bytes(resized.to_bytes(), page_count) == resized


@given(bitmaps(), st.sampled_from(["little", "big"]))
def test_bytes_round_trip(given_bitmap, byteorder):
    bitmap, _ = given_bitmap
    data = bitmap.to_bytes(byteorder)
    assert len(data) == bitmap_length(PAGE_COUNT)
    assert PagesBitmap.from_bytes(data, PAGE_COUNT, byteorder) == bitmap


def test_bytes_are_the_hosts_unsigned_longs():
    bitmap = PagesBitmap(65)
    bitmap.set(0, 1)
    bitmap.set(9, 10)
    bitmap.set(64, 65)
    assert bitmap.to_bytes("little") == bytes([1, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    assert bitmap.to_bytes("big") == bytes([0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 1])


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_a_bit_past_the_last_page_is_refused(byteorder):
    bitmap = PagesBitmap(64)
    bitmap.set(63, 64)
    data = bitmap.to_bytes(byteorder)
    PagesBitmap.from_bytes(data, 64, byteorder)
    with pytest.raises(ValueError, match=r"past the last page \(62\)"):
        PagesBitmap.from_bytes(data, 63, byteorder)


@pytest.mark.parametrize("length", [0, 8, 24])
def test_bytes_of_another_length_are_refused(length):
    with pytest.raises(ValueError, match="16 bytes"):
        PagesBitmap.from_bytes(bytes(length), 65)


def test_load_in_pieces():
    whole = PagesBitmap(1000)
    whole.set(3, 700)
    data = whole.to_bytes()
    bitmap = PagesBitmap(1000)
    bitmap.set(900, 1000)
    for offset in range(0, len(data), 16):
        bitmap.load(offset, data[offset : offset + 16])
    assert bitmap == whole


def test_an_empty_bitmap_has_no_pages():
    bitmap = PagesBitmap(0)
    assert list(bitmap.runs()) == []
    assert bitmap.count() == 0
    assert not bitmap.any(0, 0)
    assert bitmap.all(0, 0)
    assert bitmap.to_bytes() == b""
    assert bitmap.resized(0) == bitmap
    assert bitmap.expand(0, 0).size == 0


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 101), (101, 101)])
@pytest.mark.parametrize("method", ["set", "clear", "count", "any", "all", "run_at", "expand"])
def test_ranges_outside_are_refused(method, start, stop):
    bitmap = PagesBitmap(100)
    if start == stop and method in ("any", "all"):
        return
    with pytest.raises(IndexError):
        getattr(bitmap, method)(start, stop)


def test_runs_across_segments():
    bitmap = PagesBitmap(5 * SEGMENT + 3)
    expected = [
        Run(5, 6),
        Run(SEGMENT - 1, SEGMENT + 1),
        Run(2 * SEGMENT, 4 * SEGMENT),
        Run(5 * SEGMENT, 5 * SEGMENT + 3),
    ]
    for run in expected:
        bitmap.set(*run)
    assert list(bitmap.runs()) == expected
    assert bitmap.run_at(2 * SEGMENT, bitmap.page_count) == (True, 4 * SEGMENT)
    assert bitmap.run_at(4 * SEGMENT, bitmap.page_count) == (False, 5 * SEGMENT)
    assert bitmap.run_at(5 * SEGMENT, bitmap.page_count) == (True, bitmap.page_count)


def test_runs_are_found_as_they_are_asked_for():
    bitmap = PagesBitmap(1 << 28)
    bitmap.set(7, 8)
    bitmap.set((1 << 28) - 1, 1 << 28)
    runs = bitmap.runs()
    assert next(runs) == Run(7, 8)
    bitmap.set(1 << 27, (1 << 27) + 2)
    assert list(runs) == [Run(1 << 27, (1 << 27) + 2), Run((1 << 28) - 1, 1 << 28)]


def test_the_runs_of_a_huge_bitmap_need_little_memory():
    bitmap = PagesBitmap(1 << 26)
    bitmap.set(0, 1 << 26)
    bitmap.clear(1 << 25, (1 << 25) + 1)
    tracemalloc.start()
    try:
        assert len(list(bitmap.runs())) == 2
        assert bitmap.run_at(0, 1 << 26) == (True, 1 << 25)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
