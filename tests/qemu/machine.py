"""Stock QEMU under TCG, driven step by step: by tests, examples and benchmarks.

::

    async with Qemu(build_guest(directory)) as vm:
        await vm.tick()
        await vm.stop()
        await vm.migrate_to(directory / "migfile", multifd=4, direct_io=True)

Every wait ends: with what was waited for, or after `DEADLINE` seconds with trio.TooSlowError, or with EOFError as
soon as QEMU is gone. An exception that leaves the `async with` carries QEMU's command line, stderr and serial
output as notes.
"""

import contextlib
import os
import re
import shlex
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio

from tests.qemu.guest import Guest
from tests.qemu.qmp import Qmp
from tests.qemu.stepper import Stepper

DEADLINE = 60.0
"""Seconds; a boot takes about three. Narrow it with trio.fail_after."""

VGA_AND_RNG = ("-vga", "std", "-device", "virtio-rng-pci")
"""Devices that bring RAM blocks of their own (vga.vram, vga.rom) and virtio state into a checkpoint."""


@dataclass(frozen=True)
class VisibleRange:
    """A part of a RAM block that the guest's physical memory shows, and what it holds there.

    `region` is QEMU's name of the memory region: a block's idstr without the path of the device that owns it.
    `data` is a file of the range's bytes, written by pmemsave.
    """

    region: str
    block_offset: int
    length: int
    data: Path


