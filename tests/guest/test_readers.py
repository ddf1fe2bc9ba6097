"""What status tells of readers: who waits, what could not be read, and when."""

import contextlib

import trio
from trio.testing import MockClock

from ckptfs.guest.base import BadPagesError
from ckptfs.guest.readers import BAD_PAGES_KEPT, Readers


async def test_the_first_byte_is_the_first(mock_clock: MockClock) -> None:
    readers = Readers()
    assert readers.first_byte_at is readers.full_at is None
    mock_clock.jump(1)
    readers.note_served()
    first = trio.current_time()
    mock_clock.jump(1)
    readers.note_served()
    readers.note_full()
    assert (readers.first_byte_at, readers.full_at) == (first, first + 1)


def test_a_reader_waits_until_his_read_ends_or_fails() -> None:
    readers = Readers()
    with readers.wait():
        with contextlib.suppress(OSError), readers.wait():
            assert readers.waiting == 2
            raise OSError
        assert readers.waiting == 1
    assert readers.waiting == 0


def test_the_first_bad_pages_are_kept() -> None:
    readers = Readers()
    for start in (0, 40):
        readers.note_bad_pages(BadPagesError("pc.ram", dict.fromkeys(range(start, start + 40), "bad sector")))
    assert [page for _, page in readers.bad_pages] == list(range(BAD_PAGES_KEPT))
    assert readers.bad_pages["pc.ram", 63].endswith("can't be read: bad sector")
