import errno
import fcntl
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptfs.channels.backing_file import (
    IOV_MAX,
    DirectIO,
    FileSource,
    HandedFile,
    NamedFile,
    OpenedFile,
    pread,
    pread_exactly,
    pwrite_all,
    pwritev_all,
)
from ckptfs.channels.buffers import AlignedBuffers
from ckptfs.errors import StorageError
from tests.doubles.storage import ShortTransfers, open_descriptors, without_direct_io

PAGE = 4096
CONTENT = bytes(range(256)) * 16 * 9  # nine pages, no two bytes of a run alike


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Callable[[bytes], int]]:
    """`open_file(content)` is a descriptor of a new file that holds it."""
    descriptors = []

    def open_file(content: bytes) -> int:
        path = tmp_path / f"file{len(descriptors)}"
        path.write_bytes(content)
        descriptors.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        return descriptors[-1]

    yield open_file
    for fd in descriptors:
        os.close(fd)


@contextmanager
def largest_file(length: int) -> Iterator[None]:
    """Within this the process can write no file beyond ``length`` bytes: a write across it is short, then EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content_of(fd: int) -> bytes:
    return os.pread(fd, 1 << 24, 0)


# --- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [1, 512, PAGE])
def test_short_reads_are_finished(
    open_file: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch, granularity: int
) -> None:
    fd = open_file(CONTENT)
    short = ShortTransfers(monkeypatch, granularity)
    for _ in range(50):
        buffer = memoryview(bytearray(7 * PAGE))
        pread_exactly(fd, buffer, PAGE)
        assert bytes(buffer) == CONTENT[PAGE : 8 * PAGE]
    assert len(short.counts) > 100


def test_short_direct_reads_go_on_at_an_aligned_place(
    open_file: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, is_direct = OpenedFile(open_file(CONTENT), os.O_RDONLY).open_pages(DirectIO(wanted=True))
    assert is_direct
    buffer = AlignedBuffers().take(8 * PAGE)
    whole_preadv = os.preadv
    offsets = []

    def five_hundred_bytes_less(fd: int, views: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        count = whole_preadv(fd, views, offset)
        return count - 500 if count > PAGE else count

    monkeypatch.setattr(os, "preadv", five_hundred_bytes_less)
    pread_exactly(direct, buffer, 0)
    os.close(direct)
    assert bytes(buffer) == CONTENT[: 8 * PAGE]
    assert offsets == [0, 7 * PAGE]


@pytest.mark.parametrize("direct_io", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("length", [0, 1, 700, 2 * PAGE, 2 * PAGE + 700, 3 * PAGE - 1])
def test_a_file_that_ends_too_early_is_an_error_and_never_zeros(
    open_file: Callable[[bytes], int], length: int, direct_io: bool
) -> None:
    fd, _ = OpenedFile(open_file(CONTENT[:length]), os.O_RDONLY).open_pages(DirectIO(direct_io))
    try:
        with pytest.raises(StorageError, match=f"the file ends at byte {length:#x}, inside a page") as error:
            pread_exactly(fd, AlignedBuffers().take(3 * PAGE), 0)
    finally:
        os.close(fd)
    assert error.value.errno == errno.EIO


def test_pread_returns_less_only_at_the_end(
    open_file: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = open_file(CONTENT)
    ShortTransfers(monkeypatch)
    assert pread(fd, 3 * PAGE, 100) == CONTENT[100 : 3 * PAGE + 100]
    assert pread(fd, 3 * PAGE, len(CONTENT) - 100) == CONTENT[-100:]
    assert pread(fd, 10, len(CONTENT) + 5) == b""
    assert pread(fd, 0, 0) == b""


def test_a_source_is_as_long_as_its_file(open_file: Callable[[bytes], int]) -> None:
    source = FileSource(open_file(CONTENT))
    assert source.length == len(CONTENT)
    assert source.pread(5000, 10) == CONTENT[5000:5010]


# --- writing ----------------------------------------------------------------------------------------------


def views_of(data: bytes, lengths: list[int]) -> list[memoryview]:
    views, rest = [], memoryview(data)
    for length in lengths:
        views.append(rest[:length])
        rest = rest[length:]
    assert not rest
    return views


@pytest.mark.parametrize("granularity", [1, 512, PAGE])
def test_short_writes_are_finished(
    open_file: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch, granularity: int
) -> None:
    views = views_of(CONTENT, [PAGE, 3 * PAGE, 0, PAGE, 4 * PAGE])
    descriptors = [open_file(b"") for _ in range(50)]
    short = ShortTransfers(monkeypatch, granularity)
    for fd in descriptors:
        pwritev_all(fd, views, 2 * PAGE)
    monkeypatch.undo()
    assert all(content_of(fd) == bytes(2 * PAGE) + CONTENT for fd in descriptors)
    assert len(short.counts) > 100


def test_more_views_than_one_call_takes_are_written(open_file: Callable[[bytes], int]) -> None:
    fd = open_file(b"")
    views = views_of(bytes(range(256)) * 10, [1] * 2560)
    assert len(views) > 2 * IOV_MAX
    pwritev_all(fd, views, 3)
    assert content_of(fd) == bytes(3) + bytes(range(256)) * 10


def test_short_direct_writes_go_on_at_an_aligned_place(
    open_file: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = open_file(b"")
    direct, is_direct = OpenedFile(plain, os.O_WRONLY).open_pages(DirectIO(wanted=True))
    assert is_direct
    buffer = AlignedBuffers().take(8 * PAGE)
    buffer[:] = CONTENT[: 8 * PAGE]
    whole_pwritev = os.pwritev
    offsets = []

    def five_hundred_bytes_less(fd: int, views: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        count = whole_pwritev(fd, views, offset)
        return count - 500 if count > PAGE else count

    monkeypatch.setattr(os, "pwritev", five_hundred_bytes_less)
    pwritev_all(direct, [buffer[: 3 * PAGE], buffer[3 * PAGE :]], 0)
    os.close(direct)
    assert content_of(plain) == CONTENT[: 8 * PAGE]
    assert offsets == [0, 7 * PAGE]


@pytest.mark.parametrize("limit", [0, 1, 700, PAGE, 2 * PAGE + 512, 3 * PAGE - 1])
def test_a_really_short_write_ends_with_the_errno_of_the_storage(
    open_file: Callable[[bytes], int], limit: int
) -> None:
    fd = open_file(b"")
    with largest_file(limit), pytest.raises(OSError, match="File too large") as error:
        pwritev_all(fd, [memoryview(CONTENT[: 2 * PAGE]), memoryview(CONTENT[2 * PAGE : 3 * PAGE])], 0)
    assert error.value.errno == errno.EFBIG
    assert content_of(fd) == CONTENT[:limit]


@pytest.mark.parametrize("limit", [0, 1, PAGE, len(CONTENT) - 1])
def test_a_really_short_metadata_write_ends_with_the_errno_of_the_storage(
    open_file: Callable[[bytes], int], limit: int
) -> None:
    fd = open_file(b"")
    with largest_file(limit), pytest.raises(OSError, match="File too large"):
        pwrite_all(fd, CONTENT, 0)
    assert content_of(fd) == CONTENT[:limit]


def test_a_full_disk_is_enospc(open_file: Callable[[bytes], int]) -> None:
    del open_file
    full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
    try:
        for write in (lambda: pwritev_all(full, [memoryview(CONTENT)], 0), lambda: pwrite_all(full, CONTENT, 0)):
            with pytest.raises(OSError, match="No space left") as error:
                write()
            assert error.value.errno == errno.ENOSPC
    finally:
        os.close(full)


def test_a_write_of_nothing_is_no_endless_loop(
    open_file: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = open_file(b"")
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: 0)
    with pytest.raises(StorageError, match="nothing could be written at byte 0x1000") as error:
        pwritev_all(fd, [memoryview(CONTENT)], PAGE)
    assert error.value.errno == errno.ENOSPC


def test_short_metadata_writes_are_finished(
    open_file: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = open_file(b"")
    short = ShortTransfers(monkeypatch)
    pwrite_all(fd, CONTENT, 77)
    monkeypatch.undo()
    assert content_of(fd) == bytes(77) + CONTENT
    assert len(short.counts) > 1


# --- descriptors ------------------------------------------------------------------------------------------


def test_pages_go_past_the_page_cache_where_that_is_possible(open_file: Callable[[bytes], int]) -> None:
    fd, direct_io = OpenedFile(open_file(CONTENT), os.O_RDWR).open_pages(DirectIO(wanted=True, required=True))
    try:
        assert direct_io
        assert "O_DIRECT" in flag_names(fd)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_direct_io_that_nobody_wants_is_not_used(open_file: Callable[[bytes], int]) -> None:
    fd, direct_io = OpenedFile(open_file(CONTENT), os.O_RDONLY).open_pages(DirectIO(wanted=False))
    try:
        assert not direct_io
        assert "O_DIRECT" not in flag_names(fd)
    finally:
        os.close(fd)


def test_a_file_system_without_direct_io_is_used_buffered_if_it_was_only_wanted(
    open_file: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = open_file(CONTENT)
    without_direct_io(monkeypatch)
    fd, direct_io = OpenedFile(original, os.O_RDONLY).open_pages(DirectIO(wanted=True))
    try:
        assert not direct_io
        assert os.pread(fd, 10, 0) == CONTENT[:10]
    finally:
        os.close(fd)


def test_a_file_system_without_direct_io_is_refused_if_it_was_required(
    open_file: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = open_file(CONTENT)
    without_direct_io(monkeypatch)
    before = open_descriptors()
    with pytest.raises(StorageError, match="does not support O_DIRECT: set direct-io off") as error:
        OpenedFile(original, os.O_RDONLY).open_pages(DirectIO(wanted=True, required=True))
    assert error.value.errno == errno.EINVAL
    assert open_descriptors() == before


def test_another_error_of_open_is_not_taken_for_a_lack_of_direct_io(
    open_file: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = open_file(CONTENT)

    def out_of_descriptors(*args: object, **kwargs: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", out_of_descriptors)
    with pytest.raises(OSError, match="Too many open files"):
        OpenedFile(original, os.O_RDONLY).open_pages(DirectIO(wanted=True))


def test_a_file_is_opened_again_though_its_name_is_gone() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"nameless")
        file.flush()
        again, _ = OpenedFile(file.fileno(), os.O_RDONLY).open_pages(DirectIO(wanted=False))
        try:
            assert os.pread(again, 100, 0) == b"nameless"
            assert not os.get_inheritable(again)
        finally:
            os.close(again)


def test_of_an_fdset_the_first_descriptor_that_fits_exactly_serves(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    flags = [os.O_RDWR, os.O_RDONLY | os.O_DIRECT, os.O_WRONLY, os.O_RDONLY, os.O_WRONLY | os.O_DIRECT]
    descriptors = tuple(os.open(path, flag | os.O_CLOEXEC) for flag in flags)
    before = open_descriptors()
    try:
        reading, writing = HandedFile(descriptors, os.O_RDONLY), HandedFile(descriptors, os.O_WRONLY)
        assert (access_of(reading.fd), access_of(writing.fd)) == (os.O_RDONLY, os.O_WRONLY)
        for file in (reading, writing):
            for wanted in (True, False):
                fd, direct_io = file.open_pages(DirectIO(wanted, required=True))
                assert direct_io == wanted == ("O_DIRECT" in flag_names(fd))
                assert access_of(fd) == file.access
                assert not os.get_inheritable(fd)
                os.close(fd)
            file.close()
        assert open_descriptors() == before
    finally:
        for fd in descriptors:
            os.close(fd)


def test_an_fdset_without_a_descriptor_that_fits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    for_both, for_reading = os.open(path, os.O_RDWR | os.O_CLOEXEC), os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(StorageError, match="matching flags=0x0") as error:
            HandedFile((for_both,), os.O_RDONLY)
        assert error.value.errno == errno.EACCES
        file = HandedFile((for_both, for_reading), os.O_RDONLY)
        with pytest.raises(StorageError, match="matching flags=0x4000"):
            file.open_pages(DirectIO(wanted=True, required=True))
        fd, direct_io = file.open_pages(DirectIO(wanted=True))
        assert not direct_io
        os.close(fd)
        file.close()
    finally:
        os.close(for_both)
        os.close(for_reading)


def test_a_named_descriptor_serves_for_pages_too(open_file: Callable[[bytes], int]) -> None:
    buffered = open_file(CONTENT)
    for wanted in (True, False):
        pages_fd, direct_io = NamedFile(buffered).open_pages(DirectIO(wanted))
        assert not direct_io
        assert not os.get_inheritable(pages_fd)
        os.close(pages_fd)
    with pytest.raises(StorageError, match="opened without O_DIRECT") as error:
        NamedFile(buffered).open_pages(DirectIO(wanted=True, required=True))
    assert error.value.errno == errno.EINVAL


def access_of(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def flag_names(fd: int) -> set[str]:
    with open(f"/proc/self/fdinfo/{fd}") as fdinfo:
        flags = int(next(line for line in fdinfo if line.startswith("flags:")).split()[1], 8)
    return {name for name in ("O_DIRECT", "O_APPEND") if flags & getattr(os, name)}
