"""What a mount says about itself, read from its status.json."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from ckptfs.errors import StateError

Status = dict[str, Any]


def is_dead_mount(path: str) -> bool:
    """Whether a FUSE file system was mounted at ``path`` whose daemon is gone."""
    try:
        os.statvfs(path)  # stat is answered out of a cache for a while after the daemon died
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


class StatusFile:
    """``directory``/status.json, open from `with` to its end; poll(2) gives POLLPRI when it has changed.

    Raises StateError where no ckptfs is mounted, or a dead one, and OSError.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def __enter__(self) -> Self:
        with self._explained():
            self.fd = os.open(os.path.join(self._directory, "status.json"), os.O_RDONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def read(self) -> Status:
        """What it says now."""
        text = b""
        with self._explained():
            while part := os.pread(self.fd, 1 << 20, len(text)):
                text += part
        status: Status = json.loads(text)
        return status

    @contextmanager
    def _explained(self) -> Iterator[None]:
        directory = self._directory
        try:
            yield
        except FileNotFoundError:
            problem = "no guest's RAM is mounted here" if os.path.isdir(directory) else "no such directory"
            raise StateError(f"{directory}: {problem}", errno.ENOENT) from None
        except NotADirectoryError:
            problem = "is a file: name the directory where a guest's RAM is mounted"
            raise StateError(f"{directory}: {problem}", errno.ENOTDIR) from None
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                raise StateError(
                    f"{directory}: its daemon is gone; `umount {directory}` first", error.errno
                ) from None
            raise


def read_status(directory: str) -> Status:
    """Return what ``directory``/status.json says."""
    with StatusFile(directory) as file:
        return file.read()
