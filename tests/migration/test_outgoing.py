"""The plan of a save: windows, zero pages, runs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.migration.outgoing import WINDOW_LENGTH, coalesce, nonzero_pages, page_windows

PAGE_SIZE = 4096


@given(
    st.sampled_from([1024, 4096, 65536]),
    st.integers(1, 3000).flatmap(lambda count: arrays(np.bool_, count, fill=st.just(False))),
)
def test_windows_hold_all_set_pages_and_begin_and_end_with_one(page_size: int, mask: np.ndarray) -> None:
    pages = PagesBitmap(len(mask))
    pages.set_mask(0, mask)
    width = WINDOW_LENGTH // page_size
    rest = mask.copy()
    windows = list(page_windows(pages, page_size))
    for start, stop in windows:
        assert mask[start]
        assert mask[stop - 1]
        assert start // width == (stop - 1) // width
        rest[start:stop] = False
    assert not rest.any()
    numbers = [start // width for start, _ in windows]
    assert numbers == sorted(set(numbers))
    assert width % 8 == 0


def test_windows_of_a_large_block() -> None:
    pages = PagesBitmap(3 << 20)
    for page in (5, (1 << 20) - 1, 1 << 20, (3 << 20) - 1):
        pages.set(page, page + 1)
    single = [Run(page, page + 1) for page in (5, (1 << 20) - 1, 1 << 20, (3 << 20) - 1)]
    assert list(page_windows(pages, PAGE_SIZE)) == single


def test_no_pages_are_no_windows() -> None:
    assert list(page_windows(PagesBitmap(1000), PAGE_SIZE)) == []
    assert list(page_windows(PagesBitmap(0), PAGE_SIZE)) == []


def test_a_huge_block_costs_nothing_until_asked() -> None:
    pages = PagesBitmap(1 << 30)
    pages.set(0, 1 << 30)
    assert next(page_windows(pages, PAGE_SIZE)) == Run(0, 256)


@given(st.lists(st.none() | st.tuples(st.integers(0, PAGE_SIZE - 1), st.integers(1, 255)), max_size=20))
def test_one_byte_anywhere_makes_a_page_nonzero(page_contents: list[tuple[int, int] | None]) -> None:
    data = np.zeros((len(page_contents), PAGE_SIZE), dtype=np.uint8)
    for page, content in enumerate(page_contents):
        if content is not None:
            data[page, content[0]] = content[1]
    expected = [content is not None for content in page_contents]
    assert nonzero_pages(data.reshape(-1), PAGE_SIZE).tolist() == expected


@pytest.mark.parametrize("page_size", [1024, 4096, 65536])
def test_all_and_none(page_size: int) -> None:
    assert nonzero_pages(np.ones(3 * page_size, dtype=np.uint8), page_size).all()
    assert not nonzero_pages(np.zeros(3 * page_size, dtype=np.uint8), page_size).any()
    assert nonzero_pages(np.zeros(0, dtype=np.uint8), page_size).size == 0


@given(st.integers(0, 300).flatmap(lambda count: arrays(np.bool_, count)))
def test_runs_are_maximal_and_cover_the_mask(mask: np.ndarray) -> None:
    runs = coalesce(mask)
    listed = np.zeros(len(mask), dtype=np.bool_)
    for run in runs:
        assert run.start < run.stop
        listed[run.start : run.stop] = True
    assert (listed == mask).all()
    assert all(one.stop < other.start for one, other in itertools.pairwise(runs))
