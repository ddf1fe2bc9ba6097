"""ckptfs info --registers and --devices."""

import json
import re
from pathlib import Path

from tests.cli.conftest import RunCkptfs
from tests.doubles.migration_file import Device, MigrationFile
from tests.physical.conftest import SavedGuests, saved

__all__ = ["saved"]


def test_registers_and_fields_of_what_qemu_saved(saved: SavedGuests, run_ckptfs: RunCkptfs) -> None:
    linux = saved.linux()
    expected = [one.named() for one in linux.registers()]
    path = linux.path
    document = json.loads(run_ckptfs("info", path, "--registers", "--devices", "cpu", "--json").stdout)
    assert document["file"] == str(path)
    assert document["registers"] == expected
    assert [(device["idstr"], device["instance"]) for device in document["devices"]] == [("cpu", 0), ("cpu", 1)]
    assert document["devices"][1]["fields"]["env.eip"] == expected[1]["rip"]
    words = run_ckptfs("info", "--registers", path).stdout
    assert words.count("vCPU ") == 2
    assert re.search(rf"^rip +{expected[0]['rip']:016x}  rflags", words, re.MULTILINE)
    assert re.search(
        r"^  cmos_index +0$", run_ckptfs("info", path, "--devices", "mc146818rtc").stdout, re.MULTILINE
    )


def test_the_list_of_devices(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    devices = [Device("one", bytes(range(40))), Device("two", b"x", instance_id=3, described_length=9)]
    path = tmp_path / "ckpt"
    MigrationFile(devices=devices).write(path)
    assert run_ckptfs("info", "--devices", path).stdout == (
        f"{path}: pc-i440fx-10.0\n"
        "\n"
        "one 0: 40 bytes, 1 field\n"
        "two 3: its fields can't be told: two: the vmdesc does not describe its payload: data ends behind byte 1\n"
    )
    first = " ".join(f"{byte:02x}" for byte in range(32))
    assert f"  data  {first} ... (40 bytes)\n" in run_ckptfs("info", path, "--devices", "one").stdout


def test_what_there_is_not(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    path = tmp_path / "ckpt"
    MigrationFile().write(path)
    assert (
        "has no device 'cpu'; it has timer, globalstate"
        in run_ckptfs("info", path, "--devices", "cpu", code=1).stderr
    )
    MigrationFile(devices=()).write(tmp_path / "ram")
    alone = run_ckptfs("info", tmp_path / "ram", "--devices", code=1).stderr
    assert alone == f"{tmp_path}/ram: has no devices: it holds RAM alone\n"
    assert "the checkpoint has no vCPU" in run_ckptfs("info", path, "--registers", code=1).stderr
    assert "which FILE_OR_DIR?" in run_ckptfs("info", code=2).stderr
    assert "no guest's RAM is mounted here" in run_ckptfs("info", "--registers", tmp_path, code=1).stderr
