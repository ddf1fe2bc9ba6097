"""ckptfs as a user runs it: `run_ckptfs(ARGUMENT...)`, and real mounts to run it on."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.conftest import _adopt_orphans, mount, mount_point, public
from tests.mount.harness import BIN

RunCkptfs = Callable[..., subprocess.CompletedProcess[str]]

__all__ = ["_adopt_orphans", "mount", "mount_point", "public"]


@pytest.fixture
def run_ckptfs() -> RunCkptfs:
    """`run_ckptfs("info", path)` is the ended process; it has at most one line to say on its stderr."""

    def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [BIN / "ckptfs", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == code, result
        if code == 1:
            assert result.stdout == ("-refused-by-ckptfs\n" if arguments[0] == "qemu-args" else "")
            assert result.stderr.count("\n") == 1
        return result

    return run
