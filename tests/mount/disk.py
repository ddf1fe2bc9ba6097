"""A small file system of its own, in a file: to be filled up, and to have its power cut."""

import subprocess
from pathlib import Path

from tests.mount.harness import is_mounted

MiB = 1 << 20
LENGTHS = {"ext4": 60 * MiB, "xfs": 320 * MiB, "tmpfs": 60 * MiB}
"""Sizes in bytes; XFS takes no less than 300 MiB."""


class Disk:
    """A file system at `path`, until `close`: loop-mounted, or a tmpfs, which forgets all at `restart`.

    ``length`` in bytes is that of `LENGTHS` if none is given.
    """

    def __init__(self, kind: str, image: Path, path: Path, length: int | None = None) -> None:
        length = LENGTHS[kind] if length is None else length
        self.path = path
        self._mount_command = ["mount", "-o", "loop", image, path]
        if kind == "tmpfs":
            self._mount_command = ["mount", "-t", "tmpfs", "-o", f"size={length}", "none", path]
        else:
            with image.open("wb") as file:
                file.truncate(length)
            subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
        path.mkdir()
        subprocess.run(self._mount_command, check=True)

    def cut_power(self, *, log_written: bool) -> None:
        """Have the file system write nothing more from now on.

        With `log_written` it writes its log as its last: renames and sizes then survive, and the data that was not
        synced before them does not.
        """
        subprocess.run(["xfs_io", "-x", "-c", "shutdown -f" if log_written else "shutdown", self.path], check=True)

    def restart(self) -> None:
        """Mount again what was written; nobody may have anything open there."""
        subprocess.run(["umount", self.path], check=True)
        subprocess.run(self._mount_command, check=True)

    def close(self) -> None:
        """Unmount, whoever has what open there: its loop device goes with the last."""
        if is_mounted(self.path):
            subprocess.run(["umount", "--lazy", self.path], check=True)
