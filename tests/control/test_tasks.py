"""A guest in this process: what a failed or cancelled save leaves in it, with no help of the garbage collector."""

import errno
import gc
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio

from ckptfs.channels.channels import Channels
from ckptfs.channels.identity import Identity
from ckptfs.errors import CkptfsError
from ckptfs.guest.guest import Guest
from ckptfs.guest.saving import SaveRequest, save
from ckptfs.migration.address import FileMigrationArgs
from tests.control.footprint import Footprint, footprint
from tests.doubles.storage import FailingCall

MiB = 1 << 20
IO_CALLS = (
    "open",
    "pread",
    "preadv",
    "pwrite",
    "pwritev",
    "fdatasync",
    "rename",
    "fsync",
    "memfd_create",
    "ftruncate",
)


def request(path: Path) -> SaveRequest:
    return SaveRequest(FileMigrationArgs(str(path)), Identity.of_daemon())


def living() -> tuple[int, Footprint]:
    """Tasks of this trio.run, and what this process holds."""
    return trio.lowlevel.current_statistics().tasks_living, footprint(os.getpid())


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    """Half of its RAM is in a checkpoint, a part of that is written again; cycles of references stay."""
    guest = Guest.fresh([("pc.ram", 2 * MiB), ("vga.vram", MiB)])
    guest.settings.set_parameter("multifd-channels", 2)
    await guest.write(guest.blocks["pc.ram"], 0, os.urandom(MiB))
    await save(guest, request(tmp_path / "checkpoint"))
    await guest.write(guest.blocks["pc.ram"], MiB // 2, os.urandom(MiB))
    gc.collect()
    gc.disable()
    yield guest
    gc.enable()
    guest.close()


async def tried(work: Callable[[], Awaitable[str]]) -> bool:
    """Whether it worked; the error, with all that its traceback holds, is forgotten."""
    try:
        await work()
    except (CkptfsError, OSError):
        return False
    return True


@pytest.mark.parametrize("call", IO_CALLS)
async def test_a_save_in_which_a_call_fails(
    call: str, guest: Guest, tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    path = tmp_path / "again"
    if call == "preadv":
        expect_log("can't be read from the checkpoint")
    before = living()
    for number in count(1):
        with FailingCall((call,), number, errno.EIO).installed() as failing:
            worked = await tried(lambda: save(guest, request(path)))
        if failing.failed is None:
            break
        assert not worked
        assert not path.exists() or call == "fsync"
        assert living() == before
    assert worked


async def test_a_save_in_which_every_channel_fails(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = living()

    def failing(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error (injected)")

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", failing)
            assert not await tried(lambda: save(guest, request(tmp_path / "again")))
        assert living() == before
    assert await tried(lambda: save(guest, request(tmp_path / "again")))


async def test_a_save_that_is_cancelled_in_each_state(guest: Guest, tmp_path: Path) -> None:
    before = living()
    for number in count(1):
        steps = 0

        def cancel_at_the_step(status: object, number: int = number) -> None:
            nonlocal steps
            steps += 1
            if steps == number:
                nursery.start_soon(tried, guest.migrations.cancel)

        guest.migrations.watch(cancel_at_the_step)
        cancelled_save = partial(save, guest, request(tmp_path / f"cancelled {number}"))
        async with trio.open_nursery() as nursery:
            worked = await tried(cancelled_save)
        if steps < number:
            break
        assert guest.migrations.newest.status == ("completed" if worked else "cancelled")
        assert worked == (tmp_path / f"cancelled {number}").exists()
        if not worked:
            assert living() == before
        else:
            before = living()
    assert number > 3  # setup, active, device, and then completed


def note_closing(monkeypatch: pytest.MonkeyPatch) -> list[Channels]:
    """The channels of a save, once they are told to close."""
    closing: list[Channels] = []
    aclose = Channels.aclose

    async def noted(channels: Channels) -> None:
        closing.append(channels)
        await aclose(channels)

    monkeypatch.setattr(Channels, "aclose", noted)
    return closing


async def wait_until_it_waits(closing: list[Channels], guest: Guest) -> None:
    """Return when a save that is ending waits for its payloads, or has ended without that."""
    while guest.migrations.newest.running:
        if closing and closing[0]._all_returned.statistics().tasks_waiting:
            return
        await trio.lowlevel.checkpoint()


async def test_a_save_is_over_only_when_nothing_writes_any_more(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = living()
    inside, may_go_on = threading.Event(), threading.Event()
    pwritev = os.pwritev
    closing = note_closing(monkeypatch)

    def held(*args: Any) -> int:
        inside.set()
        may_go_on.wait()
        return pwritev(*args)

    monkeypatch.setattr(os, "pwritev", held)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tried, lambda: save(guest, request(tmp_path / "again")))
        await trio.to_thread.run_sync(inside.wait)
        nursery.start_soon(tried, guest.migrations.cancel)
        await wait_until_it_waits(closing, guest)
        assert guest.migrations.newest.status == "cancelling"
        may_go_on.set()
    assert guest.migrations.newest.status == "cancelled"
    assert living() == before
    assert os.listdir(tmp_path) == ["checkpoint"]
