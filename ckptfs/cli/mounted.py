"""What a mount says about itself, read from its status.json."""

import errno
import json
import os
from typing import Any

from ckptfs.errors import StateError


def is_dead_mount(path: str) -> bool:
    """Whether a FUSE file system was mounted at ``path`` whose daemon is gone."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def read_status(directory: str) -> dict[str, Any]:
    """Return the object in ``directory``/status.json.

    Raises StateError where no ckptfs is mounted, or a dead one, and OSError.
    """
    try:
        with open(os.path.join(directory, "status.json"), encoding="utf-8") as file:
            status: dict[str, Any] = json.load(file)
    except FileNotFoundError:
        raise StateError(f"{directory}: no guest's RAM is mounted here", errno.ENOENT) from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise StateError(f"{directory}: its daemon is gone; `umount {directory}` first", error.errno) from None
        raise
    return status
