"""A mount's lease: taken, renewed until the mount ends or it is lost, and given back."""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from ckptfs.channels.channels import BACKING_DEADLINE, CLOSING_DEADLINE, NoAnswerError
from ckptfs.channels.identity import Identity
from ckptfs.channels.lane import Lane
from ckptfs.channels.lease.places import LockPlace, Seen
from ckptfs.errors import CkptfsError, StateError
from ckptfs.namespace import lease
from ckptfs.namespace.lease import RENEWALS, Hold, Holder, Watch, read_holder

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOOKS = 15
"""In a term, at a lease that somebody else has."""

_WAYS_OUT = "save elsewhere (`save /PATH`), or take it back (`lock steal`)"


def _boot_time() -> float:
    """Seconds of a clock that goes on while this host sleeps, as those of others do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """The lease of one mount, wanted or not.

    State belongs to trio's thread, and to the calls in the lane: there is one at a time.
    """

    def __init__(self, find_place: Callable[[int], LockPlace], clock: Callable[[], float] = _boot_time) -> None:
        """``find_place``: opens the place where it is kept, but never on the device that it is given (blocking)."""
        self._find_place = find_place
        self._clock = clock
        self._lane = Lane()
        self._place: LockPlace | None = None
        self._seen = Seen(b"")
        self._hold: Hold | None = None
        self._kept = False
        self._note: Callable[[], None] = lambda: None

    def watch(self, note: Callable[[], None]) -> None:
        """Have ``note`` called whenever `state` has changed."""
        self._note = note

    @property
    def state(self) -> str | None:
        """``held``, or ``lost: `` and why; None where no lease was wanted."""
        if self._hold is None:
            return None
        problem = self._hold.lost(self._clock())
        return "held" if problem is None else f"lost: {problem}"

    def refuse_lost(self) -> None:
        """Raise StateError (EBUSY) if a lease was wanted, and is lost: nobody may save to the checkpoint then."""
        problem = None if self._hold is None else self._hold.lost(self._clock())
        if problem is not None:
            raise StateError(f"this mount has lost its lease ({self._name}): {problem}: {_WAYS_OUT}")

    @property
    def _name(self) -> str:
        return "" if self._place is None else self._place.name

    # ---- taking ------------------------------------------------------------------------------------

    async def take(self, tell: Callable[[str], None]) -> None:
        """Take it. If it is somebody's, see whether he renews it: ``tell`` is told that this takes a while.

        Raises StateError (EBUSY), naming the holder, if he does; CommandError, StorageError, OSError.
        """
        place = self._place = await self._ask(partial(self._find_place, -1))
        watch: Watch | None = None
        while True:
            seen = await self._ask(place.look)
            holder, now = read_holder(place.name, seen.text), self._clock()
            if holder is None or (watch is not None and watch.is_free(seen.text, now)):
                if await self._ask(partial(self._write_first, seen)):
                    return
                watch = None
            elif watch is None or watch.holder.token != holder.token:
                watch = Watch(holder, seen.text, now)
                tell(
                    f"{place.name}: is held by {holder}: looking for up to {holder.term:.0f} s whether it is alive"
                )
            elif watch.is_renewed(seen.text):
                raise StateError(
                    f"{place.name}: is held by {holder}, which renews it: `umount` it there first, or mount without"
                    " `exclusive` and write `lock steal` to ctl"
                )
            await trio.sleep((lease.TERM if watch is None else watch.holder.term) / _LOOKS)

    async def steal(self, identity: Identity, device: int) -> str:
        """Take it, whoever has it: for those who know that he is gone. ``device`` is that of the mount.

        Raises StorageError (EACCES) for a stranger; CommandError, OSError.
        """
        identity.refuse_stranger("lock steal", "take its lease")
        if self.state == "held":
            return f"{self._name}: is held already"
        place = self._place
        if place is None:
            place = self._place = await self._ask(partial(self._find_place, device))
        while True:
            seen = await self._ask(place.look)
            former = read_holder(place.name, seen.text)
            if await self._ask(partial(self._write_first, seen)):
                break
        self._note()
        log.warning("%s: taken from %s", place.name, former or "nobody")
        return f"{place.name}: taken from {former}" if former else f"{place.name}: taken; nobody had it"

    async def _ask(self, call: Callable[[], T]) -> T:
        return await self._lane.ask(call, deadline=BACKING_DEADLINE)

    def _write_first(self, seen: Seen) -> bool:
        """Make it ours in the place of ``seen``, if that is still there."""
        assert self._place is not None
        began, holder = self._clock(), _this_mount()
        written = self._place.swap(seen, holder.text())
        if written is None:
            return False
        self._seen, self._hold = written, Hold(holder, began)
        return True

    # ---- keeping -----------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Renew it, if it is held, until somebody else has it; what becomes of it is told in the log."""
        if self._kept:
            return
        self._kept = True
        try:
            while self._hold is not None and not self._hold.taken:
                await self._keep_for_a_while(self._hold)
        finally:
            self._kept = False

    async def _keep_for_a_while(self, hold: Hold) -> None:
        was_lost = hold.lost(self._clock())
        pause = hold.holder.term / RENEWALS / (1 if hold.problem is None else 2)
        await trio.sleep(pause)
        try:
            await self._lane.ask(self._renew, deadline=pause / 2)
        except (CkptfsError, OSError) as error:
            hold.problem = "no answer" if isinstance(error, NoAnswerError) else str(error)
        is_lost = hold.lost(self._clock())
        if (is_lost is None) != (was_lost is None):
            self._note()
            if is_lost is None:
                log.warning("%s: is held again", self._name)
            else:
                log.error("%s: the lease is lost: %s: this mount does not save there any more", self._name, is_lost)

    def _renew(self) -> None:
        """Write it anew, if it is still ours. A write of before may have been done though nobody heard of it."""
        place, hold = self._place, self._hold
        assert place is not None
        assert hold is not None
        self._lane.go_on()
        began, holder = self._clock(), hold.holder.renewed()
        written = place.swap(self._seen, holder.text())
        if written is None:
            seen = place.look()
            found = read_holder(place.name, seen.text)
            if found is None or found.token != holder.token:
                hold.take(found)
                return
            written = place.swap(seen, holder.text())
        if written is not None:
            self._seen = written
            hold.renewed(holder, began)

    async def release(self) -> None:
        """Leave it to others, if it is held; within seconds, also where the storage does not answer."""
        if self._hold is None or self._hold.taken or self._place is None:
            return
        try:
            await self._lane.ask(partial(self._place.free, self._seen), deadline=CLOSING_DEADLINE)
        except (CkptfsError, OSError) as error:
            log.warning("%s: can't be given back, and is free in a while: %s", self._name, error)
        self._hold = None


def _this_mount() -> Holder:
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S UTC}",
        token=secrets.token_hex(16),
        term=lease.TERM,
    )
