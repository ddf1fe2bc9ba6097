"""However a save or a mount ends, the former checkpoint or the new one is there, whole, and nothing else.

By a kill, a full disk, a cancel, umount, a signal.
"""

import errno
import hashlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.disk import Disk
from tests.mount.harness import BIN, DEADLINE, Mounted, is_mounted, run_mount

MiB = 1 << 20
LENGTH = 8 * MiB
SLOWLY = f"max_bandwidth={4 * MiB}"
"""With it a save of all of RAM takes two seconds."""


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Where the checkpoint is, and nothing else."""
    directory = tmp_path / "storage"
    directory.mkdir()
    return directory


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ram_in(path: Path) -> bytes:
    return decode(path).blocks["pc.ram"].tobytes()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def saving(mounted: Mounted) -> Iterator["Saving"]:
    """A save that runs in the background; how it ends is known at the end."""
    with ThreadPoolExecutor() as threads:
        future = threads.submit(mounted.ctl, "save")
        result = Saving()
        try:
            yield result
        finally:
            result.error = future.exception(DEADLINE)


class Saving:
    """How a save ended."""

    error: BaseException | None = None

    @property
    def errno(self) -> int:
        """Its errno, 0 if it succeeded."""
        if self.error is None:
            return 0
        assert isinstance(self.error, OSError)
        assert self.error.errno is not None
        return self.error.errno


# --- kill -9 ----------------------------------------------------------------------------------------------


def test_a_daemon_that_is_killed_leaves_the_former_checkpoint_or_the_new_one(
    mount: Mount, storage: Path, tmp_path: Path
) -> None:
    path = storage / "checkpoint"
    first = mount(path, f"ram=pc.ram:{LENGTH}")
    ram = first.fill(0)
    started = time.monotonic()
    first.ctl("save")
    duration = time.monotonic() - started
    first.umount()
    random = Random(1)
    saved = left = 0
    for seed in range(1, 11):
        former = digest(path)
        mounted = mount(path, path=tmp_path / "mnt")
        newer = mounted.fill(seed)
        killer = threading.Timer(random.uniform(0, 1.3 * duration), mounted.signal, [signal.SIGKILL])
        with saving(mounted) as outcome:
            killer.start()
        killer.join()
        assert mounted.wait() == -signal.SIGKILL
        assert outcome.errno in (0, errno.ENOTCONN, errno.ECONNABORTED)
        left += names(storage) != ["checkpoint"]
        if digest(path) == former:
            assert outcome.errno, "a save that succeeded is not there"
        else:
            assert ram_in(path) == newer
            ram = newer
            saved += 1
        if seed == 1:
            _assert_dead(mounted.path, path)
        subprocess.run(["umount", mounted.path], check=True)
    assert saved < 10, "all kills came too late"
    last = mount(path)
    assert (last.ram / "pc.ram").read_bytes() == ram
    last.ctl("save")
    assert names(storage) == ["checkpoint"], f"{left} times something was left, and is still there"
    assert ram_in(path) == ram


def _assert_dead(directory: Path, spec: Path) -> None:
    """The mount point is dead, never an empty directory, and mount.ckptfs says so."""
    with pytest.raises(OSError, match="not connected") as caught:
        os.listdir(directory)
    assert caught.value.errno == errno.ENOTCONN
    result = run_mount(spec, directory)
    assert result.returncode == 32
    assert f"{directory}: there is a dead mount" in result.stderr


# --- a full disk ------------------------------------------------------------------------------------------


@pytest.fixture(params=["ext4", "xfs", "tmpfs"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 40 MB and more."""
    disk = Disk(request.param, tmp_path / "image", tmp_path / "disk")
    yield disk.path
    disk.close()


