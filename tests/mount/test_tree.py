"""The files of a mount, as a user sees them."""

import errno
import json
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import Mounted

PAGE = 4096
MiB = 1 << 20
BLOCKS = [
    Block("pc.ram", 512, {0: b"first", 1: b"second", 300: b"far"}, stale={2: b"stale", 400: b"stale"}),
    Block("/rom@etc/acpi/tables", 2, {1: b"acpi"}),
]


@pytest.fixture
def incoming(mount: Mount, tmp_path: Path) -> Mounted:
    path = tmp_path / "checkpoint"
    MigrationFile(blocks=BLOCKS).write(path)
    return mount(path)


def test_what_is_there(incoming: Mounted) -> None:
    names = {str(path.relative_to(incoming.path)) for path in incoming.path.rglob("*")}
    assert {
        "ctl",
        "status",
        "status.json",
        "ram/pc.ram",
        "ram/%2From@etc%2Facpi%2Ftables",
        "pages/pc.ram",
        "pages/%2From@etc%2Facpi%2Ftables",
        "parameters/multifd-channels",
        "capabilities/mapped-ram",
    } <= names
    for path in incoming.path.rglob("*"):
        status = path.lstat()
        assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
        assert stat.S_IMODE(status.st_mode) & 0o077 == 0


def test_sizes_and_what_is_stored(incoming: Mounted) -> None:
    ram = (incoming.ram / "pc.ram").stat()
    assert (ram.st_size, ram.st_blocks) == (512 * PAGE, 3 * PAGE // 512)
    assert (incoming.path / "pages/pc.ram").stat().st_size == 512
    with (incoming.ram / "pc.ram").open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 10 * PAGE)
        os.pwrite(file.fileno(), b"x", 0)  # is stored already
        assert os.stat(file.fileno()).st_blocks * 512 == 4 * PAGE
    total = os.statvfs(incoming.path)
    assert total.f_blocks * total.f_frsize == 514 * PAGE
    assert (total.f_blocks - total.f_bfree) * total.f_frsize == 5 * PAGE


def test_stale_bytes_under_clear_bits_read_as_zeros(incoming: Mounted) -> None:
    ram = (incoming.ram / "pc.ram").read_bytes()
    expected = bytearray(512 * PAGE)
    for page, content in BLOCKS[0].pages.items():
        expected[page * PAGE : page * PAGE + len(content)] = content
    assert ram == expected


def test_pages_tell_how_each_page_stands(incoming: Mounted) -> None:
    def pages() -> dict[int, int]:
        states = (incoming.path / "pages/pc.ram").read_bytes()
        return {page: state for page, state in enumerate(states) if state}

    assert pages() == {0: 1, 1: 1, 300: 1}
    fd = os.open(incoming.ram / "pc.ram", os.O_RDWR | os.O_DIRECT)  # no read-ahead
    try:
        page = mmap.mmap(-1, PAGE)
        os.preadv(fd, [page], PAGE)
        assert pages() == {0: 1, 1: 2, 300: 1}
        os.pwritev(fd, [page], 7 * PAGE)
        os.pwritev(fd, [page], 300 * PAGE)
        assert pages() == {0: 1, 1: 2, 7: 3, 300: 3}
    finally:
        os.close(fd)
    assert (incoming.path / "pages/pc.ram").read_bytes()[300:301] == b"\3"
    incoming.ctl("save")
    assert pages() == {0: 1, 1: 2, 7: 2, 300: 2}


def test_extended_attributes(incoming: Mounted) -> None:
    path = incoming.ram / "%2From@etc%2Facpi%2Ftables"
    attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    assert attributes["user.ckptfs.idstr"] == b"/rom@etc/acpi/tables"
    assert attributes["user.ckptfs.page_size"] == b"4096"
    assert attributes["user.ckptfs.page_count"] == b"2"
    assert attributes["user.ckptfs.checkpoint_pages"] == b"1"
    with pytest.raises(OSError, match="No data available"):
        os.getxattr(path, "user.ckptfs.nosuch")
    assert os.listxattr(incoming.path / "ctl") == []


