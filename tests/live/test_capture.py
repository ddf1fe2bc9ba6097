"""What `capture` leaves behind at a QEMU that fails at one step or another: a machine made up here.

After each failure a guest that ran runs, settings are as they were, and no descriptor or thread is left.
"""

import contextlib
import os
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from ckptfs.channels.identity import Identity
from ckptfs.errors import CkptfsError, QemuError, StateError
from ckptfs.qemu.capture import mounted
from ckptfs.qemu.capture.mounted import Capture, capture
from ckptfs.qemu.capture.session import refuse_if_torn
from ckptfs.qemu.monitor import Event, connected
from tests.doubles.qmp_server import FakeQemu, Fault, QmpServer, hang, hang_up, refuse, served
from tests.doubles.storage import open_descriptors, wait_until_open

LONG = os.urandom(3 << 20)  # more than a pipe holds
BEFORE_THE_STOP = [
    "query-status",
    "getfd",
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "migrate-set-capabilities",
    "migrate-set-parameters",
]
AFTER_THE_STOP = ["migrate", "migrate-continue", "query-migrate"]


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "qmp"]
    wait_until_open(before)


class Case:
    """A machine with settings that somebody chose, and a monitor's socket."""

    def __init__(self, qemu: FakeQemu, server: QmpServer, path: Path) -> None:
        self.qemu = qemu
        self.server = server
        self.path = path
        self.events: list[str] = []
        self.written = False
        self.deadline = 20.0
        qemu.capabilities["multifd"] = qemu.capabilities["mapped-ram"] = True
        qemu.parameters |= {"max-bandwidth": 12345, "tls-creds": "tls0", "mode": "cpr-reboot"}
        self.found = dict(qemu.capabilities), dict(qemu.parameters)

    async def flush(self) -> None:
        self.events.append(f"flush {self.qemu.run_state}")

    def freeze(self) -> str:
        self.events.append(f"freeze {self.qemu.run_state}")
        return "epoch"

    async def capture(
        self, flush: Callable[[], Awaitable[None]] | None = None, freeze: Callable[[], str] | None = None
    ) -> Capture[str]:
        async with connected(str(self.path), Identity.of_daemon(), self.deadline) as monitor:
            return await capture(monitor, _RAM(self, flush or self.flush, freeze or self.freeze))

    def assert_as_before(self, run_state: str = "running") -> None:
        assert not self.qemu.descriptors
        assert self.qemu.run_state == run_state
        assert (self.qemu.capabilities, self.qemu.parameters) == self.found

    async def assert_next_works(self) -> None:
        self.server.faults.clear()
        self.qemu.broken_off = False
        assert (await self.capture()).stream == self.qemu.stream


class _RAM:
    """What `capture` is told of RAM."""

    def __init__(self, case: Case, flush: Callable[[], Awaitable[None]], freeze: Callable[[], str]) -> None:
        self._case = case
        self._flush = flush
        self._freeze = freeze

    async def flush(self) -> None:
        await self._flush()

    def freeze(self) -> str:
        return self._freeze()

    def was_written(self) -> bool:
        return self._case.written


@asynccontextmanager
async def case_of(tmp_path: Path, **how: Any) -> AsyncIterator[Case]:
    async with trio.open_nursery() as nursery:
        qemu = FakeQemu(nursery, **how)
        with contextlib.closing(qemu):
            async with served(qemu, tmp_path / "qmp") as server:
                yield Case(qemu, server, tmp_path / "qmp")
        nursery.cancel_scope.cancel()  # a migration that nobody can end any more


@pytest.fixture
async def case(tmp_path: Path) -> AsyncIterator[Case]:
    async with case_of(tmp_path) as running:
        yield running


async def test_a_running_guest(case: Case) -> None:
    captured = await case.capture()
    assert (captured.epoch, captured.stream, captured.run_state) == ("epoch", b"device state", "running")
    assert captured.downtime > 0
    assert case.events == ["flush running", "flush finish-migrate", "freeze finish-migrate", "flush postmigrate"]
    case.assert_as_before()
    commands = case.server.commands
    assert commands.index("getfd") < commands.index("stop") < commands.index("migrate") < commands.index("cont")
    await case.assert_next_works()


async def test_a_device_state_longer_than_the_pipe(tmp_path: Path) -> None:
    async with case_of(tmp_path, stream=LONG) as case:
        assert (await case.capture()).stream == LONG
        case.assert_as_before()


async def test_the_run_state_lags_behind(case: Case) -> None:
    case.qemu.late = 3
    assert (await case.capture()).stream == b"device state"
    case.assert_as_before()


