"""max-bandwidth is a real limit, and how many channels carry a save, and what they look at."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.control.descriptors import open_on
from tests.control.faults import traced
from tests.mount.conftest import Mount
from tests.mount.decode import PAGE, decode

MiB = 1 << 20


# --- max-bandwidth ----------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A file system that is no slower than the limits that are tried."""
    directory = tmp_path / "tmpfs"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_save_is_no_faster_than_its_limit(channels: int, mount: Mount, memory: Path) -> None:
    """That it is no slower is shown with a clock that nothing disturbs: tests/migration/test_ratelimit.py."""
    mounted = mount(memory / "checkpoint", "ram=pc.ram:64M", f"multifd_channels={channels},max_bandwidth=32M")
    mounted.fill(1)
    started = time.monotonic()
    mounted.ctl("save")
    assert time.monotonic() - started >= 1.8
    assert mounted.status()["migration"]["ram"]["mbps"] <= 1.1 * 32 * MiB * 8 / 1e6


def test_a_limit_without_multifd(mount: Mount, memory: Path) -> None:
    mounted = mount(memory / "checkpoint", "ram=pc.ram:32M,max_bandwidth=32M")
    mounted.ctl("migrate_set_capability multifd off")
    mounted.fill(1)
    started = time.monotonic()
    mounted.ctl("save")
    assert time.monotonic() - started >= 0.9


