"""A storage that gives no answer: whoever asks is told so by the one deadline, and what is owed is remembered."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ckptfs.channels.channels import NoAnswerError
from ckptfs.guest.base import BadPagesError, Base
from ckptfs.guest.guest import Guest
from tests.doubles.checkpoints import fill, open_base
from tests.doubles.migration_file import Block, MigrationFile

PAGE = 4096
PAGES = {page: bytes([page + 1]) * PAGE for page in range(32)}
GOLDEN = fill(32, PAGES)


class SilentReads:
    """`os.preadv` that gives no answer for ``pages`` until `speak`; ``asked`` has the first page of every read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pages: set[int] = set()
        self.pages_offset = 0
        self.asked: list[int] = []
        self.arrived = threading.Semaphore(0)
        self._speaks = threading.Event()
        plain_preadv = os.preadv

        def preadv(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
            page = (offset - self.pages_offset) // PAGE
            self.asked.append(page)
            if self.pages & set(range(page, page + sum(map(len, buffers)) // PAGE)):
                self.arrived.release()
                self._speaks.wait()
            return plain_preadv(fd, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", preadv)

    def speak(self) -> None:
        self._speaks.set()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> SilentReads:
    return SilentReads(monkeypatch)


@pytest.fixture
def guest(tmp_path: Path, reads: SilentReads, nothing_stays_open: None) -> Iterator[Guest]:
    path = tmp_path / "golden"
    MigrationFile(blocks=[Block("pc.ram", 32, PAGES)]).write(path)
    guest = Guest.incoming(open_base(path, channel_count=2, deadline=10))
    reads.pages_offset = base_of(guest).checkpoint.blocks[0].pages_offset or 0
    yield guest
    reads.speak()
    guest.close()


def base_of(guest: Guest) -> Base:
    assert guest.base is not None
    return guest.base


async def read(guest: Guest, start: int, stop: int) -> bytes:
    return bytes(await guest.read(guest.blocks["pc.ram"], start * PAGE, (stop - start) * PAGE))


async def no_answer_for(guest: Guest, start: int, stop: int) -> None:
    with pytest.raises(NoAnswerError, match="no answer in 10 s") as error:
        await read(guest, start, stop)
    assert error.value.errno == errno.EIO


async def wait_for_silence(guest: Guest, reads: SilentReads, clock: MockClock) -> None:
    """Have pages 4 to 11 asked for until their deadline has passed."""
    reads.pages = {5}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(no_answer_for, guest, 4, 12)
        await trio.to_thread.run_sync(reads.arrived.acquire)
        await wait_all_tasks_blocked()
        clock.jump(10)


async def test_what_is_owed_is_not_asked_for_again(
    guest: Guest, reads: SilentReads, mock_clock: MockClock, expect_log: Callable[[str], None]
) -> None:
    expect_log(r"ERROR ckptfs\.channels\.channels: .*/golden: the storage has not answered for 10 s")
    expect_log(r"ERROR ckptfs\.guest\.base: pc\.ram: pages 4 to 11 can't be read from the checkpoint: .* no answer")
    await wait_for_silence(guest, reads, mock_clock)
    for start, stop in ((4, 12), (5, 6), (11, 12), (0, 5), (11, 20)):
        await no_answer_for(guest, start, stop)
    assert reads.asked == [4]
    (late,) = base_of(guest).unanswered
    assert (late.idstr, late.start, late.stop) == ("pc.ram", 4, 12)
    # others are asked for: the storage may answer again
    assert await read(guest, 12, 14) == GOLDEN[12 * PAGE : 14 * PAGE]
    await no_answer_for(guest, 5, 6)
    reads.speak()
    await late.returned.wait()
    assert not base_of(guest).unanswered
    assert await read(guest, 4, 12) == GOLDEN[4 * PAGE : 12 * PAGE]
    assert not guest.readers.bad_pages


@pytest.mark.parametrize(
    ("number", "is_of_single_pages"),
    [
        (errno.EIO, True),
        (errno.ENODATA, True),
        (errno.ESTALE, False),
        (errno.ETIMEDOUT, False),
        (errno.ENOENT, False),
    ],
)
async def test_an_error_of_the_whole_file_is_not_looked_for_page_by_page(
    guest: Guest,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
    number: int,
    is_of_single_pages: bool,
) -> None:
    expect_log(r"ERROR ckptfs\.guest\.base: pc\.ram: page\(s\) \[.*\] can't be read from the checkpoint: ")
    calls = []

    def failing(*args: object) -> int:
        calls.append(args)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(BadPagesError, match=os.strerror(number)) as error:
        await read(guest, 4, 12)
    assert error.value.pages == list(range(4, 12))
    assert len(calls) == (9 if is_of_single_pages else 1)


async def test_nobody_looks_for_bad_pages_once_nobody_waits(
    guest: Guest, reads: SilentReads, mock_clock: MockClock, expect_log: Callable[[str], None]
) -> None:
    expect_log(r"ERROR ckptfs\.channels\.channels: .*/golden: the storage has not answered for 10 s")
    expect_log(r"ERROR ckptfs\.guest\.base: pc\.ram: pages 4 to 11 can't be read from the checkpoint: .* no answer")
    await wait_for_silence(guest, reads, mock_clock)
    os.truncate(base_of(guest).path, reads.pages_offset + 6 * PAGE)  # so that the read fails when it comes back
    (late,) = base_of(guest).unanswered
    reads.speak()
    await late.returned.wait()
    assert reads.asked == [4, 6]  # what was cut short went on, and no page was asked for by itself
