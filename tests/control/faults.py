"""System calls that fail: strace, attached to a daemon."""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from tests.mount.harness import DEADLINE, Mounted

CALLS_MAX = 60
"""No command on a guest of a few MiB makes more calls of one kind than that."""

_NUMBERS = {"pread64": "17", "flock": "73", "fdatasync": "75", "renameat": "264", "renameat2": "316"}
"""Of system calls on x86-64, as the tests' guests are."""

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
    with _attached(pid, log, call, f"error={error}:when={when}"):
        yield Injected(log)


@contextmanager
def delayed(pid: int, log: Path, call: str, seconds: float = 0.5) -> Iterator[None]:
    """Within this, every ``call`` in process ``pid`` takes ``seconds`` longer."""
    with _attached(pid, log, call, f"delay_enter={round(seconds * 1e6)}"):
        yield


def wait_inside(pid: int, call: str) -> None:
    """Return when a thread of process ``pid`` is in ``call`` (proc(5), /proc/PID/syscall)."""
    number = _NUMBERS[call]
    while not any(_syscall(task) == number for task in Path(f"/proc/{pid}/task").iterdir()):
        pass


def _syscall(task: Path) -> str:
    try:
        return (task / "syscall").read_text().partition(" ")[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


@contextmanager
def killing(pid: int, log: Path, call: str) -> Iterator[None]:
    """Within this, process ``pid`` is killed before its first ``call``."""
    with _attached(pid, log, call, "signal=SIGKILL:when=1") as strace:
        yield
        strace.wait(DEADLINE)  # told to end while it sees a process die, it may wait for ever


@contextmanager
def traced(pid: int, log: Path, call: str) -> Iterator[Callable[[], list[str]]]:
    """Within this, every ``call`` in process ``pid`` is noted; afterwards, in their order, they are returned."""
    with _attached(pid, log, call, "delay_exit=0"):
        yield lambda: [line for line in log.read_text().splitlines() if f"{call}(" in line]


@contextmanager
def _attached(pid: int, log: Path, call: str, what: str) -> Iterator[subprocess.Popen[str]]:
    """Have strace do ``what`` to every ``call``."""
    injection = f"inject={call}:{what}"
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
            yield process
        finally:
            process.terminate()
            process.communicate()


def run_failing(
    log: Path, call: str, error: str, when: int, *command: str | Path, path: Path | None = None
) -> tuple[subprocess.CompletedProcess[str], Injected]:
    """Run a command to its end, in which call number ``when`` of ``call`` fails; on ``path`` alone, if given."""
    injection = f"inject={call}:error={error}:when={when}"
    only = [] if path is None else ["-P", path]
    result = subprocess.run(
        ["strace", "-f", *only, "-o", log, "-e", f"trace={call}", "-e", injection, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    return result, Injected(log)


def failures(mounted: Mounted, log: Path, command: str, call: str, error: str) -> Iterator[OSError | None]:
    """Run `command` again and again while the 1st, 2nd, ... `call` of each thread of the daemon fails with `error`.

    Gives the command's error each time, None if the failure did not matter to it; ends when there is no such call
    any more.
    """
    for when in count(1):
        assert when < CALLS_MAX
        noticed = None
        with failing(mounted.pid, log, call, error, when) as injected:
            try:
                mounted.ctl(command)
            except OSError as problem:
                noticed = problem
        if not injected.calls:
            assert noticed is None
            assert when > 1, f"{command} makes no call of {call}"
            return
        yield noticed