def test_a_full_disk(small_disk: Path, mount: Mount) -> None:
    storage = small_disk / "storage"
    storage.mkdir()
    path = storage / "checkpoint"
    mounted = mount(path, f"ram=pc.ram:{LENGTH}")
    mounted.fill(1, MiB)
    mounted.ctl("save")
    former = digest(path)
    ram = mounted.fill(2)
    filler = small_disk / "filler"
    for left in (MiB // 4, MiB, 5 * MiB):
        free = os.statvfs(small_disk)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - left)
        with pytest.raises(OSError, match="No space left on device") as caught:
            mounted.ctl("save")
        assert caught.value.errno == errno.ENOSPC
        assert str(path) in caught.value.strerror
        assert names(storage) == ["checkpoint"]
        assert digest(path) == former
        assert mounted.status()["migration"]["status"] == "failed"
        assert (mounted.ram / "pc.ram").read_bytes() == ram
        os.truncate(filler, 0)  # XFS frees what an unlinked file had in the background
        filler.unlink()
    mounted.ctl("save")
    assert ram_in(path) == ram
    mounted.umount()


# --- cancel, and a second save ----------------------------------------------------------------------------


@pytest.fixture
def slow(mount: Mount, storage: Path) -> Mounted:
    """A mount whose checkpoint is all zeros, whose RAM is all random, and whose save takes two seconds."""
    mounted = mount(storage / "checkpoint", f"ram=pc.ram:{LENGTH}", SLOWLY)
    mounted.ctl("save")
    mounted.fill(1)
    return mounted


def wait_until_active(mounted: Mounted) -> None:
    mounted.wait_for(lambda status: status["migration"].get("status") == "active")


def test_cancel(slow: Mounted, storage: Path) -> None:
    former = digest(storage / "checkpoint")
    with saving(slow) as outcome:
        wait_until_active(slow)
        assert slow.ctl("cancel") == "ok save cancelled"
        assert names(storage) == ["checkpoint"]
    assert outcome.errno == errno.ECANCELED
    assert slow.status()["migration"]["status"] == "cancelled"
    assert digest(storage / "checkpoint") == former
    (slow.path / "parameters/max-bandwidth").write_text("0\n")
    slow.ctl("save")
    assert ram_in(storage / "checkpoint") == (slow.ram / "pc.ram").read_bytes()


def test_one_migration_at_a_time(slow: Mounted, storage: Path) -> None:
    with saving(slow) as outcome:
        wait_until_active(slow)
        for command in ("save", "save nowait", f"save {storage}/other", "reset"):
            with pytest.raises(OSError, match="a save is running") as caught:
                slow.ctl(command)
            assert caught.value.errno == errno.EBUSY
        (slow.path / "parameters/max-bandwidth").write_text("0\n")  # counts at once
    assert outcome.errno == 0
    assert names(storage) == ["checkpoint"]


