"""Commands as a reader of the documentation types them: a shell, .venv/bin, and a guest behind QEMU's disk."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.harness import BIN
from tests.qemu.guest import CACHE, Guest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

Run = Callable[..., str]

_NO_SYSLOG = "there is no syslog here"
"""What every mount says where that is so, as in a container."""

_QEMU = """\
#!/bin/bash
# The reader has a guest on his disk; this one has a kernel instead.
exec {qemu} -accel tcg -kernel {guest.kernel} -initrd {guest.initrd} \
    -append "console=ttyS0 quiet panic=-1 vmcoreinfo=1" "$@"
"""

PATIENCE = """\
kill() { # a reader goes on when what he has ended is gone
    command kill "$@"
    python -c '
import os, select, sys

for pid in map(int, sys.argv[1:]):
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        continue
    select.select([pidfd], [], [])  # all its threads have ended, whoever reaps it
' "$@"
}
"""


def make_tools(directory: Path, guest: Guest) -> Path:
    """A directory with the qemu-system-x86_64 of a reader, to be the first on his PATH."""
    directory.mkdir()
    qemu = directory / "qemu-system-x86_64"
    qemu.write_text(_QEMU.format(qemu=shutil.which("qemu-system-x86_64"), guest=guest))
    qemu.chmod(0o755)
    return directory


@pytest.fixture
def run(tmp_path: Path, guest_files: Guest) -> Iterator[Run]:
    """`run(SCRIPT or [PROGRAM, ARGUMENT...])` returns what it prints; it has to end well and to leave nothing."""
    work = tmp_path / "work"
    work.mkdir()
    with (work / "disk.img").open("wb") as disk:
        disk.truncate(64 << 20)
    tools = make_tools(tmp_path / "tools", guest_files)
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "HOME": str(tmp_path),
    }

    def run(what: str | list[str | Path], **variables: str) -> str:
        if isinstance(what, str):
            command: list[str | Path] = ["bash", "-euo", "pipefail", "-c", PATIENCE + what]
            variables["PATH"] = f"{tools}:{environment['PATH']}"
        else:
            command = what
        result = subprocess.run(
            command,
            cwd=work,
            env={**environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        assert [line for line in result.stderr.splitlines() if _NO_SYSLOG not in line] == []
        return result.stdout

    assert CACHE.is_dir()
    yield run
    left = _mounts_below(tmp_path)
    for path in left:
        subprocess.run(["umount", "--lazy", path], check=True)
    assert not left


def _mounts_below(path: Path) -> list[str]:
    mountpoints = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [mountpoint for mountpoint in mountpoints if mountpoint.startswith(f"{path}/")]
