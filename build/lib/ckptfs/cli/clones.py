"""ckptfs run --count: many clones, a line when all run, and an end for all of them when this ends."""

import signal
from collections.abc import AsyncIterator, Callable, Sequence

import trio

from ckptfs.channels.nursery import open_nursery
from ckptfs.qemu.clones import Clone
from ckptfs.qemu.herd import Member, end, start, wait_until_ended, wait_until_running


def run_clones(clones: Sequence[Clone], command: Callable[[Clone], list[str]], descriptors: Sequence[int]) -> None:
    """Run all ``clones``, each by its ``command``, until a signal comes or the last has ended.

    Raises QemuError, when all others have been ended, for one that ends before it runs; OSError.
    """
    trio.run(_run, clones, command, descriptors)


async def _run(clones: Sequence[Clone], command: Callable[[Clone], list[str]], descriptors: Sequence[int]) -> None:
    members: list[Member] = []
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with open_nursery() as nursery:
            nursery.start_soon(_cancel_on_signal, signals, nursery.cancel_scope)
            try:
                for clone in clones:
                    members.append(start(clone, command(clone), descriptors))
                for member in members:
                    await wait_until_running(member)
                _tell(f"{len(members)} clones run: N.qmp, N.serial and N.log are in {clones[0].directory}")
                await wait_until_ended(members, _tell)
            finally:
                with trio.CancelScope(shield=True):
                    await end(members)
            nursery.cancel_scope.cancel()


async def _cancel_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


def _tell(text: str) -> None:
    print(text, flush=True)
