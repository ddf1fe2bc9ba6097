"""Many guests from one checkpoint, each with a private copy of what it writes."""

from contextlib import AsyncExitStack

from tests.live.machines import SMALL, LiveCheckpoints, assert_holds, goes_on
from tests.mount.conftest import Mount


async def test_four_clones_of_one_mount(checkpoints: LiveCheckpoints, mount: Mount) -> None:
    checkpoint = checkpoints.live(SMALL)
    mounted = mount(checkpoint.path)
    incoming = f"file:{mounted.path}/vmstate"
    async with AsyncExitStack() as stack:
        clones = [
            await stack.enter_async_context(
                SMALL.on(mounted.ram, checkpoint.guest, share="share=off", incoming=incoming)
            )
            for _ in range(4)
        ]
        firsts = [await vm.tick() for vm in clones]
        assert all(first == firsts[0] > checkpoint.last_tick for first in firsts), firsts
        for vm in clones:
            await goes_on(vm)
        assert mounted.status()["vmstate"] == "ready"
    assert mounted.status()["written-pages"] == 0
    assert_holds(mounted.ram, checkpoint.path)
