"""Descriptors that are handed in: to mount.ckptfs by inheritance, to QEMU through its monitor."""

import json
import os
import socket
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.mount.harness import BIN

_LAUNCH = Path(__file__).parent / "launch.py"
FIRST = 20
"""The number of the first descriptor that a mount inherits."""


@dataclass(frozen=True)
class Handed:
    """A file that somebody else opens, with these flags of open(2)."""

    path: Path
    flags: int


def mount_inheriting(*files: Handed) -> tuple[str, ...]:
    """mount.ckptfs with descriptors FIRST, FIRST + 1, ... on ``files``: `program` of a `Mounted`."""
    opens = [f"{number}:{file.flags}:{file.path}" for number, file in enumerate(files, FIRST)]
    return (sys.executable, str(_LAUNCH), *opens, "--", str(BIN / "mount.ckptfs"))


def fdset_option(*files: Handed, set_id: int = 1) -> str:
    """The mount option that makes a set of all descriptors that `mount_inheriting` gives."""
    return f"fdset={set_id}:" + ":".join(str(number) for number in range(FIRST, FIRST + len(files)))


def open_on(pid: int, path: Path) -> Counter[int]:
    """How often process ``pid`` has ``path`` open, by access mode and O_DIRECT."""
    found: Counter[int] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{name}") == str(path):
            lines = Path(f"/proc/{pid}/fdinfo/{name}").read_text().splitlines()
            flags = next(line for line in lines if line.startswith("flags:"))
            found[int(flags.split()[1], 8) & (os.O_ACCMODE | os.O_DIRECT)] += 1
    return found


def add_to_fdset(qmp_path: Path, set_id: int, *files: Handed) -> None:
    """Hand ``files`` to the QEMU at ``qmp_path`` (QMP add-fd; blocking)."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(qmp_path))
        replies = connection.makefile("r")
        replies.readline()  # the greeting
        connection.sendall(b'{"execute": "qmp_capabilities"}\n')
        assert "return" in json.loads(replies.readline())
        for file in files:
            descriptor = os.open(file.path, file.flags, 0o600)
            command = {"execute": "add-fd", "arguments": {"fdset-id": set_id}}
            socket.send_fds(connection, [json.dumps(command).encode() + b"\n"], [descriptor])
            os.close(descriptor)
            assert "return" in json.loads(replies.readline())
        replies.close()