def test_status_and_status_json_say_the_same(incoming: Mounted) -> None:
    text = (incoming.path / "status").read_text()
    lines = dict(line.split(" ", 1) for line in text.splitlines())
    document = json.loads((incoming.path / "status.json").read_text())
    assert lines["state"] == document["state"] == "idle"
    assert lines["page-count"] == str(document["page-count"]) == "514"
    assert lines["zero-pages"] == str(document["zero-pages"]) == "510"
    assert [block["idstr"] for block in document["blocks"]] == ["pc.ram", "/rom@etc/acpi/tables"]
    assert [(incoming.path / block["file"]).stat().st_size for block in document["blocks"]] == [
        512 * PAGE,
        2 * PAGE,
    ]


def test_the_size_of_an_incoming_block_is_fixed(incoming: Mounted) -> None:
    incoming.expect_log(r"truncate was refused to process \d+: pc\.ram: has 2097152 bytes, and keeps that size")
    for length in (0, PAGE, MiB << 10):
        with pytest.raises(PermissionError) as caught:
            os.truncate(incoming.ram / "pc.ram", length)
        assert caught.value.errno == errno.EPERM
    os.truncate(incoming.ram / "pc.ram", 512 * PAGE)  # as it is
    with pytest.raises(PermissionError):
        (incoming.ram / "new").write_bytes(b"")
    assert (incoming.ram / "pc.ram").read_bytes().startswith(b"first")


def test_opening_with_o_trunc_takes_nothing_away(incoming: Mounted) -> None:
    incoming.expect_log(r"O_TRUNC was refused to process \d+: pc\.ram: somebody has it open or mapped")
    with (incoming.ram / "pc.ram").open("r+b") as file:
        shared = mmap.mmap(file.fileno(), PAGE)
    shared[:7] = b"written"
    with pytest.raises(OSError, match="busy"):  # it is mapped, though closed
        (incoming.ram / "pc.ram").open("wb")
    assert shared[:7] == b"written"
    shared.close()
    assert (incoming.ram / "pc.ram").read_bytes().startswith(b"written")


def test_truncate_makes_a_block_of_a_fresh_guest(fresh: Mounted, tmp_path: Path) -> None:
    path = fresh.ram / "vga.vram"
    path.touch()
    fresh.expect_log("size 8388609 is not a multiple of the page size")
    with pytest.raises(OSError, match="Invalid argument"):
        os.truncate(path, 8 * MiB + 1)
    os.truncate(path, 8 * MiB)
    assert path.stat().st_size == 8 * MiB
    with path.open("r+b") as file:
        file.write(b"vga")
    fresh.ctl("save")
    blocks = decode(tmp_path / "checkpoint").blocks
    assert {idstr: len(ram) for idstr, ram in blocks.items()} == {"pc.ram": 16 * MiB, "vga.vram": 8 * MiB}
    assert blocks["vga.vram"][:4].tobytes() == b"vga\0"


def test_a_block_that_never_got_a_size_can_be_removed(fresh: Mounted, tmp_path: Path) -> None:
    slip = fresh.ram / "slip"
    slip.touch()
    with pytest.raises(OSError, match=r"has no pages: give it a size .*, or rm it"):
        fresh.ctl("save")
    with slip.open("rb"), pytest.raises(OSError, match="busy") as caught:
        slip.unlink()
    assert caught.value.errno == errno.EBUSY
    slip.unlink()
    assert [path.name for path in fresh.ram.iterdir()] == ["pc.ram"]
    assert [path.name for path in (fresh.path / "pages").iterdir()] == ["pc.ram"]
    assert not slip.exists()
    for name, length in (("vga.vram", MiB), ("slip", 2 * MiB)):
        (fresh.ram / name).touch()
        os.truncate(fresh.ram / name, length)
    with pytest.raises(PermissionError):
        slip.unlink()
    fresh.ctl("save")
    with pytest.raises(PermissionError):
        slip.unlink()
    sizes = {idstr: len(ram) for idstr, ram in decode(tmp_path / "checkpoint").blocks.items()}
    assert sizes == {"pc.ram": 16 * MiB, "vga.vram": MiB, "slip": 2 * MiB}


def test_ram_ends_where_it_ends(fresh: Mounted) -> None:
    with (fresh.ram / "pc.ram").open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), b"abcd", 16 * MiB - 2) == 2
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(file.fileno(), b"abcd", 16 * MiB)
        assert os.pread(file.fileno(), 100, 16 * MiB - 2) == b"ab"
        assert os.pread(file.fileno(), 100, 16 * MiB) == b""


