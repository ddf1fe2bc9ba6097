"""What mount.ckptfs refuses: one line that names the thing, and mount(8)'s exit code, and nothing is mounted."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.doubles.migration_file import Block, MigrationFile, be64
from tests.mount.conftest import Mount
from tests.mount.harness import is_mounted, run_mount

USAGE, MOUNT_FAILURE = 1, 32

SMALL = MigrationFile(
    blocks=[Block("pc.ram", 70, {0: b"first", 69: b"last"}), Block("vga.vram", 1, {0: b"vga"})], alignment=4096
)


def refused(spec: str | Path, directory: Path, *options: str, code: int = MOUNT_FAILURE) -> str:
    """Mount, see that it was refused in one line, and return that."""
    result = run_mount(spec, directory, *options)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("mount.ckptfs: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


# --- files that are no checkpoint, or lie -----------------------------------------------------------------

LIES = [
    ("used_length", "pc.ram.used_length", be64(1 << 62), "used_length"),
    ("total", "total", be64((1 << 61) | 4), "bytes of RAM are more than"),
    ("page_size", "pc.ram.page_size", be64(0), "page_size 0"),
    ("regions overlap", "vga.vram.pages_offset", be64(4096), "before the end of the bitmap"),
    ("pages past the end", "pc.ram.pages_offset", be64(1 << 62), "the file ends at"),
    ("bitmap past the last page", "pc.ram.bitmap", b"\xff" * 16, "past the last page"),
    ("name of 0 bytes", "pc.ram", b"\0", "name is empty"),
]


@pytest.mark.parametrize(("mark", "data", "text"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_file_that_lies(mark: str, data: bytes, text: str, mount_point: Path, tmp_path: Path) -> None:
    path = tmp_path / "liar"
    content, marks = SMALL.build()
    path.write_bytes(content[: marks[mark]] + data + content[marks[mark] + len(data) :])
    line = refused(path, mount_point)
    assert line.startswith(f"mount.ckptfs: {path}: at byte 0x")
    assert text in line


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "at byte 0x0: "),
        (b"junk" * 1000, "at byte 0x0: Not a migration stream"),
        (bytes(100), "at byte 0x0: "),
        (gzip.compress(SMALL.data()), "at byte 0x0: Not a migration stream: this is a gzip file: unpack it"),
    ],
    ids=["empty", "junk", "zeros", "packed"],
)
def test_no_checkpoint(content: bytes, text: str, mount_point: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    line = refused(path, mount_point)
    assert f"{path}: " in line
    assert text in line


@pytest.mark.parametrize("mark", ["version", "pc.ram.bitmap", "vga.vram.used_length", "timer"])
def test_cut_short(mark: str, mount_point: Path, tmp_path: Path) -> None:
    path = tmp_path / "short"
    content, marks = SMALL.build()
    path.write_bytes(content[: marks[mark] + 1])
    assert f"{path}: at byte 0x" in refused(path, mount_point)


def test_a_billion_pages_in_a_small_file(mount_point: Path, tmp_path: Path) -> None:
    path = tmp_path / "billion"
    content, marks = SMALL.build()
    data = bytearray(content)
    data[marks["total"] : marks["total"] + 8] = be64((10**9 + 1) * 4096 | 4)
    data[marks["pc.ram.used_length"] : marks["pc.ram.used_length"] + 8] = be64(10**9 * 4096)
    path.write_bytes(data)
    line = refused(path, mount_point)
    assert f"{path}: at byte 0x" in line


def test_names_are_no_paths(tmp_path: Path, mount: Mount) -> None:
    # A name is only a name: such a file is served, below ram/ and nowhere else.
    path = tmp_path / "dots"
    names = ["../../x", "..", ".", "/etc/passwd", "a%2Fb"]
    MigrationFile(blocks=[Block(name, 1, {0: name.encode()}) for name in names]).write(path)
    mounted = mount(path)
    files = {file.name: file.read_bytes().rstrip(b"\0") for file in mounted.ram.iterdir()}
    assert files == {
        "%2E.%2F..%2Fx": b"../../x",
        "%2E.": b"..",
        "%2E": b".",
        "%2Fetc%2Fpasswd": b"/etc/passwd",
        "a%252Fb": b"a%2Fb",
    }


@pytest.mark.parametrize(
    "make",
    [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink("nowhere", path)],
    ids=["directory", "FIFO", "device", "dangling link"],
)
def test_not_a_regular_file(make: Callable[[Path], None], mount_point: Path, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    make(path)
    assert str(path) in refused(path, mount_point)


def test_a_wrong_offset(mount_point: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    MigrationFile(stream_offset=4097).write(path)
    assert "at byte 0x1000: Not a migration stream" in refused(f"file:{path},offset=4k", mount_point)
    assert "at byte 0x0: " in refused(path, mount_point)
    assert "0x100000000" in refused(path, mount_point, "image_offset=4G")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("file:{},offset=0x20M", "file URI has bad offset 0x20M: Invalid argument"),
        ("file:{},offset=", "file URI has bad offset : Invalid argument"),
        ("file:{},offset=4k,x=1", "file URI has bad offset 4k,x=1: Invalid argument"),
        ("file:{},offset=16E", "file URI has bad offset 16E: Numerical result out of range"),
        ("file:{},offset=8E", "is outside of any file"),
        ("FILE:{}", "unknown migration protocol: FILE:"),
        ("tcp:host:4444", "transport 'socket' is not supported"),
        ("exec:cat {}", "transport 'exec' is not supported"),
        ("file:", "the file name is empty"),
        ("file:/dev/fdset/x", "Could not parse fdset /dev/fdset/x"),
    ],
)
def test_a_wrong_uri(spec: str, text: str, mount_point: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    SMALL.write(path)
    assert text in refused(spec.format(path), mount_point, code=USAGE)


# --- SPEC and ram= ----------------------------------------------------------------------------------------


def test_a_checkpoint_is_never_shadowed(mount_point: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    SMALL.write(path)
    content = path.read_bytes()
    line = refused(path, mount_point, "ram=pc.ram:16M")
    assert f"{path}: " in line
    assert "ram=" in line
    assert path.read_bytes() == content


def test_no_file_and_no_ram(mount_point: Path, tmp_path: Path) -> None:
    line = refused(tmp_path / "missing", mount_point)
    assert f"{tmp_path / 'missing'}: no such file" in line
    assert "ram=" in line


# --- options and arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("nosuch", "'nosuch'"),
        ("multifd_chanels=4", "multifd_channels"),
        ("ram=pc.ram:1.5", "bad size"),
        ("ram=pc.ram:0x20M", "bad size"),
        ("ram=a:1M,ram=a:1M", "given twice"),
        ("multifd_channels=0", "between 1 and 255"),
        ("umask=999", "octal"),
        ("ram=pc.ram:1M,shared=pc.ram:/dev/shm/ram", "shared=pc.ram:/dev/shm/ram"),
        ("shared=vga.vram:/dev/shm/ram,ram=pc.ram:1M", "shared=vga.vram:/dev/shm/ram"),
    ],
)
def test_wrong_options(option: str, text: str, mount_point: Path, tmp_path: Path) -> None:
    line = refused(tmp_path / "checkpoint", mount_point, option, code=USAGE)
    assert text in line


@pytest.mark.parametrize("size", ["1M,ram=b:4097", "17T"])
def test_sizes_that_no_block_can_have(size: str, mount_point: Path, tmp_path: Path) -> None:
    line = refused(tmp_path / "checkpoint", mount_point, f"ram=a:{size}")
    assert "size" in line


def test_a_sloppy_mount_passes_over_what_it_does_not_know(mount_point: Path, tmp_path: Path) -> None:
    result = run_mount(tmp_path / "checkpoint", mount_point, "nosuch,ram=pc.ram:1M", flags=("-s", "-f"))
    assert (result.returncode, result.stderr) == (0, "")
    assert not is_mounted(mount_point)


def test_wrong_arguments() -> None:
    assert run_mount("one", "two", flags=("three",)).returncode == USAGE
    for words in ("", "two"), ("one", ""):  # the present directory is no mount point by mistake
        assert "is a variable of your script not set?" in run_mount(*words, "ram=pc.ram:1M").stderr


def test_no_mount_point(tmp_path: Path) -> None:
    SMALL.write(tmp_path / "checkpoint")
    result = run_mount(tmp_path / "checkpoint", tmp_path / "nowhere")
    assert result.returncode == MOUNT_FAILURE
    assert str(tmp_path / "nowhere") in result.stderr
    assert "not a directory" in run_mount(tmp_path / "checkpoint", tmp_path / "checkpoint").stderr
