"""Where a file system lets files share extents, a save writes what was written since, and the rest is shared."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptfs.channels.backing_file import FileSource
from ckptfs.channels.reflink import share
from ckptfs.errors import StorageError
from ckptfs.foreign.content import read_content
from ckptfs.guest.guest import Guest
from ckptfs.guest.saving import save
from tests.doubles.checkpoints import open_base, ram_in, ram_of, save_request, unsummed
from tests.mount.disk import Disk

MiB = 1 << 20
PAGE = 4096
LENGTH = 32 * MiB
CONTENT = np.random.default_rng(1).bytes(LENGTH)


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("disk")
    disk = Disk("xfs", directory / "image", directory / "xfs")
    yield disk.path
    disk.close()


@pytest.fixture
async def guest(xfs: Path) -> Guest:
    """Saved, and then a MiB of it written again, every hundredth page, and some to zeros."""
    guest = Guest.fresh([("pc.ram", LENGTH), ("vga.vram", MiB)])
    block = guest.blocks["pc.ram"]
    await guest.write(block, 0, CONTENT)
    await save(guest, save_request(xfs / "base"))
    await guest.write(block, 5 * MiB + 300, CONTENT[:MiB])
    for page in range(0, LENGTH // PAGE, 100):
        await guest.write(block, page * PAGE, bytes([page % 251 + 1]) * PAGE)
    await guest.write(block, 9 * MiB, bytes(MiB))
    return guest


def stored(directory: Path) -> int:
    """Bytes in use on a file system, once all is written."""
    os.sync()
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


async def test_what_was_not_written_takes_no_space(guest: Guest, xfs: Path) -> None:
    expected = await ram_of(guest)
    before = stored(xfs)
    await save(guest, save_request(xfs / "second"))
    assert stored(xfs) - before < 4 * MiB
    assert await ram_of(guest) == expected
    assert ram_in(xfs / "second") == expected
    assert unsummed(xfs / "second") == 0
    progress = guest.migrations.newest.progress
    assert progress.remaining_pages == 0
    assert progress.normal_pages + progress.zero_pages == progress.total_pages
    assert progress.transferred < 4 * MiB
    # each is a file of its own
    (xfs / "base").write_bytes(b"")
    await save(guest, save_request(xfs / "third"))
    guest.close()
    (xfs / "second").unlink()
    assert ram_in(xfs / "third") == expected
    assert unsummed(xfs / "third") == 0


async def test_of_a_base_without_checksums_what_is_shared_has_none(guest: Guest, xfs: Path) -> None:
    guest.close()
    with (xfs / "base").open("r+b") as file:
        base = read_content(FileSource(file.fileno()))
        file.truncate(base.checkpoint.end_offset)
    guest = Guest.incoming(open_base(xfs / "base"))
    await guest.write(guest.blocks["pc.ram"], 5 * MiB + 300, b"changed")
    await save(guest, save_request(xfs / "second"))
    guest.close()
    assert unsummed(xfs / "second") == (LENGTH >> 16) - 1


async def test_what_is_shared_and_can_not_be_read_has_no_checksum(
    guest: Guest, xfs: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    """Of a window in which some pages were written, the others are read for its checksum alone."""
    expect_log(r"ERROR ckptfs\.guest\.base: pc\.ram: pages \d+ to \d+ can't be read from the checkpoint: ")

    def refused(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    expected = await ram_of(guest)
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", refused)
        await save(guest, save_request(xfs / "second"))
    assert ram_in(xfs / "second") == expected
    assert unsummed(xfs / "second") > 0
    guest.close()


async def test_what_is_wrong_already_does_not_become_right(
    guest: Guest, xfs: Path, expect_log: Callable[[str], None]
) -> None:
    """In a window of which one page was written, another one is damaged: no checksum is better than a new one."""
    expect_log(r"ERROR ckptfs\.guest\.base: pc\.ram: the checksum of pages 192 to 207 is wrong")
    with (xfs / "base").open("r+b") as file:
        block = read_content(FileSource(file.fileno())).checkpoint.blocks[0]
        assert block.pages_offset is not None
        file.seek(block.pages_offset + 194 * PAGE)  # page 200 is written anew
        file.write(b"damage")
    await save(guest, save_request(xfs / "second"))
    guest.close()
    assert unsummed(xfs / "second") == 1


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL])
async def test_where_they_can_not_be_shared_they_are_written(
    guest: Guest, xfs: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    plain_ioctl, calls = fcntl.ioctl, []

    def refused(*args: object) -> object:
        calls.append(args)
        if len(calls) > 5:  # some have worked
            raise OSError(number, os.strerror(number))
        return plain_ioctl(*args)  # type: ignore[call-overload]

    monkeypatch.setattr(fcntl, "ioctl", refused)
    expected = await ram_of(guest)
    await save(guest, save_request(xfs / "second"))
    assert len(calls) == 6
    assert ram_in(xfs / "second") == expected
    assert unsummed(xfs / "second") == 0
    guest.close()


async def test_a_full_disk_fails_the_save(guest: Guest, xfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> object:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fcntl, "ioctl", full)
    expected = await ram_of(guest)
    with pytest.raises(StorageError, match="No space left") as error:
        await save(guest, save_request(xfs / "failed"))
    assert error.value.errno == errno.ENOSPC
    assert await ram_of(guest) == expected
    assert not (xfs / "failed").exists()
    guest.close()


def test_a_file_system_without_shared_extents(tmp_path: Path) -> None:
    disk = Disk("ext4", tmp_path / "image", tmp_path / "ext4")
    paths = [disk.path / "source", disk.path / "target"]
    for path in paths:
        path.write_bytes(bytes(MiB))
    source, target = (os.open(path, os.O_RDWR) for path in paths)
    assert not share(source, 0, MiB, target, 0)
    os.close(source)
    os.close(target)
    disk.close()
