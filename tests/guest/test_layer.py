import errno
import os
from collections.abc import Iterator

import pytest

from ckptfs.guest.layer import Layer
from tests.doubles.storage import FailingCall, ShortTransfers, open_descriptors

PAGE = 4096


@pytest.fixture
def layer() -> Iterator[Layer]:
    before = open_descriptors()
    layer = Layer("pc.ram", 64, PAGE)
    yield layer
    layer.close()
    assert open_descriptors() == before


def memory_of_layers() -> int:
    """Bytes of memory that all layers of this process take."""
    inodes = {}
    for fd, target in open_descriptors().items():
        if target.startswith("/memfd:ckptfs:"):
            status = os.stat(f"/proc/self/fd/{fd}")
            inodes[status.st_ino] = status.st_blocks * 512
    return sum(inodes.values())


def present(layer: Layer) -> list[int]:
    return [page for page in range(64) if layer.present.test(page)]


def test_memory_is_taken_by_what_is_stored_and_given_back(layer: Layer) -> None:
    empty = memory_of_layers()
    layer.store(3 * PAGE, b"x" * 4 * PAGE)
    assert memory_of_layers() == empty + 4 * PAGE
    assert present(layer) == [3, 4, 5, 6]
    assert layer.view(3, 7) == b"x" * 4 * PAGE
    layer.discard(4, 6)
    assert memory_of_layers() == empty + 2 * PAGE
    assert present(layer) == [3, 6]
    assert layer.view(3, 4) == layer.view(6, 7) == b"x" * PAGE


def test_a_view_outlives_the_layer() -> None:
    layer = Layer("pc.ram", 4, PAGE)
    layer.store(0, b"y" * PAGE)
    view = layer.view(0, 1)
    layer.close()
    assert view == b"y" * PAGE


def test_nothing_is_marked_when_memory_runs_out(layer: Layer) -> None:
    with FailingCall(("pwrite",), 1, errno.ENOSPC).installed(), pytest.raises(OSError, match="injected"):
        layer.store(0, b"x" * PAGE)
    assert present(layer) == []


def test_short_writes_are_finished(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    ShortTransfers(monkeypatch)
    data = os.urandom(5 * PAGE)
    layer.store(PAGE, data)
    assert layer.view(1, 6) == data


@pytest.mark.parametrize("move_pages", [1, 3, 1000])
def test_pages_move_into_another_layer_some_at_a_time(
    layer: Layer, monkeypatch: pytest.MonkeyPatch, move_pages: int
) -> None:
    monkeypatch.setattr("ckptfs.guest.layer._MOVE_LENGTH", move_pages * PAGE)
    layer.store(0, b"lower" * PAGE)  # five pages
    upper = Layer("pc.ram", 64, PAGE)
    for page in (2, 3, 4, 10, 20, 21):
        upper.store(page * PAGE, bytes([page]) * PAGE)
    rounds = 1
    while layer.absorb_some(upper):
        rounds += 1
    assert rounds == -(-6 // move_pages)
    assert present(upper) == []
    upper.close()
    assert present(layer) == [0, 1, 2, 3, 4, 10, 20, 21]
    assert layer.view(0, 2) == (b"lower" * PAGE)[: 2 * PAGE]
    for page in (2, 3, 4, 10, 20, 21):
        assert layer.view(page, page + 1) == bytes([page]) * PAGE


def test_a_layer_may_be_empty() -> None:
    before = open_descriptors()
    Layer("pc.ram", 0, PAGE).close()
    assert open_descriptors() == before


@pytest.mark.parametrize("call", ["memfd_create", "ftruncate"])
def test_a_layer_that_cannot_be_made_leaves_nothing(call: str) -> None:
    before = open_descriptors()
    with FailingCall((call,), 1, errno.ENFILE).installed(), pytest.raises(OSError, match="injected"):
        Layer("pc.ram", 64, PAGE)
    assert open_descriptors() == before
