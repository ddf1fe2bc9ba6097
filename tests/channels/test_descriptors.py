import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs.channels.backing_file import DirectIO, NamedFile
from ckptfs.channels.descriptors import Descriptors, describe_address
from ckptfs.channels.target import HandedTarget
from ckptfs.errors import CommandError, StorageError
from ckptfs.migration.address import FdAddress, FileMigrationArgs

FDSET = FileMigrationArgs("/dev/fdset/7", 0)
BUFFERED = DirectIO(wanted=False)

pytestmark = pytest.mark.usefixtures("nothing_stays_open")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"prefix" + b"former" * 1000)
    return path


@pytest.fixture
def fds(path: Path) -> Iterator[dict[str, int]]:
    """Descriptors of the file, as somebody else opened them, by how."""
    flags = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}
    fds = {name: os.open(path, flag | os.O_CLOEXEC) for name, flag in flags.items()}
    yield fds
    for fd in fds.values():
        os.close(fd)


def test_a_path_is_not_handed(fds: dict[str, int]) -> None:
    assert Descriptors({7: [fds["r"]]}, {}).open(FileMigrationArgs("/somewhere", 0), os.O_RDONLY) is None


def test_an_fdset_and_a_name_are_found(fds: dict[str, int]) -> None:
    descriptors = Descriptors({7: [fds["w"], fds["r"]]}, {"both": fds["rw"]})
    for address in (FDSET, FdAddress("both")):
        file = descriptors.open(address, os.O_RDONLY)
        assert file is not None
        assert file.fd not in fds.values()  # a duplicate of our own
        assert os.pread(file.fd, 6, 0) == b"prefix"
        file.close()


@pytest.mark.parametrize(
    ("address", "access", "message", "code"),
    [
        (FileMigrationArgs("/dev/fdset/8", 0), os.O_RDONLY, "/dev/fdset/8: no such fdset", errno.ENOENT),
        (FDSET, os.O_RDONLY, "/dev/fdset/7: Failed to find file descriptor with matching flags=0x0", errno.EACCES),
        (FdAddress("nobody"), os.O_RDONLY, "fd:nobody: no descriptor of that name", errno.ENOENT),
        (FdAddress("writer"), os.O_RDONLY, "fd:writer: the descriptor was not opened for reading", errno.EACCES),
        (FdAddress("reader"), os.O_WRONLY, "fd:reader: the descriptor was not opened for writing", errno.EACCES),
    ],
)
def test_what_does_not_fit_is_named(
    fds: dict[str, int], address: FileMigrationArgs | FdAddress, access: int, message: str, code: int
) -> None:
    descriptors = Descriptors({7: [fds["w"], fds["rw"]]}, {"writer": fds["w"], "reader": fds["r"]})
    with pytest.raises(StorageError, match=message) as error:
        descriptors.open(address, access)
    assert error.value.errno == code


def test_a_number_that_is_no_descriptor_is_named() -> None:
    Descriptors({1: [0]}, {"name": 1}).check()
    with pytest.raises(CommandError, match="fdset=3: 99999 is not an open descriptor"):
        Descriptors({1: [0], 3: [1, 99999]}).check()
    with pytest.raises(CommandError, match="fd=name: 99999 is not an open descriptor"):
        Descriptors({}, {"name": 99999}).check()


def test_an_address_is_described_as_it_was_written() -> None:
    assert describe_address(FDSET) == "/dev/fdset/7"
    assert describe_address(FdAddress("name")) == "fd:name"


# --- writing into a handed file ---------------------------------------------------------------------------


def write_into(target: HandedTarget, stream_offset: int) -> None:
    target.keep_prefix()
    os.pwrite(target.file.fd, b"pages", stream_offset + 100)
    target.seal(stream_offset, b"QEVM")


def test_a_handed_file_is_written_in_place_and_its_header_last(
    path: Path, fds: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = HandedTarget(FileMigrationArgs("/dev/fdset/7", 6), 6, Descriptors({7: [fds["w"], fds["r"]]}))
    at_sync = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: at_sync.append(path.read_bytes()))
    write_into(target, 6)
    target.publish()
    whole = b"prefix" + b"QEVM".ljust(100, b"\0") + b"pages"
    assert at_sync == [whole.replace(b"QEVM", bytes(4)), whole]
    assert path.read_bytes() == whole


def test_what_was_written_is_read_back_through_a_handed_descriptor(fds: dict[str, int]) -> None:
    target = HandedTarget(FDSET, 0, Descriptors({7: [fds["w"], fds["r"]]}))
    write_into(target, 0)
    reader = target.reader()
    assert reader is not None
    assert os.pread(reader.fd, 4, 0) == b"QEVM"
    pages_fd, _ = reader.open_pages(BUFFERED)
    assert os.pread(pages_fd, 5, 100) == b"pages"
    os.close(pages_fd)
    reader.close()
    target.publish()
    target.discard()  # it was published: nothing is closed twice


def test_a_descriptor_for_writing_alone_is_opened_again_if_that_is_allowed(
    fds: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = HandedTarget(FdAddress("writer"), 0, Descriptors({}, {"writer": fds["w"]}))
    assert isinstance(target.file, NamedFile)
    write_into(target, 0)
    reader = target.reader()
    assert reader is not None
    assert os.pread(reader.fd, 4, 0) == b"QEVM"
    reader.close()

    def refused(*args: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refused)
        assert target.reader() is None
    target.discard()


def test_a_handed_file_that_is_given_up_is_no_checkpoint(path: Path, fds: dict[str, int]) -> None:
    target = HandedTarget(FileMigrationArgs("/dev/fdset/7", 6), 6, Descriptors({7: [fds["w"]]}))
    target.keep_prefix()
    os.pwrite(target.file.fd, b"pages", 106)
    target.discard()
    assert path.read_bytes() == b"prefix"