@pytest.mark.parametrize("run_state", ["paused", "prelaunch"])
async def test_a_guest_that_does_not_run(tmp_path: Path, run_state: str) -> None:
    async with case_of(tmp_path, run_state=run_state) as case:
        captured = await case.capture()
        assert (captured.run_state, captured.downtime) == (run_state, 0)
        assert case.events == ["flush finish-migrate", "freeze finish-migrate", "flush postmigrate"]
        assert not {"stop", "cont"} & set(case.server.commands)
        case.assert_as_before("postmigrate")


@pytest.mark.parametrize("run_state", ["inmigrate", "postmigrate", "shutdown", "io-error"])
async def test_a_guest_that_cannot_be_saved(tmp_path: Path, run_state: str) -> None:
    async with case_of(tmp_path, run_state=run_state) as case:
        with pytest.raises(StateError, match=f"the guest is in state '{run_state}': .*, then save"):
            await case.capture()
        case.assert_as_before(run_state)


async def test_settings_that_fit_are_left_alone(case: Case) -> None:
    case.qemu.capabilities = {name: name in mounted.CAPABILITIES for name in case.qemu.capabilities}
    case.qemu.parameters |= {"max-bandwidth": 0, "tls-creds": "", "mode": "normal"}
    await case.capture()
    assert not {"migrate-set-capabilities", "migrate-set-parameters"} & set(case.server.commands)


async def test_a_qemu_that_has_no_such_parameters(case: Case) -> None:
    case.qemu.parameters = {"max-bandwidth": 12345}
    case.found = case.found[0], {"max-bandwidth": 12345}
    await case.capture()
    case.assert_as_before()


@pytest.mark.parametrize("command", BEFORE_THE_STOP)
async def test_refused_before_the_stop(case: Case, command: str) -> None:
    case.server.faults[command] = once(refuse)
    with pytest.raises(QemuError, match=f"^QEMU refused {command}: told to refuse$"):
        await case.capture()
    assert "stop" not in case.server.commands
    case.assert_as_before()
    await case.assert_next_works()


async def test_stop_refused(case: Case) -> None:
    case.server.faults["stop"] = refuse
    with pytest.raises(QemuError, match=r"^QEMU refused stop: told to refuse$"):
        await case.capture()
    case.assert_as_before()
    await case.assert_next_works()


@pytest.mark.parametrize("command", AFTER_THE_STOP)
async def test_refused_after_the_stop(case: Case, command: str) -> None:
    case.server.faults[command] = refuse
    with pytest.raises(QemuError, match=f"^QEMU refused {command}: told to refuse$"):
        await case.capture()
    assert case.server.commands.count("cont") == 1
    case.assert_as_before()
    await case.assert_next_works()


async def test_a_migration_that_fails(case: Case) -> None:
    case.qemu.broken_off = True
    with pytest.raises(QemuError, match=r"device state ended as 'failed': told to fail$"):
        await case.capture()
    case.assert_as_before()
    await case.assert_next_works()


async def test_a_disk_that_qemu_cannot_open_again(case: Case) -> None:
    case.qemu.broken_off = True
    case.qemu.reason = "bdrv_inactivate_all() failed: Bad address"
    with pytest.raises(
        QemuError, match=r"Bad address \(QEMU can't open a disk again, .* absolute paths, -daemonize"
    ):
        await case.capture()


async def test_ram_that_is_written_while_the_device_state_is_taken(case: Case) -> None:
    case.written = True
    with pytest.raises(StateError, match="RAM was written while its device state was taken"):
        await case.capture()
    case.assert_as_before()
    case.written = False
    await case.assert_next_works()


async def test_cont_refused(case: Case) -> None:
    case.server.faults["cont"] = refuse
    with pytest.raises(
        QemuError, match=r"^QEMU refused cont: .*; if QEMU still runs, its guest is stopped: send it"
    ):
        await case.capture()
    case.assert_as_before("postmigrate")


async def test_cont_refused_after_another_failure(case: Case) -> None:
    case.server.faults |= {"migrate": refuse, "cont": refuse}
    with pytest.raises(QemuError, match=r"^QEMU refused migrate: .*; if QEMU still runs, its guest is stopped"):
        await case.capture()
    case.assert_as_before("paused")


