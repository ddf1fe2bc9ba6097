"""The lease of a mount, on trio's mock clock: taken, kept, stolen, lost and given back."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.testing

from ckptfs.channels.identity import Identity
from ckptfs.channels.lease import keeping
from ckptfs.channels.lease.keeping import Lease
from ckptfs.channels.lease.places import LockFile, LockPlace, Seen, lock_place
from ckptfs.errors import CommandError, StateError, StorageError
from ckptfs.migration.address import FdAddress, FileMigrationArgs, ObjectAddress
from ckptfs.migration.store import StoreOptions
from ckptfs.namespace.lease import TERM, Holder

T = TypeVar("T")
ExpectLog = Callable[[str], None]
ME = Identity.of_daemon()


class _Here:
    """A lane without threads, of which a mock clock knows nothing."""

    async def ask(self, call: Callable[[], T], **_: Any) -> T:
        await trio.lowlevel.checkpoint()
        return call()

    def go_on(self) -> None:
        pass


class Flaky:
    """A place of which calls fail, before or after they have done something."""

    def __init__(self, place: LockPlace) -> None:
        self.place = place
        self.name = place.name
        self.fails_before = self.fails_after = False

    def look(self) -> Seen:
        self._fail(self.fails_before)
        return self.place.look()

    def swap(self, former: Seen, text: bytes) -> Seen | None:
        self._fail(self.fails_before)
        seen = self.place.swap(former, text)
        self._fail(self.fails_after)
        return seen

    def free(self, former: Seen) -> None:
        self._fail(self.fails_before)
        self.place.free(former)

    def _fail(self, fails: bool) -> None:
        if fails:
            raise StorageError("the store gives no answer")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm1.lock"


@pytest.fixture
def place(path: Path) -> Flaky:
    return Flaky(LockFile(str(path), -1))


@pytest.fixture
def clock(autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    monkeypatch.setattr(keeping, "Lane", _Here)
    return autojump_clock


def lease_at(place: LockPlace) -> Lease:
    return Lease(lambda device: place, trio.current_time)


def mode(path: Path) -> int | None:
    return path.stat().st_mode & 0o777 if path.exists() else None


def no_word(text: str) -> None:
    raise AssertionError(text)


async def test_the_second_is_refused_when_the_first_has_renewed_it(
    clock: trio.testing.MockClock, place: Flaky, nursery: trio.Nursery
) -> None:
    first, second = lease_at(place), lease_at(place)
    await first.take(no_word)
    nursery.start_soon(first.keep)
    told: list[str] = []
    with pytest.raises(StateError, match=rf"vm1.lock: is held by process {os.getpid()} on host .*`lock steal`"):
        await second.take(told.append)
    (words,) = told
    assert f"looking for up to {TERM:.0f} s whether it is alive" in words
    assert first.state == "held"
    assert second.state is None
    second.refuse_lost()
    await trio.sleep(100 * TERM)
    assert first.state == "held"
    nursery.cancel_scope.cancel()


async def test_a_dead_holder_loses_it_after_its_term(clock: trio.testing.MockClock, place: Flaky) -> None:
    await lease_at(place).take(no_word)
    second = lease_at(place)
    begun = trio.current_time()
    await second.take(lambda text: None)
    assert trio.current_time() >= begun + TERM
    assert second.state == "held"


async def test_given_back_it_is_free_at_once(clock: trio.testing.MockClock, place: Flaky, path: Path) -> None:
    first = lease_at(place)
    await first.take(no_word)
    assert mode(path) == 0o600
    await first.release()
    assert first.state is None
    assert mode(path) is None
    await lease_at(place).take(no_word)
    await first.release()  # is not the second's
    assert mode(path) is not None


async def test_one_that_is_not_renewed_is_lost_and_held_again_if_nobody_took_it(
    clock: trio.testing.MockClock, place: Flaky, nursery: trio.Nursery, expect_log: ExpectLog
) -> None:
    expect_log(
        "ERROR .*vm1.lock: the lease is lost: it has not been renewed for 2. s .* does not save there any more"
    )
    expect_log("WARNING .*vm1.lock: is held again")
    lease, changes = lease_at(place), trio.Event()
    await lease.take(no_word)
    lease.watch(changes.set)
    nursery.start_soon(lease.keep)
    place.fails_before = True
    await trio.sleep(TERM + 1)
    assert changes.is_set()
    assert lease.state == "lost: it has not been renewed for 31 s (the store gives no answer)"
    with pytest.raises(StateError, match=r"has lost its lease .*vm1.lock.*save elsewhere .*`lock steal`"):
        lease.refuse_lost()
    place.fails_before = False
    await trio.sleep(TERM)
    assert lease.state == "held"
    lease.refuse_lost()
    nursery.cancel_scope.cancel()


async def test_a_renewal_of_which_nobody_heard_was_made(
    clock: trio.testing.MockClock, place: Flaky, nursery: trio.Nursery
) -> None:
    lease = lease_at(place)
    await lease.take(no_word)
    nursery.start_soon(lease.keep)
    place.fails_after = True
    await trio.sleep(TERM / 2)
    place.fails_after = False
    await trio.sleep(TERM)
    assert lease.state == "held"
    nursery.cancel_scope.cancel()


async def test_stolen_it_is_lost_for_good_and_can_be_stolen_back(
    clock: trio.testing.MockClock, place: Flaky, nursery: trio.Nursery, path: Path, expect_log: ExpectLog
) -> None:
    expect_log("WARNING .*vm1.lock: taken from process")
    expect_log("ERROR .*vm1.lock: the lease is lost: process .* has taken it: this mount does not save")
    first, second = lease_at(place), lease_at(place)
    await first.take(no_word)
    nursery.start_soon(first.keep)
    assert f"taken from process {os.getpid()} on host" in await second.steal(ME, -1)
    assert (await second.steal(ME, -1)).endswith("vm1.lock: is held already")
    nursery.start_soon(second.keep)
    await trio.sleep(TERM)
    assert first.state is not None
    assert first.state.startswith(f"lost: process {os.getpid()} on host")
    assert first.state.endswith("has taken it")
    assert second.state == "held"
    await first.release()
    assert mode(path) is not None
    await first.steal(ME, -1)
    nursery.start_soon(first.keep)
    await trio.sleep(TERM)
    assert (first.state, (second.state or "").partition(":")[0]) == ("held", "lost")
    nursery.cancel_scope.cancel()


async def test_one_that_somebody_removes_is_lost(
    clock: trio.testing.MockClock, place: Flaky, path: Path, expect_log: ExpectLog
) -> None:
    expect_log("ERROR .*the lease is lost: somebody has removed it")
    lease = lease_at(place)
    await lease.take(no_word)
    os.unlink(path)
    await lease.keep()
    assert lease.state == "lost: somebody has removed it"


async def test_what_can_t_be_given_back_holds_up_nobody(
    clock: trio.testing.MockClock, place: Flaky, expect_log: ExpectLog
) -> None:
    expect_log("WARNING .*can't be given back, and is free in a while: the store gives no answer")
    lease = lease_at(place)
    await lease.take(no_word)
    place.fails_before = True
    await lease.release()
    assert lease.state is None


async def test_strangers_steal_nothing(place: Flaky) -> None:
    stranger = Identity(12345, 12345, (), "/")
    with pytest.raises(StorageError, match=r"only user .* may take its lease"):
        await lease_at(place).steal(stranger, -1)


def test_of_sixteen_that_write_at_once_one_has_it(path: Path) -> None:
    barrier = threading.Barrier(16)

    def write(number: int) -> bool:
        place = LockFile(str(path), -1)
        text = Holder("a", number, "", "", str(number)).text()
        seen = place.look()
        barrier.wait()
        return place.swap(seen, text) is not None

    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(write, range(16))) == 1


def test_a_file_system_without_locks_has_no_leases(
    place: Flaky, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageError, match=r"vm1.lock: can't be locked .*: mount without `exclusive`") as refused:
        place.swap(place.look(), b"text")
    assert refused.value.errno == errno.ENOLCK


def test_what_is_no_lease_is_not_overwritten(place: Flaky, path: Path) -> None:
    path.write_text("Dear Sir")
    with pytest.raises(CommandError, match="is no lease of ckptfs"):
        trio.run(lease_at(place).take, no_word)
    assert path.read_text() == "Dear Sir"


def test_what_has_no_place_beside_it(tmp_path: Path) -> None:
    for spec in (None, FdAddress("5"), FileMigrationArgs("/dev/fdset/1"), ObjectAddress("https://host/vm1")):
        with pytest.raises(CommandError, match="lies beside a file or an object"):
            lock_place(spec, StoreOptions())
    with pytest.raises(CommandError, match="lies on this mount"):
        lock_place(FileMigrationArgs(str(tmp_path / "vm1")), StoreOptions(), tmp_path.stat().st_dev)
