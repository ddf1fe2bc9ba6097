"""Migration files of a stock QEMU that has never run (-S): small, and there in a fraction of a second."""

import contextlib
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ckptfs.mapped_ram.stream import BytesSource

DEADLINE = 60.0

MigrationFileMaker = Callable[..., BytesSource]
QemuCommands = Callable[..., contextlib.AbstractContextManager[Callable[..., Any]]]


@pytest.fixture
def qemu_file(tmp_path: Path) -> MigrationFileMaker:
    """`qemu_file("-m", "16M", capabilities=["mapped-ram"])` is the file that a QEMU with these arguments saves."""

    def make(*arguments: str, capabilities: Sequence[str] = ("mapped-ram",), offset: int = 0) -> BytesSource:
        path = tmp_path / "migfile"
        with _paused_qemu(*arguments) as execute:
            states = [{"capability": name, "state": True} for name in capabilities]
            execute("migrate-set-capabilities", capabilities=states)
            execute("migrate", uri=f"file:{path},offset={offset:#x}")
            assert _outcome(execute) == "completed"
        return BytesSource(path.read_bytes())

    return make


@pytest.fixture
def qemu_commands() -> QemuCommands:
    """`with qemu_commands("-m", "16M") as execute: execute("stop")` speaks QMP to a QEMU with these arguments."""
    return _paused_qemu


@pytest.fixture
def qemu_loads(tmp_path: Path) -> Callable[..., None]:
    """`qemu_loads(data, "-m", "16M", capabilities=["mapped-ram"])` asserts that a QEMU like that loads it."""

    def load(data: bytes, *arguments: str, capabilities: Sequence[str] = ("mapped-ram",), offset: int = 0) -> None:
        path = tmp_path / "incoming"
        path.write_bytes(data)
        with _paused_qemu(*arguments, "-incoming", "defer") as execute:
            states = [{"capability": name, "state": True} for name in capabilities]
            execute("migrate-set-capabilities", capabilities=states)
            # Otherwise QEMU exits on a failure, without its reason.
            uri = f"file:{path},offset={offset:#x}"
            execute("migrate-incoming", uri=uri, **{"exit-on-error": False})
            assert _outcome(execute) == "completed"

    return load


@contextlib.contextmanager
def _paused_qemu(*arguments: str):
    """Yield what executes a QMP command and returns its answer."""
    with tempfile.TemporaryDirectory(prefix="qmp-") as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/qmp")
        listener.listen()
        listener.settimeout(DEADLINE)
        command = [
            "qemu-system-x86_64",
            "-accel",
            "tcg",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-S",
        ]
        command += [*arguments, "-qmp", f"unix:{directory}/qmp"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
            try:
                connection, _ = listener.accept()
                connection.settimeout(DEADLINE)
                with connection, connection.makefile("rw") as stream:
                    json.loads(stream.readline())  # the greeting

                    def execute(name: str, **arguments: Any) -> Any:
                        stream.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                        stream.flush()
                        while True:
                            answer = json.loads(stream.readline())
                            assert "error" not in answer, answer
                            if "return" in answer:
                                return answer["return"]

                    execute("qmp_capabilities")
                    yield execute
            finally:
                process.kill()


def _outcome(execute: Callable[..., Any]) -> str:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        status = execute("query-migrate").get("status")
        if status in ("completed", "failed"):
            return status
    return "timeout"
