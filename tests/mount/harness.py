"""mount.ckptfs as a user runs it: a daemon of its own, a real mount, and nothing left of either afterwards."""

import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

BIN = Path(sys.executable).parent
"""Where mount.ckptfs and ckptfs are: beside the Python that runs the tests."""

DEADLINE = 60.0
"""Seconds that a program may take, and a daemon to end."""

TEST_DEADLINE = 180.0
"""Seconds that a test may take with one mount: then it is broken off, so that whoever hangs in it gets an error."""

MODULE_DEADLINE = 900.0
"""The same for a mount that all tests of a module share."""

_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ mount\.ckptfs\[\d+\]: (\w+): (.*)")
_HARMLESS = ("DEBUG", "INFO")
_UNSAVED = re.compile(r"unmounted, \d+ written pages? \(.* MiB\) not saved$")
"""What most tests leave behind, and need not announce."""

_PR_SET_CHILD_SUBREAPER = 36
_MNT_FORCE = 1
_MNT_DETACH = 2
_CLONE_NEWNS = 0x00020000
_MS_REC_SLAVE = 1 << 14 | 1 << 19


def adopt_orphans() -> None:
    """Become the parent of daemons that these tests start, so that they are reaped and their exit is seen."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def run_mount(
    spec: str | Path,
    directory: str | Path,
    *options: str,
    flags: tuple[str, ...] = (),
    environment: Mapping[str, str] = {},
) -> subprocess.CompletedProcess[str]:
    """Run mount.ckptfs to the end; each of ``options`` goes behind an -o of its own."""
    arguments = [argument for option in options for argument in ("-o", option)]
    return subprocess.run(
        [BIN / "mount.ckptfs", spec, directory, *flags, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env={**os.environ, **environment},
    )


def in_a_mount_namespace(script: str, timeout: float = DEADLINE, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a script of which nobody else sees what it mounts; the programs under test are first on its PATH."""
    return subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=timeout,
        preexec_fn=enter_a_mount_namespace,
        **how,
    )


