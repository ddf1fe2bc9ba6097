"""The QEMU behind a mount: where its monitor is, and how it was last seen."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptfs.channels.identity import Identity
from ckptfs.errors import QemuError

if TYPE_CHECKING:
    from ckptfs.qemu.monitor import Monitor


@dataclass
class Machine:
    """The QEMU that runs on this RAM: where its monitor is, as whom to connect to it, and how it was last seen.

    ``state`` is "waiting" until it was once reached, then "connected" or "lost".
    """

    qmp_path: str
    identity: Identity
    state: str = "waiting"
    run_state: str | None = None

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator["Monitor"]:
        """Connect to the QMP socket for as long as this lasts; QemuError if that fails."""
        from ckptfs.qemu.monitor import connected  # asyncio is slow to import, and most mounts have no machine

        self.state = "lost" if self.state == "connected" else self.state
        async with connected(self.qmp_path, self.identity) as monitor:
            self.state = "connected"
            try:
                await self._look(monitor)
                yield monitor
            except QemuError as error:
                self._note_loss(error)
                raise
            try:
                await self._look(monitor)
            except QemuError as error:  # what was to be done has been done
                self._note_loss(error)

    async def _look(self, monitor: "Monitor") -> None:
        self.run_state = (await monitor.execute("query-status"))["status"]

    def _note_loss(self, error: QemuError) -> None:
        if error.errno in (errno.EPIPE, errno.ETIMEDOUT):
            self.state = "lost"
