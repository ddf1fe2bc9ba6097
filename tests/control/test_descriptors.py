"""Descriptors that somebody else opened: `file:/dev/fdset/ID` by QEMU's rule of matching, and `fd:NAME`."""

import errno
import os
from pathlib import Path

import pytest

from tests.control.descriptors import FIRST, Handed, fdset_option, mount_inheriting, open_on
from tests.control.faults import failures
from tests.control.footprint import footprint
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import Mounted, run_mount

MiB = 1 << 20
MOUNT_FAILURE = 32
PAGES = {page: b"page %d" % page for page in (*range(100), *range(300, 400))}
RAM = b"".join(PAGES.get(page, b"").ljust(4096, b"\0") for page in range(512))
DIRECT = os.O_WRONLY | os.O_DIRECT


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", 512, PAGES)]).write(path)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.touch()
    return path


def inheriting(mount: Mount, spec: str | Path, *files: Handed, options: tuple[str, ...] = ()) -> Mounted:
    return mount(spec, fdset_option(*files), *options, program=mount_inheriting(*files))


# --- which descriptor serves ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "setting", "direct_io"),
    [
        ([os.O_WRONLY], "off", "off"),
        ([os.O_WRONLY, DIRECT], "on", "on"),
        ([DIRECT, os.O_WRONLY], "on", "on"),
        ([os.O_RDONLY, os.O_RDWR, os.O_WRONLY], "off", "off"),
        ([os.O_WRONLY, os.O_WRONLY], "off", "off"),
    ],
    ids=str,
)
def test_the_first_that_matches_serves(
    flags: list[int], setting: str, direct_io: str, checkpoint: Path, target: Path, mount: Mount
) -> None:
    files = [Handed(target, flag) for flag in flags]
    mounted = inheriting(mount, checkpoint, *files, options=("multifd_channels=3",))
    before = open_on(mounted.pid, target)
    mounted.ctl(f"migrate_set_parameter direct-io {setting}")
    mounted.ctl("migrate file:/dev/fdset/1")
    assert mounted.status()["direct-io"] == direct_io
    assert decode(target).blocks["pc.ram"].tobytes() == RAM
    mounted.ctl("restore")
    assert open_on(mounted.pid, target) == before


@pytest.mark.parametrize(
    ("flags", "setting", "wanted"),
    [
        ([os.O_RDWR], "off", "0x1"),
        ([os.O_RDONLY], "off", "0x1"),
        ([DIRECT], "off", "0x1"),
        ([os.O_WRONLY], "on", "0x4001"),
        ([os.O_WRONLY, os.O_RDWR | os.O_DIRECT], "on", "0x4001"),
    ],
    ids=str,
)
def test_none_that_matches(
    flags: list[int], setting: str, wanted: str, checkpoint: Path, target: Path, mount: Mount
) -> None:
    mounted = inheriting(mount, checkpoint, *(Handed(target, flag) for flag in flags))
    before = footprint(mounted.pid)
    mounted.ctl(f"migrate_set_parameter direct-io {setting}")
    with pytest.raises(OSError, match=f"matching flags={wanted}") as caught:
        mounted.ctl("migrate file:/dev/fdset/1")
    assert caught.value.errno == errno.EACCES
    assert mounted.status()["migration"]["status"] == "failed"
    assert footprint(mounted.pid) == before
    assert (mounted.ram / "pc.ram").read_bytes() == RAM


def test_direct_io_that_nobody_asked_for_by_name_is_done_without(
    checkpoint: Path, target: Path, mount: Mount
) -> None:
    mounted = inheriting(mount, checkpoint, Handed(target, os.O_WRONLY))
    mounted.ctl("migrate file:/dev/fdset/1")
    assert mounted.status()["direct-io"].startswith("off: ")


def test_a_mount_from_a_set(checkpoint: Path, mount: Mount) -> None:
    files = [Handed(checkpoint, os.O_RDONLY), Handed(checkpoint, os.O_RDONLY | os.O_DIRECT)]
    mounted = inheriting(mount, "file:/dev/fdset/1", *files)
    assert mounted.status()["direct-io"] == "on"
    assert (mounted.ram / "pc.ram").read_bytes() == RAM
    mounted.ctl("restore")
    assert sum(open_on(mounted.pid, checkpoint).values()) == 2


@pytest.mark.parametrize("option", ["fdset=1:77", "fd=ck:77"])
def test_a_number_that_is_no_descriptor(option: str, checkpoint: Path, mount_point: Path) -> None:
    result = run_mount(checkpoint, mount_point, option)
    assert result.returncode == MOUNT_FAILURE
    assert "77 is not an open descriptor of this process" in result.stderr


