"""RAM is at rest between two awaits alone: what has to happen then does, and nothing else runs meanwhile."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from ckptfs.guest.guest import Guest
from ckptfs.guest.page_cache import NoPageCache
from ckptfs.guest.saving import save
from tests.doubles.checkpoints import save_request
from tests.doubles.steps import Steps

PAGE = 4096


class Moment(NoPageCache):
    """Looks, at the very end of `settled`, whether it ``has_happened``, and whether anything was awaited."""

    def __init__(self, has_happened: Callable[[], bool]) -> None:
        self._has_happened = has_happened
        self.count = 0

    @asynccontextmanager
    async def settled(self, idstrs: list[str]) -> AsyncIterator[None]:
        steps = Steps()
        await trio.lowlevel.checkpoint()
        trio.lowlevel.add_instrument(steps)
        yield
        trio.lowlevel.remove_instrument(steps)
        assert not steps.count, "something was awaited while RAM was at rest"
        assert self._has_happened(), "RAM was let go too early"
        self.count += 1


@pytest.fixture
def guest() -> Guest:
    return Guest.fresh([("pc.ram", 8 * PAGE), ("vga.vram", 2 * PAGE)])


async def test_the_epoch_of_a_save_begins_while_ram_is_at_rest(guest: Guest, tmp_path: Path) -> None:
    moment = Moment(lambda: all(len(block.stack.written) == 2 for block in guest.blocks.values()))
    guest.mounted(moment)
    await save(guest, save_request(tmp_path / "checkpoint"))
    assert moment.count == 1
    guest.close()


async def test_writers_are_held_while_ram_is_at_rest(guest: Guest) -> None:
    moment = Moment(lambda: not guest.writers_run)
    guest.mounted(moment)
    await guest.hold_writers()
    assert moment.count == 1
    guest.close()
