"""A migration's steps, and its cancellation."""

import pytest
import trio
import trio.testing

from ckptfs.errors import StateError
from ckptfs.guest.migration import Migrations
from ckptfs.migration.status import MigrationStatus


async def test_a_step_before_the_cancel_is_noticed() -> None:
    migrations = Migrations()
    seen: list[MigrationStatus] = []
    migrations.watch(seen.append)

    async def saved() -> None:
        async with migrations.run("save", "file:x") as migration:
            migration.advance(MigrationStatus.ACTIVE)
            trio.lowlevel.spawn_system_task(migrations.cancel)
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked()
            migration.advance(MigrationStatus.DEVICE)
            await trio.lowlevel.checkpoint()

    with pytest.raises(StateError, match="the save was cancelled"):
        await saved()
    assert seen == ["setup", "active", "cancelling", "cancelled"]