# --- fd:NAME ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR], ids=oct)
def test_a_mount_from_a_named_descriptor(flags: int, checkpoint: Path, mount: Mount) -> None:
    file = Handed(checkpoint, flags)
    mounted = mount("fd:vm", f"fd=vm:{FIRST}", program=mount_inheriting(file))
    assert (mounted.ram / "pc.ram").read_bytes() == RAM
    mounted.ctl("restore")
    assert sum(open_on(mounted.pid, checkpoint).values()) == 1


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR], ids=oct)
def test_a_save_to_a_named_descriptor(flags: int, checkpoint: Path, target: Path, mount: Mount) -> None:
    mounted = mount(checkpoint, f"fd=out:{FIRST}", program=mount_inheriting(Handed(target, flags)))
    mounted.ctl("migrate fd:out")
    assert decode(target).blocks["pc.ram"].tobytes() == RAM
    mounted.ctl("restore")
    assert sum(open_on(mounted.pid, target).values()) == 1


def test_a_save_to_a_descriptor_for_reading(checkpoint: Path, target: Path, mount: Mount) -> None:
    mounted = mount(checkpoint, f"fd=in:{FIRST}", program=mount_inheriting(Handed(target, os.O_RDONLY)))
    with pytest.raises(OSError, match=r"fd:in: the descriptor was not opened for writing") as caught:
        mounted.ctl("migrate fd:in")
    assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize("flags", [DIRECT, os.O_RDWR | os.O_DIRECT], ids=oct)
def test_a_named_descriptor_with_direct_io(flags: int, checkpoint: Path, target: Path, mount: Mount) -> None:
    mounted = mount(checkpoint, f"fd=out:{FIRST}", program=mount_inheriting(Handed(target, flags)))
    with pytest.raises(OSError, match=r"fd:out: the descriptor was opened with O_DIRECT") as caught:
        mounted.ctl("migrate fd:out")
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("path", ["/dev/full", "/dev/null"])
def test_what_can_not_be_truncated(path: str, checkpoint: Path, mount: Mount) -> None:
    mounted = inheriting(mount, checkpoint, Handed(Path(path), os.O_WRONLY))
    text = r"/dev/fdset/1: failed to truncate migration file to offset 0x0: Invalid argument"
    with pytest.raises(OSError, match=text) as caught:
        mounted.ctl("migrate file:/dev/fdset/1")
    assert caught.value.errno == errno.EINVAL


def test_an_empty_mount_is_filled_from_a_descriptor(checkpoint: Path, mount: Mount) -> None:
    mounted = mount("none", f"fd=vm:{FIRST}", program=mount_inheriting(Handed(checkpoint, os.O_RDONLY)))
    mounted.ctl("migrate_incoming fd:vm")
    assert (mounted.ram / "pc.ram").read_bytes() == RAM


# --- in place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "option", "flags"),
    [
        ("file:/dev/fdset/1", f"fdset=1:{FIRST}:{FIRST + 1}", [os.O_RDONLY, os.O_WRONLY]),
        ("fd:vm", f"fd=vm:{FIRST}", [os.O_RDWR]),
    ],
)
def test_what_is_being_restored_is_not_overwritten(
    spec: str, option: str, flags: list[int], checkpoint: Path, mount: Mount
) -> None:
    content = checkpoint.read_bytes()
    mounted = mount(spec, option, program=mount_inheriting(*(Handed(checkpoint, flag) for flag in flags)))
    with pytest.raises(OSError, match="is the file that RAM is restored from") as caught:
        mounted.ctl("save")
    assert caught.value.errno == errno.EBUSY
    assert checkpoint.read_bytes() == content
    mounted.ctl("restore")
    with (mounted.ram / "pc.ram").open("r+b") as file:
        file.write(b"written")
    mounted.ctl("save")
    assert decode(checkpoint).blocks["pc.ram"].tobytes() == b"written".ljust(4096, b"\0") + RAM[4096:]
    assert (mounted.ram / "pc.ram").read_bytes()[4096:] == RAM[4096:]


@pytest.mark.parametrize(
    ("call", "error"),
    [("fcntl", "EMFILE"), ("ftruncate", "EIO"), ("pwritev2", "ENOSPC"), ("pwrite64", "EIO"), ("fdatasync", "EIO")],
)
def test_a_save_to_a_set_in_which_a_call_fails(
    call: str, error: str, checkpoint: Path, target: Path, mount: Mount, tmp_path: Path
) -> None:
    files = [Handed(target, os.O_WRONLY), Handed(target, DIRECT)]
    mounted = inheriting(mount, checkpoint, *files, options=("multifd_channels=2",))
    before = footprint(mounted.pid)
    for noticed in failures(mounted, tmp_path / "strace", "migrate file:/dev/fdset/1", call, error):
        if noticed is None:
            break
        assert footprint(mounted.pid) == before
        assert target.read_bytes() == b""
        assert (mounted.ram / "pc.ram").read_bytes() == RAM
    mounted.ctl("restore")  # what was saved at last is the base
    mounted.ctl("migrate file:/dev/fdset/1")
    assert decode(target).blocks["pc.ram"].tobytes() == RAM
    assert sum(open_on(mounted.pid, target).values()) == 2
