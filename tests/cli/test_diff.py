"""ckptfs diff: files, plain streams and mounts against each other."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.harness import BIN

PAGES = {0: b"first", 5: b"sixth", 6: bytes(4096), 300: b"far", 301: b"farther"}
CHANGED = {0: b"first", 5: b"other", 7: b"new", 301: b"farther"}
RUNS = [(5 * 4096, 4096), (7 * 4096, 4096), (300 * 4096, 4096)]


def diff(*arguments: str | Path, code: int) -> str:
    """What it prints; on stderr there is something for trouble only."""
    done = subprocess.run([BIN / "ckptfs", "diff", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done
    assert bool(done.stderr) == (code == 2), done
    return done.stdout + done.stderr


def write(path: Path, pages: dict[int, bytes], *blocks: Block, plain: bool = False, offset: int = 0) -> Path:
    first = Block("pc.ram", 400, pages, {} if plain else {9: b"old"})
    capabilities = () if plain else ("mapped-ram",)
    MigrationFile([first, *blocks], capabilities=capabilities, stream_offset=offset).write(path)
    return path


def runs(text: str) -> list[tuple[int, int]]:
    return [(run["offset"], run["length"]) for run in json.loads(text)["blocks"][0]["runs"]]


@pytest.mark.parametrize("plain", [(False, False), (True, False), (False, True)], ids=str)
def test_files_and_streams(plain: tuple[bool, bool], tmp_path: Path) -> None:
    a = write(tmp_path / "a", PAGES, plain=plain[0])
    b = write(tmp_path / "b", CHANGED, plain=plain[1])
    found = diff("--json", a, b, code=1)
    assert runs(found) == RUNS
    assert json.loads(found)["blocks"][0]["different-pages"] == 3
    assert diff("-q", a, b, code=1) == ""
    same = write(tmp_path / "same", {**PAGES, 20: bytes(4096)}, plain=plain[1])  # a page of zeros that is stored
    assert diff(a, same, code=0) == "equal: 1 block, 400 pages\n"
    assert diff("-q", a, same, code=0) == ""


def test_words(tmp_path: Path) -> None:
    a = write(tmp_path / "a", PAGES, Block("mine", 1), Block("both", 2))
    b = write(tmp_path / "b", CHANGED, Block("both", 3), offset=4096)
    assert diff(a, f"file:{b},offset=4k", code=1) == (
        "pc.ram: 3 of 400 pages differ\n"
        "          offset        length  address\n"
        "          0x5000        0x1000  -\n"
        "          0x7000        0x1000  -\n"
        "        0x12c000        0x1000  -\n"
        "both: has 8192 bytes in A, and 12288 in B\n"
        "mine: only in A\n"
        "addresses are not known: where machine 'pc-i440fx-10.0' has its RAM is not known: "
        "say it, --map ID@ADDRESS\n"
    )


def test_trouble(tmp_path: Path) -> None:
    a = write(tmp_path / "a", PAGES)
    assert "No such file" in diff(a, tmp_path / "nosuch", code=2)
    assert "no guest's RAM is mounted here" in diff(tmp_path, a, code=2)
    (tmp_path / "junk").write_bytes(b"junk" * 99)
    assert "Not a migration stream" in diff(tmp_path / "junk", a, code=2)
    other = MigrationFile([Block("pc.ram", 25, {})], target_page_bits=16)
    other.write(tmp_path / "other")
    assert "pages of 4096 bytes" in diff(a, tmp_path / "other", code=2)


def test_a_map_by_hand(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", PAGES, Block("d0", 1)), write(tmp_path / "b", CHANGED, plain=True)
    told = ("--map", "pc.ram@0+24k", "--map", "pc.ram@4G:24k", "--map", "d0@8G")
    found = json.loads(diff(a, b, *told, "--json", code=1))
    assert found["addresses"] == "known"
    assert [run["address"] for run in found["blocks"][0]["runs"]] == [
        5 * 4096,
        (4 << 30) + 4096,
        (4 << 30) + 294 * 4096,
    ]
    assert diff(a, b, "--map", "d1@0", code=2) == "map: there is no RAM block 'd1'\n"


def test_mounts(tmp_path: Path, mount: Mount) -> None:
    a = write(tmp_path / "a", PAGES)
    mounted = mount(a, "map=pc.ram@0+24k,map=pc.ram@4G:24k")
    assert diff(mounted.path, a, code=0).startswith("equal: ")
    with (mounted.ram / "pc.ram").open("r+b") as ram:
        for page, content in ((4, b"a"), (5, b"b"), (6, b"c"), (399, b"d")):
            ram.seek(page * 4096)
            ram.write(content)
    found = json.loads(diff(a, mounted.path, "--json", code=1))
    assert [(run["offset"], run["length"], run["address"]) for run in found["blocks"][0]["runs"]] == [
        (4 * 4096, 2 * 4096, 4 * 4096),  # a run is cut where its addresses are
        (6 * 4096, 4096, 4 << 30),
        (399 * 4096, 4096, (4 << 30) + 393 * 4096),
    ]
    moved = json.loads(diff(mounted.path, a, "--map", "pc.ram@1G", "--json", code=1))
    assert moved["blocks"][0]["runs"][-1]["address"] == (1 << 30) + 399 * 4096
    mounted.ctl(f"save {tmp_path}/b")
    assert diff(mounted.path, tmp_path / "b", code=0) == "equal: 1 block, 400 pages\n"