def test_ram_that_is_written_during_a_cancelled_save_stays_written(slow: Mounted, storage: Path) -> None:
    ram = bytearray((slow.ram / "pc.ram").read_bytes())
    with saving(slow) as outcome:
        wait_until_active(slow)
        with (slow.ram / "pc.ram").open("r+b", buffering=0) as file:
            for offset in (0, 5000, LENGTH // 2 - 3, LENGTH - 7):
                os.pwrite(file.fileno(), b"written", offset)
                ram[offset : offset + 7] = b"written"
        slow.ctl("cancel")
    assert outcome.errno == errno.ECANCELED
    assert (slow.ram / "pc.ram").read_bytes() == ram
    (slow.path / "parameters/max-bandwidth").write_text("0\n")
    slow.ctl("save")
    assert ram_in(storage / "checkpoint") == ram


def test_a_save_in_the_background_is_followed_in_status(slow: Mounted, storage: Path) -> None:
    ram = (slow.ram / "pc.ram").read_bytes()
    assert slow.ctl("save nowait").startswith("ok ")
    status = slow.wait_for(lambda status: status["state"] == "idle")
    assert status["migration"]["status"] == "completed"
    assert status["migration"]["ram"]["transferred"] == LENGTH
    assert status["migration"]["total-time"] >= 1500
    assert ram_in(storage / "checkpoint") == ram


# --- umount, signals --------------------------------------------------------------------------------------


def test_umount_during_a_save_lets_it_end(slow: Mounted, storage: Path) -> None:
    ram = (slow.ram / "pc.ram").read_bytes()
    slow.ctl("save nowait")
    wait_until_active(slow)
    slow.umount()
    assert names(storage) == ["checkpoint"]
    assert ram_in(storage / "checkpoint") == ram


def test_a_mount_waits_for_a_save_to_its_file(
    slow: Mounted, storage: Path, mount_point: Path, tmp_path: Path
) -> None:
    ram = (slow.ram / "pc.ram").read_bytes()
    slow.ctl(f"migrate_set_parameter max-bandwidth {LENGTH // 8}B")  # time for a program to start in
    slow.ctl("save nowait")
    wait_until_active(slow)
    subprocess.run(["umount", slow.path], check=True)
    result = run_mount(storage / "checkpoint", mount_point, "ro", f"log={tmp_path / 'log'}")
    assert result.stderr == f"mount.ckptfs: {storage}/checkpoint: a save to it is running: waiting for it to end\n"
    assert result.returncode == 0
    assert (mount_point / "ram/pc.ram").read_bytes() == ram
    subprocess.run(["umount", mount_point], check=True)
    assert slow.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_during_a_save_cancels_it_and_unmounts(
    number: signal.Signals, slow: Mounted, storage: Path
) -> None:
    former = digest(storage / "checkpoint")
    with saving(slow) as outcome:
        wait_until_active(slow)
        slow.signal(number)
        assert slow.wait() == 0
    assert outcome.errno
    assert not is_mounted(slow.path)
    assert names(storage) == ["checkpoint"]
    assert digest(storage / "checkpoint") == former
    slow.check_log()


def test_a_signal_while_ram_is_mapped_and_read(fresh: Mounted) -> None:
    reader = subprocess.Popen(["cat", fresh.ram / "pc.ram"], stdout=subprocess.PIPE)  # waits for us to read
    assert reader.stdout is not None
    reader.stdout.read(1)
    fresh.signal(signal.SIGTERM)
    assert fresh.wait() == 0
    assert not is_mounted(fresh.path)
    reader.kill()
    reader.communicate()
    fresh.check_log()


def test_a_signal_at_any_moment_of_the_start(mount_point: Path, tmp_path: Path) -> None:
    command = [BIN / "mount.ckptfs", tmp_path / "checkpoint", mount_point, "-o", "foreground,ram=pc.ram:1M"]
    random = Random(2)
    for _ in range(8):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        timer = threading.Timer(random.uniform(0.2, 0.6), process.terminate)
        timer.start()
        _, stderr = process.communicate(timeout=DEADLINE)
        timer.join()
        assert process.returncode in (0, -signal.SIGTERM), stderr
        assert "Traceback" not in stderr
        assert not is_mounted(mount_point)


def test_a_signal_at_the_very_moment_of_the_mount(mount_point: Path, tmp_path: Path) -> None:
    late = ["-e", "trace=mount,move_mount", "-e", "inject=mount,move_mount:delay_exit=500000"]  # µs to send it in
    command = [BIN / "mount.ckptfs", tmp_path / "checkpoint", mount_point, "-o", "foreground,ram=pc.ram:1M"]
    process = subprocess.Popen(
        ["strace", "-f", "-o", tmp_path / "strace", *late, *command],
        stderr=subprocess.PIPE,
        text=True,
    )
    with open("/proc/self/mountinfo") as mounts:
        poll = select.poll()
        poll.register(mounts, select.POLLPRI)
        while not is_mounted(mount_point):
            assert poll.poll(DEADLINE * 1000)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    _, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, stderr
    assert not is_mounted(mount_point)
