"""The power is cut: an acknowledged save is there afterwards, any other is there whole or not at all.

By the shutdown of a real file system (XFS_IOC_GOINGDOWN, which ext4 has, too): what it has not written by then it
never writes. The daemon dies at the same moment, before it makes the system call in question.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.control.faults import killing
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.disk import Disk
from tests.mount.harness import Mounted, unmount_by_force

MiB = 1 << 20
LENGTH = 4 * MiB


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(request.param, tmp_path / "image", tmp_path / "disk")
    yield disk
    disk.close()


class Machine:
    """What a power cut hits: a mount, and the disk that its checkpoint is on."""

    def __init__(self, mount: Mount, disk: Disk) -> None:
        self._mount = mount
        self._disk = disk
        self.path = disk.path / "storage/checkpoint"
        self.path.parent.mkdir()
        self._random = np.random.default_rng(1)
        self._start(f"ram=pc.ram:{LENGTH}")

    def _start(self, *options: str) -> None:
        self.mounted: Mounted = self._mount(self.path, *options)

    def fill(self) -> bytes:
        """Write random bytes to all of RAM."""
        return self.mounted.fill(int(self._random.integers(1 << 32)))

    def lose_power(self, *, log_written: bool) -> None:
        """Everything stops, and starts again with what the disk has."""
        self._disk.cut_power(log_written=log_written)
        self.mounted.kill()
        unmount_by_force(self.mounted.path)
        self._disk.restart()
        self._start()

    def ram(self) -> bytes:
        """What the checkpoint has, as the judge reads it and as it is mounted."""
        ram = decode(self.path).blocks["pc.ram"].tobytes()
        assert (self.mounted.ram / "pc.ram").read_bytes() == ram
        return ram


def test_an_acknowledged_save_survives(disk: Disk, mount: Mount) -> None:
    machine = Machine(mount, disk)
    for log_written in (False, True):  # a new file, and one that replaces the former
        ram = machine.fill()
        machine.mounted.ctl("save")
        machine.lose_power(log_written=log_written)
        assert machine.ram() == ram
        assert [path.name for path in machine.path.parent.iterdir()] == ["checkpoint"]


# Before pages are written, before they are synced, before the rename, before that is synced.
MOMENTS = ["pwritev2", "fdatasync", "renameat", "fsync"]


def test_a_save_in_its_middle_leaves_the_former(disk: Disk, mount: Mount, tmp_path: Path) -> None:
    machine = Machine(mount, disk)
    former = machine.fill()
    machine.mounted.ctl("save")
    for call in MOMENTS:
        newer = machine.fill()
        killed = "not connected|connection abort"
        with killing(machine.mounted.pid, tmp_path / "strace", call), pytest.raises(OSError, match=killed):
            machine.mounted.ctl("save")
        machine.lose_power(log_written=True)
        found = machine.ram()
        assert found == (newer if call == "fsync" else former), call
        former = found
    machine.mounted.ctl("save")
    assert [path.name for path in machine.path.parent.iterdir()] == ["checkpoint"]
