import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import RunCkptfs
from tests.doubles.migration_file import Block, Device, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.harness import BIN
from tests.qemu.stock_checkpoint import StockCheckpoints

SMALL = MigrationFile(
    blocks=[Block("pc.ram", 300, {0: b"first", 299: b"last"}, stale={1: b"old"}), Block("vga.vram", 1)],
    alignment=4096,
)
PLAIN = MigrationFile(blocks=SMALL.blocks, capabilities=())


def written(tmp_path: Path, file: MigrationFile) -> Path:
    path = tmp_path / "checkpoint"
    file.write(path)
    return path


def test_a_file_in_words(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    path = written(tmp_path, SMALL)
    stored = path.stat().st_blocks * 512 // 1024
    end = path.stat().st_size
    assert run_ckptfs("info", path).stdout == (
        f"{path}: mapped-ram checkpoint, complete\n"
        "machine  pc-i440fx-10.0, paused\n"
        f"stream   bytes 0x0 to {end:#x} of {end:#x}, {stored} KiB stored\n"
        "RAM block        size       pages        data        zero\n"
        "pc.ram      1.172 MiB         300           2         298\n"
        "vga.vram        4 KiB           1           0           1\n"
        "devices  2: timer, globalstate\n"
    )


def test_a_file_as_json(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    path = written(tmp_path, SMALL)
    data, marks = SMALL.build()
    assert json.loads(run_ckptfs("info", "--json", path).stdout) == {
        "file": str(path),
        "format": "mapped-ram",
        "complete": True,
        "machine": "pc-i440fx-10.0",
        "run-state": "paused",
        "uuid": None,
        "capabilities": ["mapped-ram"],
        "offset": 0,
        "end": len(data),
        "length": len(data),
        "stored": path.stat().st_blocks * 512,
        "page-size": 4096,
        "blocks": [
            {
                "idstr": "pc.ram",
                "page-size": 4096,
                "used-length": 300 * 4096,
                "present": True,
                "page-count": 300,
                "data-pages": 2,
                "zero-pages": 298,
                "bitmap-offset": marks["pc.ram.bitmap"],
                "pages-offset": marks["pc.ram.page.0"],
            },
            {
                "idstr": "vga.vram",
                "page-size": 4096,
                "used-length": 4096,
                "present": True,
                "page-count": 1,
                "data-pages": 0,
                "zero-pages": 1,
                "bitmap-offset": marks["vga.vram.bitmap"],
                "pages-offset": -(-(marks["vga.vram.bitmap"] + 8) // 4096) * 4096,
            },
        ],
        "devices": [
            {"idstr": "timer", "instance": 0, "version": 2, "offset": marks["timer"], "payload-length": 24},
            {
                "idstr": "globalstate",
                "instance": 0,
                "version": 1,
                "offset": marks["globalstate"],
                "payload-length": 104,
            },
        ],
        "device-state-length": len(data) - marks["device_state"],
        "vmdesc": "whole",
        "trailer": {"problem": None, "entries": [], "machine": None},
        "checksums": None,
        "libvirt": None,
    }


@pytest.mark.parametrize("how", [{}, {"multifd": 4, "direct_io": True}, {"offset": 0x1001}], ids=str)
def test_what_stock_qemu_saved(
    how: dict[str, Any], stock_checkpoint: StockCheckpoints, run_ckptfs: RunCkptfs
) -> None:
    checkpoint = stock_checkpoint(**how)
    document = json.loads(run_ckptfs("info", checkpoint.path, "--offset", f"{checkpoint.offset}", "--json").stdout)
    blocks = {block["idstr"]: block for block in document["blocks"]}
    devices = [device["idstr"] for device in document["devices"]]
    assert document["complete"]
    assert document["machine"].startswith("pc-i440fx-")
    assert document["run-state"] == "paused"
    assert document["end"] == document["length"] == checkpoint.path.stat().st_size
    assert {"pc.ram", "0000:00:02.0/vga.vram", "/rom@etc/acpi/tables"} < set(blocks)
    assert blocks["pc.ram"]["used-length"] == 128 << 20
    assert 1000 < blocks["pc.ram"]["data-pages"] < blocks["pc.ram"]["page-count"]
    assert {"timer", "cpu", "serial", "globalstate"} < set(devices)


def test_an_offset_in_qemus_words(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    path = written(tmp_path, MigrationFile(stream_offset=0x1001))
    assert "stream   bytes 0x1001 to" in run_ckptfs("info", "--offset", "0x1001", path).stdout
    line = run_ckptfs("info", "--offset", "4k", path, code=1).stderr
    found = "a stream begins at byte 0x1001: say so, as in file:PATH,offset=0x1001"
    assert line == f"{path}: at byte 0x1000: Not a migration stream: {found}\n"


@pytest.mark.parametrize("file", [SMALL, PLAIN], ids=["mapped-ram", "precopy"])
def test_the_uuid(file: MigrationFile, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    uuid = "550e8400-e29b-41d4-a716-446655440000"
    path = written(tmp_path, replace(file, uuid=bytes.fromhex(uuid.replace("-", ""))))
    lines = run_ckptfs("info", path).stdout.splitlines()
    assert lines[1:3] == ["machine  pc-i440fx-10.0, paused", f"uuid     {uuid}"]
    assert json.loads(run_ckptfs("info", "--json", path).stdout)["uuid"] == uuid


def test_a_plain_stream(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    path = written(tmp_path, PLAIN)
    assert run_ckptfs("info", path).stdout.startswith(f"{path}: precopy checkpoint, complete\n")
    document = json.loads(run_ckptfs("info", "--json", path).stdout)
    assert document["format"] == "precopy"
    assert [(block["data-pages"], block["zero-pages"]) for block in document["blocks"]] == [(2, 298), (0, 1)]
    assert document["blocks"][0]["pages-offset"] is None


@pytest.mark.parametrize(
    ("capabilities", "kind"), [(("x-ignore-shared",), "precopy"), (("x-ignore-shared", "mapped-ram"), "mapped-ram")]
)
def test_a_block_that_is_not_in_the_file(
    capabilities: tuple[str, ...], kind: str, tmp_path: Path, run_ckptfs: RunCkptfs
) -> None:
    blocks = [Block("pc.ram", 300, ignored=True), Block("vga.vram", 1)]
    path = written(tmp_path, MigrationFile(blocks=blocks, capabilities=capabilities))
    lines = run_ckptfs("info", path).stdout.splitlines()
    assert lines[0] == f"{path}: {kind} checkpoint, without the RAM of pc.ram"
    assert "pc.ram      1.172 MiB         300           -           -" in lines
    assert not json.loads(run_ckptfs("info", "--json", path).stdout)["complete"]


def test_devices_that_cannot_be_told_apart(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    path = written(tmp_path, MigrationFile(footers=False, vmdesc=False))
    document = json.loads(run_ckptfs("info", "--json", path).stdout)
    assert document["devices"] is None
    last = run_ckptfs("info", path).stdout.splitlines()[-1]
    assert last == f"devices  {document['device-state-length']} bytes whose sections can't be told apart"


def test_a_file_cut_inside_its_vmdesc(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    path = written(tmp_path, SMALL)
    os.truncate(path, path.stat().st_size - 1)
    lines = run_ckptfs("info", path).stdout.splitlines()
    what = "cut short inside its vmdesc: RAM and devices are whole, and QEMU loads it"
    assert lines[0] == f"{path}: mapped-ram checkpoint, {what}"
    assert lines[-1] == "devices  2: timer, globalstate"
    document = json.loads(run_ckptfs("info", "--json", path).stdout)
    assert (document["complete"], document["vmdesc"]) == (False, "cut")


def test_devices_of_one_name_are_counted(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    devices = [Device("apic", bytes(8), instance_id=instance) for instance in range(4)]
    path = written(tmp_path, MigrationFile(devices=[*devices, Device("dma", b"")]))
    assert run_ckptfs("info", path).stdout.endswith("devices  5: apic (4), dma\n")


def test_names_do_nothing_to_a_terminal(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    blocks = [Block("\x1b[2J", 1), Block("\udcff", 1)]
    path = written(tmp_path, MigrationFile(blocks=blocks, machine="\x07\n"))
    for arguments in (["info"], ["info", "--json"]):
        text = run_ckptfs(*arguments, path).stdout
        assert all(character.isprintable() for character in text.replace("\n", ""))
        assert "x1b[2J" in text


# --- files that are no checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "at byte 0x0: Not a migration stream"),
        (b"junk" * 2000, "at byte 0x0: Not a migration stream"),
        (SMALL.data()[:3000], "at byte 0x"),
        (SMALL.data()[: SMALL.build()[1]["vmdesc"] - 50], "at byte 0x"),
        (PLAIN.data()[:5000], "at byte 0x"),
    ],
    ids=["empty", "junk", "cut in its header", "cut in its devices", "plain and cut"],
)
def test_no_checkpoint(content: bytes, text: str, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for arguments in (["info"], ["info", "--json"]):
        assert run_ckptfs(*arguments, path, code=1).stderr.startswith(f"{path}: {text}")


def test_what_is_no_file(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    nothing = tmp_path / "nothing"
    assert run_ckptfs("info", nothing, code=1).stderr == f"{nothing}: No such file or directory\n"
    assert run_ckptfs("info", pipe, code=1).stderr == f"{pipe}: is not a regular file, so it is no checkpoint\n"
    assert run_ckptfs("info", tmp_path, code=1).stderr == f"{tmp_path}: no guest's RAM is mounted here\n"


def test_wrong_usage(run_ckptfs: RunCkptfs) -> None:
    result = run_ckptfs("info", "file", "--offset", "3x", code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("ckptfs info: argument --offset: bad size '3x'")


def test_several_files(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    first, second, none = tmp_path / "first", tmp_path / "second", tmp_path / "none"
    SMALL.write(first)
    PLAIN.write(second)
    none.write_bytes(b"junk")
    alone = [run_ckptfs("info", path).stdout for path in (first, second)]
    assert run_ckptfs("info", first, second).stdout == "\n".join(alone)
    described = json.loads(run_ckptfs("info", "--json", first, second).stdout)
    assert described == [json.loads(run_ckptfs("info", "--json", path).stdout) for path in (first, second)]
    result = subprocess.run([BIN / "ckptfs", "info", none, first], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, alone[0])
    assert result.stderr.startswith(f"{none}: at byte 0x0: Not a migration stream")


def test_a_block_device(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    path = written(tmp_path, SMALL)
    end = path.stat().st_size
    os.truncate(path, 9 << 20)
    with loop_device(path) as device:
        lines = run_ckptfs("info", device).stdout.splitlines()
        document = json.loads(run_ckptfs("info", "--json", device).stdout)
    assert lines[2] == f"stream   bytes 0x0 to {end:#x} of 0x900000"
    assert (document["end"], document["length"], document["stored"]) == (end, 9 << 20, None)


@contextmanager
def loop_device(path: Path) -> Iterator[str]:
    """A block device whose content is a file's."""
    device = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=True)
    try:
        yield device.stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", device.stdout.strip()], check=True)


def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    devices = [Device(f"device {number}", b"") for number in range(4000)]  # more text than a pipe holds
    path = written(tmp_path, MigrationFile(devices=devices))
    result = subprocess.run(
        f"{BIN}/ckptfs info {path} | head -n 1", shell=True, capture_output=True, text=True, timeout=60
    )
    assert (result.stdout, result.stderr) == (f"{path}: mapped-ram checkpoint, complete\n", "")


# --- mounts -----------------------------------------------------------------------------------------------


def test_a_mount_in_words(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    path = written(tmp_path, SMALL)
    mounted = mount(path)
    with (mounted.ram / "pc.ram").open("r+b") as ram:
        ram.seek(4096)
        ram.write(b"written")
    assert run_ckptfs("info", mounted.path).stdout == (
        f"{mounted.path}: mount of {path}, idle\n"
        f"base     checkpoint {path}\n"
        "machine  pc-i440fx-10.0, paused\n"
        "vmstate  stale: pages have been written since the checkpoint\n"
        "RAM block        size       pages        zero  checkpoint        read     written\n"
        "pc.ram      1.172 MiB         300         297           2           0           1\n"
        "vga.vram        4 KiB           1           1           0           0           0\n"
        "devices  2: timer, globalstate\n"
    )
    document = json.loads(run_ckptfs("info", "--json", mounted.path).stdout)
    assert document == {"mount": str(mounted.path), **mounted.status()}


def test_a_fresh_mount(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    mounted = mount(tmp_path / "new", "ram=pc.ram:16M", f"qmp={tmp_path}/qmp")
    assert run_ckptfs("info", mounted.path).stdout == (
        f"{mounted.path}: mount of {tmp_path}/new, idle\n"
        "base     no checkpoint yet\n"
        f"qmp      waiting {tmp_path}/qmp, guest not seen yet\n"
        "RAM block        size       pages        zero  checkpoint        read     written\n"
        "pc.ram         16 MiB        4096        4096           0           0           0\n"
        "devices  0\n"
    )


def test_a_dead_mount(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    mounted = mount(tmp_path / "new", "ram=pc.ram:16M")
    mounted.kill()
    line = f"{mounted.path}: its daemon is gone; `umount {mounted.path}` first\n"
    assert run_ckptfs("info", mounted.path, code=1).stderr == line
    assert run_ckptfs("qemu-args", mounted.path, code=1).stderr == line
