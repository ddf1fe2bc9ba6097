"""What the benchmarks have to work with: a directory, sizes, mounts, cold caches."""

import os
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ckptfs.mapped_ram.layout import empty_image, layout
from tests.benchmarks.rows import GiB, MiB
from tests.mount.harness import run_mount


@dataclass(frozen=True)
class Setting:
    """Where and how large: `directory` is on the file system that is measured; sizes are in bytes."""

    directory: Path
    size: int = GiB
    """RAM of the benchmarks without a guest."""
    guest_sizes: tuple[int, ...] = (256 * MiB, GiB, 4 * GiB)
    plot_sizes: tuple[int, ...] = (256 * MiB, 512 * MiB, GiB, 2 * GiB, 4 * GiB, 8 * GiB)
    """RAM of the guests in the plot."""
    rounds: int = 5

    @property
    def shares_extents(self) -> bool:
        """Whether files can share extents there."""
        command = ["stat", "--file-system", "--format=%T", self.directory]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip() in (
            "xfs",
            "btrfs",
        )

    @property
    def checkpoint(self) -> Path:
        """Where the benchmark at hand keeps its checkpoint."""
        return self.directory / "checkpoint"

    def make_checkpoint(self) -> Path:
        """A checkpoint of `size` bytes of RAM, no page of them zero."""
        with Mount(self, f"ram=pc.ram:{self.size}") as mount:
            fill(mount.ram, self.size)
            mount.ctl("save")
        return self.checkpoint


class Mount:
    """The mount of the checkpoint, or of ``spec``, by mount.ckptfs as users run it, until the daemon has ended."""

    def __init__(self, setting: Setting, *options: str, spec: str | None = None) -> None:
        self.path = setting.directory / "mnt"
        self.ram = self.path / "ram" / "pc.ram"
        self._spec = spec or setting.checkpoint
        self._options = (f"log={setting.directory / 'log'}", *options)

    def __enter__(self) -> Self:
        self.path.mkdir(exist_ok=True)
        started = time.perf_counter()
        # an installed program has its bytecode, whatever is set where this runs
        result = run_mount(self._spec, self.path, *self._options, environment={"PYTHONDONTWRITEBYTECODE": ""})
        self.mounted_after = time.perf_counter() - started
        """Seconds that mount.ckptfs took."""
        if result.returncode:
            raise RuntimeError(result.stderr)
        self.pid = _process_with_argument(os.fsencode(self.path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pidfd = os.pidfd_open(self.pid)
        subprocess.run(["umount", self.path], check=True)
        select.select([pidfd], [], [])
        os.close(pidfd)

    def ctl(self, command: str) -> float:
        """Have ctl carry out a command, as `echo command > ctl` does; return how many seconds it took."""
        fd = os.open(self.path / "ctl", os.O_WRONLY)
        try:
            started = time.perf_counter()
            os.write(fd, command.encode() + b"\n")
            return time.perf_counter() - started
        finally:
            os.close(fd)

    def status(self) -> dict[str, str]:
        """What status says."""
        lines = (self.path / "status").read_text().splitlines()
        return dict(line.split(" ", 1) for line in lines)


def _process_with_argument(argument: bytes) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if argument in (entry / "cmdline").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue
    raise RuntimeError(f"no process was started with {argument!r}")


def fill(path: Path, length: int) -> None:
    """Write random bytes into a file of RAM; no page of them is zero."""
    data = os.urandom(16 * MiB)
    fd = os.open(path, os.O_WRONLY)
    try:
        for block_offset in range(0, length, len(data)):
            os.pwrite(fd, data[: length - block_offset], block_offset)
    finally:
        os.close(fd)


def sparse_checkpoint(path: Path, length: int, *, every_page: bool) -> None:
    """Write a checkpoint with one RAM block; its pages are listed or not, and holes in any case."""
    plan = layout(empty_image([("pc.ram", length)]))
    with path.open("wb") as file:
        for file_offset, data in plan.extents:
            file.seek(file_offset)
            file.write(data)
        (block,) = plan.blocks
        if every_page:
            file.seek(block.bitmap_offset or 0)
            file.write(bytes([0xFF]) * (block.page_count // 8))
        file.truncate(plan.end_offset)


def make_cold(path: Path) -> None:
    """Have the kernel drop what it has cached of a file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def drop_caches() -> None:
    """Have the kernel drop all that it has cached, programs too; only root can."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


def settle(directory: Path) -> None:
    """Wait until the file system has written what it holds, so that no measurement pays for the one before."""
    subprocess.run(["sync", "--file-system", directory], check=True)
