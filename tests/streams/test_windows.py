"""A window of RAM is read as the newest memory has it, whatever lies on top of what."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ckptfs.channels.buffers import AlignedBuffers
from ckptfs.guest.block import BaseBlock, PageStack
from ckptfs.guest.layer import Layer
from ckptfs.guest.outgoing import Epoch, data_windows, read_window
from ckptfs.mapped_ram.bitmap import PagesBitmap

PAGE = 4096
PAGE_COUNT = 600  # two windows of 1 MiB and a part of one

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def pages_of(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What memory ``number`` holds in all pages: each tells the memory and itself."""
    pages = np.zeros((PAGE_COUNT, PAGE), np.uint8)
    pages.view(np.uint64)[:, :] = number << 32
    pages.view(np.uint64)[:, 0] += np.arange(PAGE_COUNT, dtype=np.uint64)
    return pages


@dataclass
class FakeBase:
    """A base whose reads are as Base.fetch gives them: zeros where it has no data."""

    mask: Mask

    async def fetch(self, idstr: str, start: int, stop: int, page_size: int, *, urgent: bool) -> memoryview:
        await trio.lowlevel.checkpoint()
        assert not urgent
        assert idstr == "pc.ram"
        assert self.mask[start]
        assert self.mask[stop - 1]
        return (pages_of(9)[start:stop] * self.mask[start:stop, None]).reshape(-1).data


def bitmap_of(mask: Mask) -> PagesBitmap:
    bitmap = PagesBitmap(PAGE_COUNT)
    bitmap.set_mask(0, mask)
    return bitmap


def layer_of(number: int, mask: Mask) -> Layer:
    layer = Layer("pc.ram", PAGE_COUNT, PAGE)
    for start, stop in bitmap_of(mask).runs():
        layer.store(start * PAGE, pages_of(number)[start:stop].reshape(-1).data)
    return layer


masks = st.one_of(
    arrays(np.bool_, PAGE_COUNT, fill=st.just(False)),
    arrays(np.bool_, PAGE_COUNT, fill=st.just(True)),
    st.sampled_from(
        [np.zeros(PAGE_COUNT, np.bool_), np.ones(PAGE_COUNT, np.bool_), np.arange(PAGE_COUNT) % 2 == 1]
    ),
)


@settings(max_examples=40)
@given(base=st.none() | masks, restored=st.none() | masks, written=st.lists(masks, min_size=1, max_size=2))
def test_every_page_is_that_of_the_newest_memory(
    base: Mask | None, restored: Mask | None, written: list[Mask]
) -> None:
    layers = tuple(layer_of(number, mask) for number, mask in enumerate(written, 1))
    restored_layer = None if restored is None else layer_of(5, restored)
    base_block: Any = None if base is None else BaseBlock(bitmap_of(base), None)  # type: ignore[arg-type]
    stack = PageStack(PAGE_COUNT, layers, restored_layer, base_block)
    epoch: Any = Epoch({"pc.ram": stack}, None if base is None else FakeBase(base))  # type: ignore[arg-type]
    expected = np.zeros((PAGE_COUNT, PAGE), np.uint8)
    for number, mask in [(9, base), (5, restored), *reversed(list(enumerate(written, 1)))]:
        if mask is not None:
            expected[mask] = pages_of(number)[mask]
    with_data = stack.with_data()

    async def read_all() -> np.ndarray[Any, np.dtype[np.uint8]]:
        found = np.zeros((PAGE_COUNT, PAGE), np.uint8)
        buffers = AlignedBuffers()
        for window in data_windows({"pc.ram": with_data}, PAGE):
            data = (await read_window(epoch, window, PAGE, buffers)).reshape(-1, PAGE)
            found[window.start : window.stop][window.mask] = data[window.mask]
        return found

    assert np.array_equal(trio.run(read_all), expected)
    for layer in stack.layers:
        layer.close()


async def test_holes_of_a_layer_take_no_memory_when_they_are_passed_over() -> None:
    layer = layer_of(1, np.arange(PAGE_COUNT) % 2 == 0)
    fd = layer._fd
    blocks = os.fstat(fd).st_blocks
    stack = PageStack(PAGE_COUNT, (layer,), None, None)
    for window in data_windows({"pc.ram": stack.with_data()}, PAGE):
        await read_window(Epoch({"pc.ram": stack}, None), window, PAGE, AlignedBuffers())
    assert os.fstat(fd).st_blocks == blocks
    layer.close()


async def test_a_window_out_of_one_memory_is_not_copied() -> None:
    layer = layer_of(1, np.ones(PAGE_COUNT, np.bool_))
    stack = PageStack(PAGE_COUNT, (layer,), None, None)
    for window in data_windows({"pc.ram": stack.with_data()}, PAGE):
        data = await read_window(Epoch({"pc.ram": stack}, None), window, PAGE, AlignedBuffers())
        assert np.shares_memory(data, np.frombuffer(layer.view(window.start, window.stop), np.uint8))
    del data
    layer.close()
