"""The plan of a save: chunks, zero pages, runs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.migration.outgoing import CHUNK_PAGES, coalesce, nonzero_pages, page_chunks

PAGE_SIZE = 4096


@given(st.integers(1, 5 * CHUNK_PAGES).flatmap(lambda count: arrays(np.bool_, count)))
def test_chunks_are_the_set_pages_in_aligned_windows(mask: np.ndarray) -> None:
    pages = PagesBitmap(len(mask))
    pages.set_mask(0, mask)
    chunks = list(page_chunks(pages))
    listed = np.zeros(len(mask), dtype=np.bool_)
    for chunk in chunks:
        windows = {page // CHUNK_PAGES for run in chunk for page in (run.start, run.stop - 1)}
        assert len(windows) == 1
        for start, stop in chunk:
            assert not listed[start:stop].any()
            listed[start:stop] = True
    assert (listed == mask).all()
    assert [chunk[0].start // CHUNK_PAGES for chunk in chunks] == sorted({*(np.flatnonzero(mask) // CHUNK_PAGES)})
    assert CHUNK_PAGES % 64 == 0


def test_no_pages_are_no_chunks() -> None:
    assert list(page_chunks(PagesBitmap(1000))) == []


def test_a_huge_block_costs_nothing_until_asked() -> None:
    pages = PagesBitmap(1 << 30)
    pages.set(0, 1 << 30)
    assert next(page_chunks(pages)) == (Run(0, CHUNK_PAGES),)


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
