"""A save that is held in its middle: RAM is frozen, nothing is written yet."""

import errno
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from ckptfs.guest.guest import Guest
from ckptfs.guest.saving import SaveRequest, save


class HeldSave:
    """How a save that was held went: ``outcome`` is its answer, ``error`` what it raised."""

    def __init__(self) -> None:
        self.outcome: str | None = None
        self.error: BaseException | None = None
        self.fails = False
        """Set it, and the disk is full when the save goes on."""
        self._reached, self._may_go_on = threading.Event(), threading.Event()

    def hold(self) -> None:
        """Called in the worker thread that is about to write."""
        self._reached.set()
        self._may_go_on.wait()
        if self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def wait_reached(self) -> None:
        await trio.to_thread.run_sync(self._reached.wait)

    def go_on(self) -> None:
        """Let it go on before the end of the context."""
        self._may_go_on.set()


@asynccontextmanager
async def held_save(guest: Guest, request: SaveRequest) -> AsyncIterator[HeldSave]:
    """Save ``guest`` in the background; within this the epoch has begun and the save waits."""
    held = HeldSave()
    plain_pwrite = os.pwrite

    def pwrite(fd: int, *args: Any) -> int:
        if threading.current_thread() is not threading.main_thread():  # memory is written by the main thread
            held.hold()
        return plain_pwrite(fd, *args)

    async def run() -> None:
        try:
            held.outcome = await save(guest, request)
        except Exception as error:  # noqa: BLE001 (the test looks at it)
            held.error = error

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "pwrite", pwrite)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await held.wait_reached()
            try:
                yield held
            finally:
                held.go_on()
