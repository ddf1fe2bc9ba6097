"""A mount whose storage falls silent: a FUSE file system below the checkpoint that is stopped by a signal."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import PAGE
from tests.mount.harness import DEADLINE, Mounted, is_mounted, unmount_by_force

MiB = 1 << 20
SHORT_DEADLINE = str(Path(__file__).parents[1] / "doubles/short_deadline.py")
CONTENT = np.random.default_rng(1).bytes(16 * MiB)

READER = """
import mmap, os, sys
how, path, place = sys.argv[1], sys.argv[2], int(sys.argv[3])
fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0))
if how == "mapped":
    data = mmap.mmap(fd, 0, prot=mmap.PROT_READ)[place : place + 4096]
else:
    data = mmap.mmap(-1, 4096)
    os.preadv(fd, [data], place)
sys.stdout.buffer.write(bytes(data))
"""
ERRORS = {
    "direct": (1, "Input/output error"),
    "buffered": (1, "Input/output error"),
    "mapped": (-signal.SIGBUS, ""),
}


class Bindfs:
    """Shows ``directory`` at ``path``, as long as it is not stopped."""

    def __init__(self, directory: Path, path: Path) -> None:
        path.mkdir()
        self.path = path
        self.process = subprocess.Popen(["bindfs", "-f", directory, path], stderr=subprocess.PIPE)
        while not is_mounted(path):
            assert self.process.poll() is None, self.process.communicate()

    def stop(self) -> None:
        """Returns when it stands still: nobody can give up a request that that it has taken."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.go_on()
        unmount_by_force(self.path)
        self.process.communicate(timeout=DEADLINE)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Bindfs]:
    directory = tmp_path / "storage"
    directory.mkdir()
    pages = {page: CONTENT[page * PAGE : (page + 1) * PAGE] for page in range(len(CONTENT) // PAGE)}
    MigrationFile(blocks=[Block("pc.ram", len(pages), pages)]).write(directory / "checkpoint")
    bindfs = Bindfs(directory, tmp_path / "bindfs")
    yield bindfs
    bindfs.end()


@pytest.fixture
def mounted(storage: Bindfs, mount: Mount) -> Iterator[Mounted]:
    """The checkpoint on it, with a deadline of 2 s."""
    mounted = mount(storage.path / "checkpoint", program=(sys.executable, SHORT_DEADLINE, "2"))
    yield mounted
    storage.go_on()  # or nothing could be closed


def read(how: str, mounted: Mounted, place: int) -> subprocess.CompletedProcess[bytes]:
    arguments = [sys.executable, "-c", READER, how, mounted.ram / "pc.ram", str(place)]
    return subprocess.run(arguments, capture_output=True, timeout=DEADLINE)


def alarms(mounted: Mounted) -> list[str]:
    return [line for line in mounted.log.read_text().splitlines() if ": ERROR: " in line]


@pytest.mark.parametrize("how", ["direct", "buffered", "mapped"])
def test_a_read_fails_by_the_one_deadline_and_works_when_the_storage_is_back(
    mounted: Mounted, storage: Bindfs, how: str
) -> None:
    mounted.expect_log("ERROR: .*/checkpoint: the storage has not answered for 2 s: whatever needs it fails")
    mounted.expect_log(
        "ERROR: pc.ram: pages [0-9]* to [0-9]* can't be read from the checkpoint: .* no answer in 2 s"
    )
    assert mounted.status()["storage"] == "ok"
    assert read(how, mounted, 0).stdout == CONTENT[:PAGE]
    storage.stop()
    for _ in range(2):
        failed = read(how, mounted, 8 * MiB)
        code, words = ERRORS[how]
        assert failed.returncode == code
        assert words in failed.stderr.decode()
    # however often the kernel asked, one thread waited for the storage, and two lines say so
    assert len(alarms(mounted)) == 2
    status = mounted.status()
    assert status["storage"].startswith("silent: no answer for pages pc.ram ")
    assert status["bad-page-count"] == 0
    storage.go_on()
    while mounted.status()["storage"] != "ok":
        pass
    assert "the storage answers again, after " in mounted.log.read_text()
    assert read(how, mounted, 8 * MiB).stdout == CONTENT[8 * MiB : 8 * MiB + PAGE]


def test_a_save_to_a_silent_storage_can_be_cancelled_and_the_daemon_ended(
    mount: Mount, storage: Bindfs, tmp_path: Path
) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:1M")
    storage.stop()
    with ThreadPoolExecutor() as threads:
        saving = threads.submit(mounted.ctl, f"save {storage.path}/other")
        mounted.wait_for(lambda status: status["state"] == "saving")
        assert mounted.ctl("cancel") == "ok save cancelled"
        with pytest.raises(OSError, match="the save was cancelled"):
            saving.result(DEADLINE)
        assert mounted.ctl("save").startswith("ok saved ")  # elsewhere it works
        saving = threads.submit(mounted.ctl, f"save {storage.path}/other")
        mounted.wait_for(lambda status: status["state"] == "saving")
        mounted.signal(signal.SIGTERM)
        assert mounted.wait() == 0
        assert isinstance(saving.exception(DEADLINE), OSError)
    assert "WARNING" not in mounted.log.read_text()  # it is the storage that takes its time, not the kernel
    storage.go_on()
    assert [path.name for path in storage.path.iterdir()] == ["checkpoint"]


def test_a_mount_whose_checkpoint_is_on_a_silent_storage_ends(mount: Mount, storage: Bindfs) -> None:
    mounted = mount(storage.path / "checkpoint")
    storage.stop()
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(read, "direct", mounted, 0)
        while not mounted.status()["waiting-readers"]:
            pass
        mounted.signal(signal.SIGTERM)
        assert reading.result(DEADLINE).returncode == 1
    while is_mounted(mounted.path):
        pass
    storage.go_on()  # the kernel asks it once more when the process ends, to close the file
    assert mounted.wait() == 0
