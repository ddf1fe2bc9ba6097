"""System calls that fail: strace, attached to a daemon."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ATTACHED = re.compile(r"strace: Process \d+ attached")


class Injected:
    """What strace did."""

    def __init__(self, log: Path) -> None:
        self._log = log

    @property
    def calls(self) -> list[str]:
        """The calls that were made to fail, as strace writes them; complete when strace is gone."""
        return [line for line in self._log.read_text().splitlines() if "(INJECTED)" in line]


@contextmanager
def failing(pid: int, log: Path, call: str, error: str, when: int) -> Iterator[Injected]:
    """Within this, call number ``when`` of ``call`` in each thread of process ``pid`` fails with ``error``."""
    injection = f"inject={call}:error={error}:when={when}"
    process = subprocess.Popen(
        ["strace", "-f", "-p", str(pid), "-o", log, "-e", f"trace={call}", "-e", injection],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process:
        try:
            line = process.stderr.readline()
            assert _ATTACHED.match(line), line
            yield Injected(log)
        finally:
            process.terminate()
            process.communicate()
