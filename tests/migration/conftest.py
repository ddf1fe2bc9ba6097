"""Stock QEMU's monitor as the judge of what its words mean."""

import json
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest


class StockMonitor:
    """The monitor of one QEMU without a machine; QMP and HMP through one socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream = connection.makefile("rw", encoding="utf-8")
        self._answer()
        self.qmp("qmp_capabilities")

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a command; return its result, or raise AssertionError with QEMU's description."""
        result, error = self._execute(command, arguments)
        assert error is None, error
        return result

    def qmp_error(self, command: str, **arguments: Any) -> str | None:
        """Run a command; return QEMU's description of what is wrong with it, if anything is."""
        return self._execute(command, arguments)[1]

    def hmp(self, line: str) -> str:
        """Run a line of the human monitor; return what it prints."""
        text = self.qmp("human-monitor-command", **{"command-line": line})
        assert isinstance(text, str)
        return text.replace("\r\n", "\n")

    def _execute(self, command: str, arguments: dict[str, Any]) -> tuple[Any, str | None]:
        print(json.dumps({"execute": command, "arguments": arguments}), file=self._stream, flush=True)
        answer = self._answer()
        return answer.get("return"), answer["error"]["desc"] if "error" in answer else None

    def _answer(self) -> dict[str, Any]:
        while True:
            answer: dict[str, Any] = json.loads(self._stream.readline())
            if "event" not in answer:
                return answer


@pytest.fixture(scope="module")
def stock_monitor() -> Iterator[StockMonitor]:
    ours, qemus = socket.socketpair()
    command = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-machine", "none"]
    command += ["-chardev", f"socket,id=qmp,fd={qemus.fileno()}", "-mon", "chardev=qmp,mode=control"]
    with ours, qemus, subprocess.Popen(command, pass_fds=[qemus.fileno()]) as process:
        qemus.close()
        ours.settimeout(60)
        yield StockMonitor(ours)
        process.kill()