CHANGES = {
    "a file": lambda path: (path / "file").touch(),
    "mkdir": lambda path: (path / "folder").mkdir(),
    "mkdir in ram": lambda path: (path / "ram/folder").mkdir(),
    "rmdir": lambda path: (path / "pages").rmdir(),
    "rm": lambda path: (path / "ram/pc.ram").unlink(),
    "rm ctl": lambda path: (path / "ctl").unlink(),
    "mv": lambda path: (path / "ram/pc.ram").rename(path / "ram/other"),
    "mv over another": lambda path: (path / "status").replace(path / "ctl"),
    "mv a folder": lambda path: (path / "ram").rename(path / "memory"),
    "ln": lambda path: (path / "ram/other").hardlink_to(path / "ram/pc.ram"),
    "ln -s": lambda path: (path / "ram/other").symlink_to("pc.ram"),
    "mknod": lambda path: os.mknod(path / "ram/other", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "mkfifo": lambda path: os.mkfifo(path / "ram/other"),
    "chmod": lambda path: (path / "ctl").chmod(0o777),
    "chown": lambda path: os.chown(path / "ram/pc.ram", 1, 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_else_can_be_made_or_removed(change: Callable[[Path], None], standing: Mounted) -> None:
    before = sorted(standing.path.rglob("*"))
    with pytest.raises(OSError, match="Operation not permitted") as caught:
        change(standing.path)
    assert caught.value.errno == errno.EPERM
    assert sorted(standing.path.rglob("*")) == before


@pytest.mark.parametrize(
    "use",
    [os.stat, os.mkdir, os.unlink, lambda path: os.open(path, os.O_RDWR | os.O_CREAT)],
    ids=["stat", "mkdir", "unlink", "open"],
)
@pytest.mark.parametrize("folder", ["", "ram"])
def test_a_name_that_is_too_long(folder: str, use: Callable[[Path], None], standing: Mounted) -> None:
    with pytest.raises(OSError, match="File name too long") as caught:
        use(standing.path / folder / ("x" * 256))
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(FileNotFoundError):
        os.stat(standing.path / folder / ("x" * 255))


def test_extended_attributes_of_others_are_not_supported(standing: Mounted) -> None:
    path = standing.ram / "pc.ram"
    with pytest.raises(OSError, match="not supported"):
        os.setxattr(path, "user.mine", b"x")
    with pytest.raises(OSError, match="not supported"):
        os.removexattr(path, "user.ckptfs.idstr")


def test_settings_are_files(fresh: Mounted) -> None:
    channels = fresh.path / "parameters/multifd-channels"
    assert channels.read_text() == "4\n"
    channels.write_text("8\n")
    assert channels.read_text() == "8\n"
    with pytest.raises(OSError, match="Invalid argument"):
        channels.write_text("256\n")
    assert channels.read_text() == "8\n"
    bandwidth = fresh.path / "parameters/max-bandwidth"
    bandwidth.write_text("100M")
    assert bandwidth.read_text() == f"{100 * MiB}\n"
    mapped_ram = fresh.path / "capabilities/mapped-ram"
    assert mapped_ram.read_text() == "on\n"
    multifd = fresh.path / "capabilities/multifd"
    multifd.write_text("off\n")
    assert multifd.read_text() == "off\n"
    with pytest.raises(OSError, match="Invalid argument"):
        multifd.write_text("perhaps\n")


def test_every_way_to_reach_ram_sees_the_same(fresh: Mounted) -> None:
    length = 64 * PAGE
    content = np.random.default_rng(1).integers(0, 256, length, np.uint8).tobytes()
    path = fresh.ram / "pc.ram"
    direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    with path.open("r+b", buffering=0) as file:
        shared = mmap.mmap(file.fileno(), length)
        private = mmap.mmap(file.fileno(), length, mmap.MAP_PRIVATE)
        shared[:] = content
        shared.flush()
        os.fsync(file.fileno())
        assert os.pread(file.fileno(), length, 0) == content
        assert private[:] == content
        buffer = mmap.mmap(-1, length)
        assert os.preadv(direct, [buffer], 0) == length
        assert buffer[:] == content
        private[:5] = b"mine!"
        assert shared[:5] == content[:5]
        buffer[:] = content[::-1]
        assert os.pwritev(direct, [buffer], 0) == length
        assert shared[:] == content[::-1]
        assert os.pread(file.fileno(), length, 0) == content[::-1]
    os.close(direct)
