"""A mount as a program uses it.

::

    with ckptfs.mounted("heap.ckpt", ram="heap:256M") as mount:
        (mount.path / "ram/heap").write_bytes(...)
        mount.save()
        mount.status()["written-pages"]
"""

import json
import os
import select
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ckptfs.api.ctl import run_command
from ckptfs.api.status import Status, read_status
from ckptfs.errors import StateError

if TYPE_CHECKING:
    from ckptfs.api.memory import MountedMemory

Option = str | int | bool | Sequence[str] | None


class Events:
    """An open file of events."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._lines: list[bytes] = []
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        while not self._lines:
            if self._closed:
                raise StopIteration
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            poll.poll()
            try:
                self._lines = os.read(self._fd, 1 << 20).splitlines()
            except OSError:  # the daemon is gone
                self.close()
        event: dict[str, Any] = json.loads(self._lines.pop(0))
        return event

    def close(self) -> None:
        """Close it; what was read and not given out yet still comes."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)


class Mount:
    """What is mounted at ``path``: commands, status and events. RAM itself are the files in ``path / "ram"``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._open: list[Events | MountedMemory] = []

    def save(self, target: str | os.PathLike[str] | None = None, *, ram_only: bool = False) -> str:
        """Write a checkpoint, to the mounted file or to ``target``; return one line of what was done.

        It is durable then. Ctrl-C cancels it. Raises StateError with the words of a failure, OSError.
        """
        words = [] if target is None else [os.path.abspath(target)]
        return self.run(shlex.join(["save", *words, *(["ram-only"] if ram_only else [])]))

    def run(self, command: str) -> str:
        """Run any command of ctl (``reset``, ``restore``, ``prefetch pc.ram`` ...), and return its answer."""
        return run_command(os.fspath(self.path), command)

    def status(self) -> Status:
        """What status.json says now."""
        return read_status(os.fspath(self.path))

    def events(self) -> "Events":
        """What happens from now on, in the form of QMP's events: an iterator that waits for the next one.

        It ends when it is closed, and with the mount. An open one is a user of the mount.
        """
        events = Events(self.path / "events")
        self._open.append(events)
        return events

    def memory(self, *, map: Sequence[str] = ()) -> "MountedMemory":  # noqa: A002
        """Open its memory as it is now, and as a guest that runs on it changes it.

        ``map`` tells where RAM blocks are in physical memory, as the mount option does; otherwise views/map does.
        """
        from ckptfs.api.memory import MountedMemory  # numpy, for those who look into memory

        memory = MountedMemory(os.fspath(self.path), map)
        self._open.append(memory)
        return memory

    def close(self) -> None:
        """End all iterators of events, and close what `memory` has opened; the mount stays."""
        while self._open:
            self._open.pop().close()

    def __repr__(self) -> str:
        return f"<Mount at {self.path}>"


@contextmanager
def mounted(
    spec: str | os.PathLike[str], directory: str | os.PathLike[str] | None = None, **options: Option
) -> Iterator[Mount]:
    """Mount ``spec`` (a checkpoint, or the file that the first `save` makes) for as long as a ``with`` lasts.

    It is at ``directory``, or at a new one that is gone afterwards. Mount options are keywords: ``ro=True``,
    ``qmp="/run/vm.qmp"``, ``ram=["m0:1G", "m1:1G"]``. In the end the daemon has ended and the storage is free;
    pages that were written and not saved are gone.

    Raises StateError with the words of mount.ckptfs, or of umount where a program still uses the mount.
    """
    if directory is None:
        made = tempfile.mkdtemp(prefix="ckptfs-")
        try:
            with mounted(spec, made, **options) as mount:
                yield mount
        finally:
            with suppress(OSError):  # where umount has failed it is a mount still
                os.rmdir(made)
        return
    _run("ckptfs.cli.mount", os.fspath(spec), os.fspath(directory), *_arguments(options))
    mount = Mount(directory)
    try:
        yield mount
    finally:
        mount.close()
        _run("ckptfs.cli.ckptfs", "umount", "--quiet", os.fspath(directory))


def _arguments(options: dict[str, Option]) -> Iterator[str]:
    for name, value in options.items():
        if value is None or value is False:
            continue
        for one in [value] if isinstance(value, str | int) else value:
            yield "-o"
            yield name if one is True else f"{name}={one}"


def _run(module: str, *arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if result.returncode:
        raise StateError(result.stderr.strip() or f"{module} ended with exit code {result.returncode}")
