"""ckptfs map: a picture of pages, in letters, in colours, and in files."""

import os
import pty
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ckptfs.api.memory import open_memory
from ckptfs.api.picture import COLOURS, Kind, draw, parts_of
from tests.cli.conftest import RunCkptfs
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.disk import Disk
from tests.mount.harness import BIN

PAGES = {**dict.fromkeys(range(64), b"x"), 199: b"last"}


def write(path: Path, pages: dict[int, bytes], count: int = 200) -> Path:
    MigrationFile([Block("pc.ram", count, pages), Block("vga.vram", 2)]).write(path)
    return path


def kinds(a: Path, b: Path | None = None, columns: int = 100, rows: int = 9) -> list[list[int]]:
    with open_memory(str(a)) as memory:
        if b is None:
            picture = draw("", parts_of(memory), columns, rows)
        else:
            with open_memory(str(b)) as other:
                picture = draw("", parts_of(memory, other), columns, rows)
    return [row.kinds.tolist() for row in picture.rows]


def test_letters(tmp_path: Path) -> None:
    path = write(tmp_path / "ckpt", PAGES)
    done = subprocess.run(
        [BIN / "ckptfs", "map", path],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "81"},
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"{path}"[:78],
        "pc.ram",
        f"          0x0 {'#' * 64}",
        f"      0x40000 {'.' * 64}",
        f"      0x80000 {'.' * 64}",
        "      0xc0000 .......#",
        "vga.vram",
        "          0x0 ..",
        "",
        ". zeros 137   # in the checkpoint 65   202 pages; a cell is 4 KiB",
    ]


def test_a_difference_and_its_scale(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", PAGES), write(tmp_path / "b", {**PAGES, 5: b"y", 150: b"new"})
    first, second, *_ = kinds(a, b)
    assert [index for index, kind in enumerate(first + second) if kind == Kind.DIFFERENT] == [5, 150]
    assert first[:3] == [Kind.EQUAL] * 3
    assert kinds(a, b, columns=10, rows=2)[0] == [5, 4, 0, 0, 5, 0, 0]  # cells of 32 pages
    longer = write(tmp_path / "longer", PAGES, count=201)
    assert kinds(longer, a, columns=300)[0][199:] == [Kind.EQUAL, Kind.DIFFERENT]


def test_by_address(tmp_path: Path, mount: Mount) -> None:
    mounted = mount(write(tmp_path / "ckpt", PAGES), "map=pc.ram@0+256k,map=pc.ram@1M+256k:256k,map=pc.ram@1G:512k")
    with (mounted.ram / "pc.ram").open("r+b") as ram:
        ram.seek(150 * 4096)
        ram.write(b"written")
    with open_memory(str(mounted.path)) as memory:
        below, above = parts_of(memory)
        assert (below.start, above.start) == (0, 1 << 30)
        assert below.kinds.tolist() == [Kind.STORED] * 64 + [Kind.NOTHING] * 192 + [Kind.ZERO] * 64
        assert np.flatnonzero(above.kinds == Kind.WRITTEN).tolist() == [150 - 128]


def test_a_map_by_hand(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    ckpt = write(tmp_path / "ckpt", PAGES)
    printed = run_ckptfs("map", ckpt, "--map", "pc.ram@1M").stdout
    assert "\n     0x100000 ####" in printed
    assert "map: there is no RAM block 'x'" in run_ckptfs("map", ckpt, "--map", "x@0", code=2).stderr


def test_files(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    a, b = write(tmp_path / "a", PAGES), write(tmp_path / "b", {**PAGES, 5: b"y"})
    run_ckptfs("map", a, b, "-o", tmp_path / "out.png")
    (tmp_path / "link.svg").symlink_to(tmp_path / "out.svg")
    run_ckptfs("map", a, b, "-o", tmp_path / "link.svg")
    pixels = np.asarray(Image.open(tmp_path / "out.png"))
    red = (pixels == COLOURS[Kind.DIFFERENT]).all(axis=2)
    assert red.sum() == 4 * 4 + 11 * 11  # the cell, and its place in the legend
    root = ElementTree.parse(tmp_path / "out.svg").getroot()
    assert root.attrib["width"] == str(pixels.shape[1])
    rectangles = [one.attrib["fill"] for one in root if one.tag.endswith("rect")]
    assert rectangles.count("#eb4646") == 2
    assert "different 1" in [one.text for one in root if one.tag.endswith("text")]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out.svg").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_file_is_whole_or_as_it_was(kind: str, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    pages = dict.fromkeys(range(0, 4096, 3), b"x")
    a = write(tmp_path / "a", pages, count=4096)
    disk = Disk("tmpfs", tmp_path / "image", tmp_path / "small", 8 << 10)
    out = disk.path / f"out.{kind}"
    try:
        out.write_text("former")
        (disk.path / "other").write_bytes(bytes(4096))  # no page is left for a second file
        said = run_ckptfs("map", a, "-o", out, code=1).stderr
        assert said == f"{out}: No space left on device\n"
        assert out.read_text() == "former"
        assert sorted(os.listdir(disk.path)) == ["other", f"out.{kind}"]
    finally:
        disk.close()


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["-o", "out.jpg"], 2, "name it .png or .svg"),
        (["--watch", "-o", "out.svg"], 2, "--watch: of one mount"),
        (["--watch"], 2, "--watch is for a mount"),
    ],
)
def test_what_is_not_drawn(
    arguments: Sequence[str], code: int, problem: str, tmp_path: Path, run_ckptfs: RunCkptfs
) -> None:
    assert problem in run_ckptfs("map", write(tmp_path / "a", PAGES), *arguments, code=code).stderr


def test_it_follows_a_mount_until_it_is_gone(tmp_path: Path, mount: Mount) -> None:
    mounted = mount(write(tmp_path / "ckpt", PAGES))
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80", "LINES": "24"}
    watch = subprocess.Popen([BIN / "ckptfs", "map", "--watch", mounted.path], stdout=theirs, env=environment)
    os.close(theirs)
    said = b""
    while b"read 1" not in said:
        part = os.read(ours, 1 << 16)
        if b"in the checkpoint 65" in said + part:
            with (mounted.ram / "pc.ram").open("rb") as ram:
                ram.seek(199 * 4096)
                ram.read(1)
        said = (said + part)[-(1 << 16) :]
    mounted.umount()
    while True:
        try:
            os.read(ours, 1 << 16)
        except OSError:  # it has ended
            break
    os.close(ours)
    assert watch.wait() == 0
