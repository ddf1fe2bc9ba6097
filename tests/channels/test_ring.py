"""Reads that the kernel carries out by itself, and what becomes of those that it can't."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from ckptfs.channels import ring as ring_module
from ckptfs.channels.backing_file import DirectIO, OpenedFile
from ckptfs.channels.buffers import AlignedBuffers
from ckptfs.channels.channels import Channel, Channels
from ckptfs.channels.ring import PlainRead, Ring, ring_of_this_run
from ckptfs.errors import StorageError

PAGE = 4096

pytestmark = pytest.mark.usefixtures("nothing_stays_open")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OpenedFile]:
    """A file of two and a half pages, of a's, b's and c's."""
    path = tmp_path / "pages"
    path.write_bytes(b"a" * PAGE + b"b" * PAGE + b"c" * (PAGE // 2))
    file = OpenedFile(os.open(path, os.O_RDONLY), os.O_RDONLY)
    yield file
    file.close()


async def read(fd: int, plain: PlainRead) -> int:
    """Have the ring read; return what it tells."""
    ring = ring_of_this_run()
    assert ring is not None
    results: list[int] = []
    ended = trio.Event()
    ring.begin(fd, plain, lambda result: (results.append(result), ended.set()))
    await ended.wait()
    (result,) = results
    return result


@pytest.mark.parametrize("direct_io", [False, True])
async def test_a_buffer_is_filled(file: OpenedFile, direct_io: bool) -> None:
    fd, _ = file.open_pages(DirectIO(direct_io))
    buffer = AlignedBuffers().take(PAGE)
    assert await read(fd, PlainRead(buffer, PAGE)) == PAGE
    assert bytes(buffer) == b"b" * PAGE
    os.close(fd)


async def test_more_reads_than_the_queues_have_places(file: OpenedFile) -> None:
    buffer = AlignedBuffers().take(PAGE)
    for number in range(2000):
        assert await read(file.fd, PlainRead(buffer, number % 2 * PAGE)) == PAGE
        assert buffer[0] == b"ab"[number % 2]


async def test_an_error_is_told(file: OpenedFile) -> None:
    assert await read(-1, PlainRead(AlignedBuffers().take(PAGE), 0)) == -errno.EBADF


async def test_many_at_a_time(file: OpenedFile) -> None:
    buffers = AlignedBuffers()

    async def check(number: int) -> None:
        buffer = buffers.take(PAGE)
        assert await read(file.fd, PlainRead(buffer, number % 2 * PAGE)) == PAGE
        assert bytes(buffer) == b"ab"[number % 2 :][:1] * PAGE

    async with trio.open_nursery() as nursery:
        for number in range(64):
            nursery.start_soon(check, number)


async def test_a_channel_has_its_plain_read_done_by_the_kernel(file: OpenedFile) -> None:
    channels = Channels.open(file, DirectIO(False), 1)
    buffer = AlignedBuffers().take(PAGE)

    def never(channel: Channel) -> None:
        raise AssertionError("the kernel has filled the buffer")

    assert await channels.fill(PlainRead(buffer, PAGE), never) is None
    assert bytes(buffer) == b"b" * PAGE
    channels.close()


async def test_the_thread_does_what_the_kernel_could_not(file: OpenedFile) -> None:
    channels = Channels.open(file, DirectIO(False), 1)
    buffer = AlignedBuffers().take(PAGE)

    def fill(channel: Channel) -> None:
        channel.pread_exactly(buffer, 2 * PAGE)

    with pytest.raises(StorageError, match="the file ends at byte 0x2800, inside a page that it lists"):
        await channels.fill(PlainRead(buffer, 2 * PAGE), fill)
    assert await channels.carry(lambda channel: "in service again") == "in service again"
    channels.close()


async def test_a_storage_that_does_not_answer_holds_nobody_up(file: OpenedFile) -> None:
    """A socket stands for it: reading from it waits."""
    ours, theirs = socket.socketpair()
    buffer = AlignedBuffers().take(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, ours.fileno(), PlainRead(buffer, 0))
        other = AlignedBuffers().take(PAGE)
        assert await read(file.fd, PlainRead(other, 0)) == PAGE
        theirs.send(b"!")
    assert bytes(buffer) == b"!"
    ours.close()
    theirs.close()


async def test_where_there_is_no_ring_threads_read(file: OpenedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Ring) -> None:
        raise OSError(errno.EPERM, "refused")

    monkeypatch.setattr(ring_module.Ring, "__init__", refused)
    channels = Channels.open(file, DirectIO(False), 1)
    plain = PlainRead(AlignedBuffers().take(PAGE), 0)
    assert await channels.fill(plain, lambda channel: "by a thread") == "by a thread"
    channels.close()


async def test_where_the_kernel_takes_no_more_reads_threads_read(
    file: OpenedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(Ring, "begin", refuse)
    channels = Channels.open(file, DirectIO(False), 1)
    buffer = AlignedBuffers().take(PAGE)
    assert await channels.fill(PlainRead(buffer, PAGE), lambda channel: channel.pread_exactly(buffer, PAGE)) is None
    assert bytes(buffer) == b"b" * PAGE
    await channels.aclose()
