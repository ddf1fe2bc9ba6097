"""The units in mount-helpers/systemd, as systemd reads and runs them."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

from tests.mount.harness import BIN
from tests.packages.systemd import PATIENCE, booted
from tests.qemu.firmware import write_rom

UNITS = Path(__file__).parents[2] / "mount-helpers" / "systemd"


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for unit in UNITS.iterdir():
        shutil.copy(unit, tmp_path / unit.name.replace("@", "@vm1"))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(tmp_path.iterdir())], capture_output=True, text=True
    )
    ours = [line for line in result.stderr.splitlines() if any(name.name in line for name in tmp_path.iterdir())]
    assert (result.returncode, ours) == (0, []), result.stderr


def test_a_machine_starts_where_it_was_stopped_and_nowhere_else(tmp_path: Path) -> None:
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    rom, serial = write_rom(ckpt / "rom"), ckpt / "serial"
    _save_running(ckpt / "vm1", rom, tmp_path)
    settings = "QEMU_ARGUMENTS=-nodefaults -bios /ckpt/rom -serial file:/ckpt/serial"
    with booted(tmp_path, UNITS, ckpt, settings) as systemd:
        systemd.run("systemctl", "start", "vm@vm1", code=1)
        assert "vm@vm1 did not end with a save" in systemd.journal()

        (ckpt / "vm1.stopped").touch()
        for _ in range(2):
            systemd.run("systemctl", "start", "vm@vm1")
            assert not (ckpt / "vm1.stopped").exists()
            systemd.run("systemctl", "start", "ckptfs-keep@vm1")
            systemd.run("systemctl", "stop", "vm@vm1")
            assert (ckpt / "vm1.stopped").exists()
        assert list(ckpt.glob("vm1.*T*"))

        systemd.run("systemctl", "start", "vm@vm1")
        systemd.run("systemctl", "kill", "--signal=KILL", "vm@vm1")
        systemd.run("systemctl", "stop", "vm@vm1")  # it returns when systemd has seen the end
        systemd.run("systemctl", "start", "vm@vm1", code=1)
        (ckpt / "vm1.stopped").touch()
        systemd.run("systemctl", "start", "vm@vm1")  # what the killed one has written is dropped
        systemd.run("systemctl", "stop", "vm@vm1", "mnt-vm1.mount")
    assert b"X" not in serial.read_bytes()


def _save_running(path: Path, rom: Path, directory: Path) -> None:
    """Save a machine that runs the ROM."""
    qmp, pid = directory / "qmp", directory / "pid"
    qemu = ["qemu-system-x86_64", "-m", "16M", "-nodefaults", "-bios", rom, "-display", "none", "-daemonize"]
    monitor = ["-serial", "null", "-qmp", f"unix:{qmp},server=on,wait=off", "-pidfile", pid]
    subprocess.run([*qemu, *monitor], check=True, timeout=PATIENCE)
    try:
        subprocess.run([BIN / "ckptfs", "save", "--quiet", "--qmp", qmp, path], check=True, timeout=PATIENCE)
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