class Qemu:
    """A `qemu-system-x86_64` from `async with` to its end, which is its death.

    `arguments` go to QEMU as they are; `append` to the guest (`dirty=64`, see guest.py); `incoming` is what
    -incoming takes. `program` is what becomes QEMU, given these arguments. `qmp_path` is a QMP socket for whoever
    else speaks to this QEMU, the harness has one of its own; the path is known from the start, the socket is there
    inside the `async with`. It is in a new folder of `directory`, which everybody may write if that is given.
    """

    def __init__(
        self,
        guest: Guest | Stepper,
        *arguments: str,
        memory: str = "128M",
        machine: str = "pc",
        append: str = "",
        incoming: str | None = None,
        program: Sequence[str | Path] = ("qemu-system-x86_64",),
        directory: Path | None = None,
    ) -> None:
        self.serial = ""
        """What was read from the guest's serial line so far."""
        self.last_words = ""
        """What it said on stderr, once it has ended."""
        self._directory = tempfile.TemporaryDirectory(
            prefix="qemu-", dir=directory
        )  # short: sockets' paths end at 107 bytes
        if directory is not None:
            Path(self._directory.name).chmod(0o777)
        self.qmp_path = Path(self._directory.name) / "qmp"
        # thread=single: with more, QEMU 10.0 aborts at times while four vCPUs boot (assert in iotlb_to_section).
        self._command = [
            *map(str, program), "-accel", "tcg,thread=single", "-nodefaults", "-no-user-config",
            "-display", "none", "-no-reboot", "-machine", machine, "-m", memory,
            *guest.boot(append),
            "-serial", "stdio", "-qmp", f"unix:{self.qmp_path},server=on,wait=off",
            *arguments,
        ]  # fmt: skip
        if incoming is not None:
            self._command += ["-incoming", incoming]
        self._matched = 0  # how much of `serial` was waited for

    async def __aenter__(self) -> Self:
        """Start QEMU and wait until it answers on QMP."""
        ours, theirs = socket.socketpair()
        self._command += ["-chardev", f"socket,id=harness,fd={theirs.fileno()}"]
        self._command += ["-mon", "chardev=harness,mode=control"]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the exit
        self._serial_fd, stdout = os.pipe()
        os.set_blocking(self._serial_fd, False)
        try:
            self._process = await trio.lowlevel.open_process(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
            )
        finally:
            os.close(stdout)
            theirs.close()
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self._qmp = Qmp(self._stream)
        try:
            with trio.fail_after(DEADLINE):
                await self._qmp.greet()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Kill this QEMU, if it still runs, and wait until it is gone."""
        with trio.fail_after(DEADLINE, shield=True):  # a dead mount below its RAM can make it unkillable
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            if error is not None:
                self._read_serial()
                error.add_note(f"QEMU was: {shlex.join(self._command)}")
                error.add_note(f"its stderr:\n{self._read_stderr()}")
                error.add_note(f"its serial line:\n{self.serial[-2000:]}")
            self.last_words = self._read_stderr()
            await self._stream.aclose()
        os.close(self._serial_fd)
        self._stderr.close()
        self._directory.cleanup()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    # --- monitors ------------------------------------------------------------------------------------------

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command (`_` in argument names stands for `-`); QmpError is QEMU's refusal."""
        with trio.fail_after(DEADLINE):
            return await self._qmp.execute(command, **arguments)

    async def hmp(self, line: str) -> str:
        """Run a line of the human monitor and return what it prints, refusals included."""
        printed: str = await self.qmp("human-monitor-command", command_line=line)
        return printed

    async def event(self, name: str) -> dict[str, Any]:
        """Wait for QMP's event `name`, or take one that came already, and return its data."""
        with trio.fail_after(DEADLINE):
            return await self._qmp.wait_event(name)

    async def event_time(self, name: str) -> float:
        """Wait for QMP's event `name`, or take one that came already; when it came, in seconds by QEMU's clock."""
        with trio.fail_after(DEADLINE):
            return await self._qmp.wait_event_time(name)

    def forget_events(self, name: str) -> None:
        """Drop the events `name` that came before the last answer."""
        self._qmp.forget_events(name)

    async def stop(self) -> None:
        """Pause the guest."""
        await self.qmp("stop")

    async def cont(self) -> None:
        """Let the guest go on; one that is being loaded, afterwards: QEMU forgets a cont that comes before."""
        with trio.fail_after(DEADLINE):
            while await self.run_state() == "inmigrate":
                await trio.lowlevel.checkpoint()
        await self.qmp("cont")

    async def run_state(self) -> str:
        """QEMU's RunState: `running`, `paused`, `postmigrate`, ..."""
        status: str = (await self.qmp("query-status"))["status"]
        return status

    async def quit(self) -> None:
        """Have QEMU end by itself and wait until it has; CalledProcessError if it ends badly."""
        with contextlib.suppress(EOFError):
            await self.qmp("quit")
        with trio.fail_after(DEADLINE):
            if code := await self._process.wait():
                raise subprocess.CalledProcessError(code, self._command, stderr=self._read_stderr())

    def _read_stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")

    # --- the guest's serial line ---------------------------------------------------------------------------

    async def wait_serial(self, pattern: str) -> re.Match[str]:
        """Wait until the guest prints `pattern`, after what was waited for before."""
        with trio.fail_after(DEADLINE):
            while True:
                alive = self._read_serial()
                if match := re.compile(pattern, re.MULTILINE).search(self.serial, self._matched):
                    self._matched = match.end()
                    return match
                if not alive:
                    raise EOFError(f"QEMU ended before its guest printed {pattern!r}")
                await trio.lowlevel.wait_readable(self._serial_fd)

    def forget_serial(self) -> None:
        """What the guest has printed by now is not waited for any more."""
        self._read_serial()
        self._matched = len(self.serial)

    async def tick(self) -> int:
        """Wait for the guest's next tick, see that its blob is whole, and return the tick's number."""
        match = await self.wait_serial(r"^tick (\d+) MD5(OK|BAD)\s")
        assert match[2] == "OK", f"the guest's RAM is wrong: {match[0]}"
        return int(match[1])

    def ticks(self) -> list[int]:
        """The numbers of all ticks printed by now, each one with a blob that is whole."""
        self._read_serial()
        assert "BAD" not in self.serial, "the guest's RAM is wrong"
        return [int(number) for number in re.findall(r"^tick (\d+) MD5OK\s", self.serial, re.MULTILINE)]

    def _read_serial(self) -> bool:
        """Take what the pipe holds; False once QEMU has closed it."""
        while True:
            try:
                data = os.read(self._serial_fd, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.serial += data.decode(errors="replace")

    # --- migration -----------------------------------------------------------------------------------------

    async def migrate_to(
        self,
        path: Path,
        *,
        offset: int = 0,
        mapped_ram: bool = True,
        multifd: int = 0,
        direct_io: bool = False,
    ) -> dict[str, Any]:
        """Save to `path` at full speed and return query-migrate's result; RuntimeError says why it failed.

        `multifd` is the number of channels, 0 for none. A running guest is saved live; afterwards it is stopped
        (`postmigrate`) either way.
        """
        await self._set_migration(mapped_ram, multifd, direct_io)
        await self.qmp("migrate", uri=_file_uri(path, offset))
        result = await self.migrated()
        with trio.fail_after(DEADLINE):
            while await self.run_state() == "finish-migrate":  # a moment after it has completed
                await trio.lowlevel.checkpoint()
        return result

    async def load(
        self,
        path: Path,
        *,
        offset: int = 0,
        mapped_ram: bool = True,
        multifd: int = 0,
        direct_io: bool = False,
    ) -> None:
        """Load `path` into a QEMU started with `incoming="defer"`; it runs on if it ran when it was saved.

        QEMU ends when it can't, and says on its stderr why: then this raises EOFError.
        """
        await self._set_migration(mapped_ram, multifd, direct_io)
        await self.qmp("migrate-incoming", uri=_file_uri(path, offset))
        await self.migrated()

    async def _set_migration(self, mapped_ram: bool, multifd: int, direct_io: bool) -> None:
        states = {"mapped-ram": mapped_ram, "multifd": multifd > 0, "events": True}
        capabilities = [{"capability": name, "state": state} for name, state in states.items()]
        await self.qmp("migrate-set-capabilities", capabilities=capabilities)
        channels = {"multifd_channels": multifd} if multifd else {}
        await self.qmp("migrate-set-parameters", max_bandwidth=0, direct_io=direct_io, **channels)
        self._qmp.forget_events("MIGRATION")  # of an earlier migration, perhaps another monitor's

    async def migrated(self) -> dict[str, Any]:
        """Wait for the end of a migration and return query-migrate's result; RuntimeError says why it failed."""
        while True:
            status = (await self.event("MIGRATION"))["status"]
            if status in ("completed", "failed", "cancelled"):
                break
        result: dict[str, Any] = await self.qmp("query-migrate")
        if status != "completed":
            raise RuntimeError(f"migration {status}: {result.get('error-desc', 'no reason given')}")
        return result

    async def migration_ended(self) -> None:
        """Wait until no migration runs, whoever began it."""
        status = ""
        try:
            with trio.fail_after(DEADLINE):
                while status not in ("none", "completed", "failed", "cancelled"):
                    status = (await self.qmp("query-migrate")).get("status", "none")
        except trio.TooSlowError as error:
            error.add_note(f"QEMU's migration is {status}")
            raise

    # --- what is in its memory -----------------------------------------------------------------------------

    async def pmemsave(self, path: Path, address: int, length: int) -> None:
        """Have QEMU write `length` bytes of the guest's physical memory from `address` on to `path`."""
        await self.qmp("pmemsave", val=address, size=length, filename=str(path))

    async def save_visible_ranges(self, directory: Path) -> list[VisibleRange]:
        """Dump every part of every RAM block that physical memory shows; the guest has to be stopped.

        QEMU itself says which parts those are: what the flat view of address space "memory" maps as RAM or ROM.
        What it maps otherwise is left out, as physical memory shows something else there than the block holds.
        In a PC's main RAM that is the legacy VGA window alone, 0xA0000 to 0xC0000.
        """
        ranges = []
        for address, length, region, block_offset in _flat_view(await self.hmp("info mtree -f")):
            data = directory / f"{address:x}"
            await self.pmemsave(data, address, length)
            ranges.append(VisibleRange(region, block_offset, length, data))
        return ranges


def _file_uri(path: Path, offset: int) -> str:
    return f"file:{path},offset={offset:#x}" if offset else f"file:{path}"


def _flat_view(mtree: str) -> list[tuple[int, int, str, int]]:
    """(address, length, region, block_offset) of what `info mtree -f` lists as ram or rom in AS "memory"."""
    view = next(view for view in mtree.split("FlatView #") if 'AS "memory"' in view)
    line = re.compile(r"^ *(\w{16})-(\w{16}) \(prio -?\d+, (?:ram|rom)\): (\S+)(?: @(\w{16}))?", re.MULTILINE)
    return [
        (int(start, 16), int(last, 16) + 1 - int(start, 16), region, int(offset or "0", 16))
        for start, last, region, offset in line.findall(view)
    ]