def test_zero_pages_cost_no_bandwidth(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:16M,max_bandwidth=64k")  # pages would take minutes
    with (mounted.ram / "pc.ram").open("r+b") as file:
        file.write(bytes(16 * MiB))
    mounted.ctl("save")
    ram = mounted.status()["migration"]["ram"]
    assert (ram["transferred"], ram["normal"], ram["duplicate"]) == (0, 0, 16 * MiB // PAGE)


def test_a_change_counts_at_once(mount: Mount, memory: Path) -> None:
    mounted = mount(memory / "checkpoint", "ram=pc.ram:64M,max_bandwidth=256k")  # it would be minutes
    data = mounted.fill(1)
    mounted.ctl("save nowait")
    mounted.wait_for(lambda status: status["migration"].get("status") == "active")
    started = time.monotonic()
    mounted.ctl("migrate_set_parameter max-bandwidth 64")  # MiB/s
    mounted.wait_for(lambda status: status["migration"]["status"] == "completed")
    assert time.monotonic() - started >= 0.9
    assert decode(memory / "checkpoint").blocks["pc.ram"].tobytes() == data


# --- channels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("multifd", "channels", "expected"), [("off", 4, 1), ("on", 1, 1), ("on", 2, 2), ("on", 255, 255)]
)
def test_as_many_channels_as_were_asked_for(
    multifd: str, channels: int, expected: int, mount: Mount, tmp_path: Path
) -> None:
    mounted = mount(tmp_path / "checkpoint", f"ram=pc.ram:4M,multifd_channels={channels},max_bandwidth=64k")
    data = mounted.fill(1)
    mounted.ctl(f"migrate_set_capability multifd {multifd}")
    mounted.ctl("save nowait")
    while not mounted.status()["migration"]["ram"]["remaining"]:
        pass  # no state of QEMU's says that the channels are there
    (temporary,) = tmp_path.glob(".checkpoint.*")
    for_pages = os.O_WRONLY | os.O_DIRECT if multifd == "on" else os.O_WRONLY
    assert open_on(mounted.pid, temporary) == {os.O_RDWR: 1, for_pages: expected}
    mounted.ctl("migrate_set_parameter max-bandwidth 0")
    mounted.wait_for(lambda status: status["migration"]["status"] == "completed")
    assert decode(tmp_path / "checkpoint").blocks["pc.ram"].tobytes() == data
    assert mounted.status()["direct-io"] == "on"


def test_without_multifd_pages_are_written_in_their_order(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:8M")
    mounted.fill(1)
    mounted.ctl("migrate_set_capability multifd off")
    with traced(mounted.pid, tmp_path / "strace", "pwritev2") as calls:
        mounted.ctl("save")
    offsets = [int(call.rsplit(", ", 2)[1]) for call in calls()]
    assert len(offsets) >= 8
    assert offsets == sorted(offsets)


# --- zero-page-detection ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("detection", "expected"), [("none", 300), ("legacy", 100), ("multifd", 100)])
@pytest.mark.parametrize("multifd", ["on", "off"])
def test_who_looks_for_zero_pages(
    detection: str, expected: int, multifd: str, mount: Mount, tmp_path: Path
) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:4M")
    with (mounted.ram / "pc.ram").open("r+b") as file:
        file.write(b"data".ljust(PAGE, b"\0") * 100 + bytes(200 * PAGE))
    mounted.ctl(f"migrate_set_capability multifd {multifd}")
    mounted.ctl(f"migrate_set_parameter zero-page-detection {detection}")
    mounted.ctl("save")
    # The pages that nobody ever wrote are holes in any case.
    assert (mounted.path / "pages/pc.ram").read_bytes().count(b"\2") == expected
    ram = mounted.status()["migration"]["ram"]
    assert (ram["normal"], ram["duplicate"]) == (expected, 1024 - expected)
    assert ram["normal-bytes"] == ram["transferred"] == expected * PAGE
    assert (tmp_path / "checkpoint").stat().st_blocks * 512 >= expected * PAGE


# --- direct-io --------------------------------------------------------------------------------------------


@pytest.fixture
def without_direct_io(tmp_path: Path) -> Iterator[Path]:
    """A file system that has no O_DIRECT."""
    directory = tmp_path / "ramfs"
    directory.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", directory], check=True)
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(directory / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    (directory / "probe").unlink(missing_ok=True)
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def test_a_file_system_without_direct_io(without_direct_io: Path, mount: Mount) -> None:
    path = without_direct_io / "checkpoint"
    mounted = mount(path, "ram=pc.ram:1M")
    data = mounted.fill(1)
    mounted.ctl("save")
    mounted.ctl("save")
    assert decode(path).blocks["pc.ram"].tobytes() == data
    assert mounted.status()["direct-io"] == "off: the file system does not support O_DIRECT"
    assert mounted.log.read_text().count("O_DIRECT") == 1
    mounted.ctl("migrate_set_parameter direct-io off")
    assert mounted.status()["direct-io"] == "off"
    mounted.ctl("save")
    mounted.umount()
    assert (mount(path).ram / "pc.ram").read_bytes() == data


@pytest.mark.parametrize("door", ["mount", "ctl", "file"])
def test_direct_io_by_name_is_not_done_without(door: str, without_direct_io: Path, mount: Mount) -> None:
    path = without_direct_io / "checkpoint"
    mounted = mount(path, "ram=pc.ram:1M", *(["direct_io=on"] if door == "mount" else []))
    if door == "ctl":
        mounted.ctl("migrate_set_parameter direct-io on")
    elif door == "file":
        (mounted.path / "parameters/direct-io").write_text("on\n")
    mounted.fill(1)
    with pytest.raises(OSError, match="does not support O_DIRECT: set direct-io off") as caught:
        mounted.ctl("save")
    assert caught.value.errno == errno.EINVAL
    assert os.listdir(without_direct_io) == []
    mounted.ctl("migrate_set_parameter direct-io off")
    mounted.ctl("save")


def test_without_multifd_direct_io_has_no_effect(without_direct_io: Path, mount: Mount) -> None:
    path = without_direct_io / "checkpoint"
    mounted = mount(path, "ram=pc.ram:1M", "direct_io=on")
    data = mounted.fill(1)
    mounted.ctl("migrate_set_capability multifd off")
    mounted.ctl("save")
    assert decode(path).blocks["pc.ram"].tobytes() == data