def enter_a_mount_namespace(keep: Path | None = None) -> None:
    """Have this process see mounts of its own, those of tests alone that are below ``keep``: between fork and exec.

    A namespace begins with a copy of all mounts, and a copy that stays keeps the daemon of whatever other test from
    ending.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC_SLAVE, None):
        raise OSError(ctypes.get_errno(), "a mount namespace")
    for mountpoint in map(Path, reversed(_mountpoints())):
        of_a_test = mountpoint.parent.is_relative_to(tempfile.gettempdir())
        if of_a_test and not (keep and mountpoint.is_relative_to(keep)):
            libc.umount2(os.fsencode(mountpoint), _MNT_DETACH)


def _mountpoints() -> list[str]:
    return [_plain(line.split(" ")[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def is_mounted(directory: Path) -> bool:
    """Whether something is mounted there, alive or dead; asks /proc and not the mount."""
    return mount_entry(directory) is not None


def mount_entry(directory: Path) -> tuple[str, set[str], str, str] | None:
    """(device MAJOR:MINOR, options, type, source) of the mount at ``directory``, or None (proc(5), mountinfo)."""
    found = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        _, _, device, _, mountpoint, options, *_ = fields.split(" ")
        kind, source, _ = rest.split(" ", 2)
        if _plain(mountpoint) == str(directory):
            found = device, set(options.split(",")), kind, _plain(source)
    return found


def _plain(text: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), text)


def unmount_by_force(directory: Path) -> None:
    """Take away whatever is mounted there, dead or alive."""
    while is_mounted(directory):
        subprocess.run(["umount", "--lazy", directory], check=True, timeout=DEADLINE)


class Mounted:
    """One mount, from construction to `umount`. Every file operation on it blocks: it has a process of its own.

    If it does not end by itself, or the test takes too long, its daemon is killed: what waits for the mount fails
    then. At the end its log may hold nothing above INFO but what `expect_log` has announced.
    """

    def __init__(
        self,
        spec: str | Path,
        path: Path,
        log: Path,
        *options: str,
        program: tuple[str, ...] = (),
        deadline: float = TEST_DEADLINE,
    ) -> None:
        self.path = path
        self.log = log
        self._expected: list[str] = []
        self._ended = False
        path.mkdir(exist_ok=True)
        if program:
            arguments = ["-o", ",".join([f"log={log}", *options])]
            result = subprocess.run(
                [*program, spec, path, *arguments], capture_output=True, text=True, timeout=DEADLINE
            )
        else:
            result = run_mount(spec, path, f"log={log}", *options)
        assert (result.returncode, result.stderr, result.stdout) == (0, "", ""), result
        self.pid = self._find_daemon()
        self._pidfd = os.pidfd_open(self.pid)
        self._deadline = deadline
        self._is_late = False
        self._watchdog = threading.Timer(deadline, self._break_off_late)
        self._watchdog.start()

    def _find_daemon(self) -> int:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(self.path) in arguments:
                return int(entry.name)
        raise AssertionError(f"{self.path}: no process has been started with it")

    # ---- what a user does with it ------------------------------------------------------------------

    @property
    def ram(self) -> Path:
        """The folder of the RAM blocks."""
        return self.path / "ram"

    def ctl(self, command: str) -> str:
        """Write one command and read its answer from the same open file; OSError has the errno and the words."""
        fd = os.open(self.path / "ctl", os.O_RDWR)
        try:
            try:
                os.write(fd, command.encode() + b"\n")
            except OSError as error:
                raise OSError(error.errno, _read_all(fd)) from None
            return _read_all(fd)
        finally:
            os.close(fd)

    def fill(self, seed: int, length: int | None = None, name: str = "pc.ram") -> bytes:
        """Write random bytes from the beginning of a RAM block on, into all of it by default; return them."""
        path = self.ram / name
        data = np.random.default_rng(seed).bytes(path.stat().st_size if length is None else length)
        with path.open("r+b", buffering=0) as file:
            assert file.write(data) == len(data)
        return data

    def status(self) -> dict[str, Any]:
        """What status.json says."""
        document: dict[str, Any] = json.loads((self.path / "status.json").read_bytes())
        return document

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Follow status.json by poll(2) until it is as ``wanted``."""
        fd = os.open(self.path / "status.json", os.O_RDONLY)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            while True:
                status: dict[str, Any] = json.loads(os.pread(fd, 1 << 20, 0))
                if wanted(status):
                    return status
                assert poll.poll(DEADLINE * 1000), (
                    f"{self.path}: status did not become what was waited for: {status}"
                )
        finally:
            os.close(fd)

    def expect_log(self, pattern: str) -> None:
        """Announce warnings and errors of the daemon: some have to match ``pattern``, and no others may come."""
        self._expected.append(pattern)

    # ---- its end -----------------------------------------------------------------------------------

    def umount(self) -> None:
        """Unmount, see that the daemon ends well, and look at its log."""
        subprocess.run(["umount", self.path], check=True, timeout=DEADLINE)
        assert self.wait() == 0
        self.check_log()

    def kill(self) -> None:
        """Kill the daemon; the mount point stays dead."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def signal(self, number: signal.Signals) -> None:
        """Send the daemon a signal."""
        signal.pidfd_send_signal(self._pidfd, number)

    def wait(self) -> int:
        """Wait for the daemon's end; its exit code, negative for a signal."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        assert poll.poll(DEADLINE * 1000), f"{self.path}: the daemon did not end"
        self._ended = True
        self._watchdog.cancel()
        os.close(self._pidfd)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def check_log(self) -> None:
        """Fail for anything above INFO that was not announced, and for what was announced and did not come."""
        lines = self.log.read_text().splitlines()
        matches = [_LOG_LINE.match(line) for line in lines]
        alarms = [
            line
            for line, match in zip(lines, matches, strict=True)
            if not match or (match[1] not in _HARMLESS and not _UNSAVED.search(match[2]))
        ]
        for pattern in self._expected:
            assert any(re.search(pattern, line) for line in alarms), (
                f"nothing was logged that matches {pattern!r}; the log:\n" + "\n".join(lines)
            )
        unannounced = [line for line in alarms if not any(re.search(pattern, line) for pattern in self._expected)]
        assert not unannounced, "logged unannounced:\n" + "\n".join(unannounced)

    def clean_up(self) -> None:
        """Leave nothing behind, however the test ended; a mount that it left has to end in order."""
        try:
            assert not self._is_late, f"{self.path}: took longer than {self._deadline:g} s and was broken off"
            if not self._ended:
                assert self._alive(), f"{self.path}: the daemon has died; its log:\n{self.log.read_text()}"
                self.umount()
        finally:
            self.break_off()
            unmount_by_force(self.path)
            if not self._ended:
                self.wait()

    def _alive(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def _break_off_late(self) -> None:
        self._is_late = True
        self.break_off()

    def break_off(self) -> None:
        """End the connection and the daemon by force: whoever waits for the mount gets an error."""
        if self._ended:
            return
        ctypes.CDLL(None).umount2(os.fsencode(self.path), _MNT_FORCE)  # where it is busy, the connection is aborted
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def _read_all(fd: int) -> str:
    parts = []
    while part := os.read(fd, 1 << 16):
        parts.append(part)
    return b"".join(parts).decode().removesuffix("\n")
