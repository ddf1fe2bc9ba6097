"""Two machines on one RAM: refused at the open where it can be seen then, told as soon as it is seen otherwise.

A new machine takes the RAM for its own. What a process maps the daemon is not told: it looks into /proc
when a file in ram/ is opened, a moment after that, and when RAM is saved.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable

import trio

from ckptfs.errors import StateError
from ckptfs.fuse.events import Changes
from ckptfs.fuse.ram_files import Opener, RAMFiles
from ckptfs.qemu.users import RAMUser, begins_anew, machines, shared_use

log = logging.getLogger(__name__)

MAPPING_DELAY = 2.0
"""Seconds after which a machine that has opened its RAM has mapped it."""


class Sharing:
    """What the machines on the files in ram/ do to one another; ``problem`` says it, None if they do nothing."""

    def __init__(
        self, ram_files: RAMFiles, changes: Changes, start_soon: Callable[[Callable[[], Awaitable[None]]], None]
    ) -> None:
        self._ram_files = ram_files
        self._changes = changes
        self._start_soon = start_soon
        self.problem: str | None = None

    async def refuse_second(self, idstr: str, opener: Opener) -> None:
        """Raise StateError (EBUSY) if ``opener`` is a new machine, and another has the block with share=on."""
        others = self._ram_files.openers - {opener.pid}
        if not others or not await trio.to_thread.run_sync(begins_anew, opener.pid):
            return
        for user in await self._machines(others, [idstr]):
            if idstr in user.maps_shared:
                raise StateError(
                    f"{idstr}: is the RAM of the machine in process {user.pid} (share=on): "
                    "a second machine needs a mount of its own, or share=off for both"
                )

    def look_soon(self) -> None:
        """Look when those who have opened RAM by now have mapped it."""
        if len(self._ram_files.openers) > 1:
            self._start_soon(self._look_later)

    async def _look_later(self) -> None:
        await trio.sleep(MAPPING_DELAY)
        await self.look()

    async def look(self) -> str | None:
        """Find out about `problem`; what is new of it goes to the log."""
        problem = shared_use(await self._machines(self._ram_files.openers, self._ram_files.idstrs))
        if problem != self.problem:
            self.problem = problem
            self._changes.note()
            if problem is not None:
                log.warning("%s", problem)
        return problem

    async def _machines(self, pids: set[int], idstrs: Iterable[str]) -> list[RAMUser]:
        if not pids:
            return []
        files = self._ram_files.files(idstrs)
        return await trio.to_thread.run_sync(machines, pids, files, abandon_on_cancel=True)