@pytest.mark.parametrize("command", [*BEFORE_THE_STOP, "stop", *AFTER_THE_STOP])
@pytest.mark.parametrize("fault", [hang, hang_up])
async def test_silence_and_a_lost_connection(
    case: Case, command: str, fault: Fault, expect_log: Callable[[str], None]
) -> None:
    if fault is hang:
        case.deadline = 0.2
    case.server.faults[command] = fault
    if command in ("migrate-set-parameters", "stop", *AFTER_THE_STOP):
        expect_log("could not be restored")
    words = (
        r"(QEMU did not answer|QEMU sent nothing) for 0.2 s" if fault is hang else "the connection to QEMU broke"
    )
    with pytest.raises(QemuError) as caught:
        await case.capture()
    # QEMU's stream is awaited while it is to go on, and may be missed sooner than its answer
    assert re.match(f"({command}|migrate): {words}", str(caught.value))
    stopped = command in ("stop", *AFTER_THE_STOP)
    assert ("if QEMU still runs, its guest is stopped" in str(caught.value)) == stopped


async def test_silence_amid_the_device_state(case: Case) -> None:
    case.deadline = 0.05
    case.qemu.stalled = True
    with pytest.raises(QemuError, match=r"^migrate: QEMU sent nothing for 0\.05 s$"):
        await case.capture()
    assert "migrate_cancel" in case.server.commands
    case.assert_as_before()


async def test_a_device_state_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounted, "DEVICE_STATE_LIMIT", 1 << 20)
    async with case_of(tmp_path, stream=LONG) as case:
        with pytest.raises(QemuError, match="the device state is larger than 1048576 bytes"):
            await case.capture()
        case.assert_as_before()


@pytest.mark.parametrize("when", ["flush", "freeze"])
async def test_what_fails_on_our_side(case: Case, when: str) -> None:
    async def flush() -> None:
        if case.qemu.run_state != "running":
            raise OSError(5, "flush")

    def freeze() -> str:
        raise CkptfsError("freeze")

    with pytest.raises((OSError, CkptfsError), match=when):
        await case.capture(**{when: flush if when == "flush" else freeze})
    case.assert_as_before()
    await case.assert_next_works()


@pytest.mark.parametrize("command", [*BEFORE_THE_STOP, "stop", *AFTER_THE_STOP, "cont"])
async def test_cancelled_at_each_command(case: Case, command: str) -> None:
    with trio.CancelScope() as scope:

        async def cancel(_: str) -> None:
            scope.cancel()

        case.server.faults[command] = once(cancel)
        await case.capture()
    assert scope.cancelled_caught or command == "cont"
    case.assert_as_before()
    await case.assert_next_works()


async def test_cancelled_amid_the_device_state(case: Case) -> None:
    case.qemu.stalled = True
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(case.capture)
            await case.qemu.half_sent.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert "migrate_cancel" in case.server.commands
    case.assert_as_before()


@pytest.mark.parametrize(
    ("durations", "count"),
    [
        ([1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003], 8),
        ([1.0, 0.5, 0.4], 3),
        ([0.001], 1),
        ([256.0 / 2**n for n in range(20)], mounted.FLUSH_ROUNDS),
    ],
)
async def test_flushes_go_on_while_they_shrink(
    durations: list[float], count: int, autojump_clock: trio.testing.MockClock
) -> None:
    left = list(durations)

    async def flush() -> None:
        await trio.sleep(left.pop(0))

    await mounted._flush_until_it_settles(flush)
    assert len(left) == len(durations) - count


def once(fault: Fault) -> Fault:
    """The first time only."""
    left = [fault]

    async def first(command: str) -> None:
        if left:
            await left.pop()(command)

    return first


@pytest.mark.parametrize(
    ("ran", "names"),
    [
        (True, ""),
        (True, "STOP RESUME"),
        (True, "STOP MIGRATION RESUME STOP"),
        (False, ""),
        (False, "RESUME STOP RESUME"),
    ],
)
def test_a_guest_that_stood_still(ran: bool, names: str) -> None:
    refuse_if_torn([Event(name, {}, 0.0) for name in names.split()], ran=ran)


@pytest.mark.parametrize(
    ("ran", "names"),
    [
        (True, "RESUME STOP"),  # `cont`, while QEMU waited for its vCPUs
        (True, "STOP RESUME RESUME STOP"),  # the same, after a `stop` and `cont`
        (False, "STOP"),  # QEMU came while `stop` waited for them
    ],
)
def test_a_guest_that_ran_meanwhile(ran: bool, names: str) -> None:
    with pytest.raises(StateError, match="at the moment when QEMU took its device state: save again"):
        refuse_if_torn([Event(name, {}, 0.0) for name in names.split()], ran=ran)
