"""Open files, and what is left of them once they are released."""

import gc
import os
import weakref

from ckptfs.fuse.events import Changes, EventLog
from ckptfs.fuse.handles import EventsHandle, Handle, StatusHandle
from ckptfs.fuse.ram_files import Opener
from ckptfs.namespace.events import MIGRATION

OPENER = Opener(os.O_RDONLY, pid=1, uid=0, gid=0)


def is_gone(handle: "weakref.ref[Handle]") -> bool:
    gc.collect()
    return handle() is None


async def test_a_released_reader_of_events_gets_no_more_lines_kept() -> None:
    events = EventLog()
    left, stays = EventsHandle(5, OPENER, events), EventsHandle(5, OPENER, events)
    events.publish(MIGRATION, "setup")
    assert b"setup" in await stays.read(0, 1000)
    left.release()
    released = weakref.ref(left)
    del left
    assert is_gone(released)
    events.publish(MIGRATION, "active")
    assert b"active" in await stays.read(0, 1000)


async def test_a_released_reader_of_status_is_not_woken() -> None:
    changes = Changes()
    handle = StatusHandle(3, OPENER, changes, lambda: "status\n")
    assert await handle.read(0, 1000) == b"status\n"
    handle.poll(None)
    handle.release()
    released = weakref.ref(handle)
    del handle
    assert is_gone(released)
    changes.note()


class FakePollHandle:
    """pyfuse3's: good for one wake-up."""

    def __init__(self) -> None:
        self.notified = 0

    def notify(self) -> None:
        self.notified += 1


async def test_whoever_has_gone_is_not_woken() -> None:
    changes = Changes()
    polls = [FakePollHandle() for _ in range(2)]
    handles = [StatusHandle(3, OPENER, changes, lambda: "") for _ in polls]
    for handle, poll in zip(handles, polls, strict=True):
        await handle.read(0, 10)
        assert handle.poll(poll) == 0  # type: ignore[arg-type]
    handles[0].release()
    changes.note()
    changes.note()
    assert [poll.notified for poll in polls] == [0, 1]
