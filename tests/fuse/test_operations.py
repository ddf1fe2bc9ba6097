"""What a caller gets when something fails behind a handler, and that the daemon outlives it."""

import contextlib
import errno
from collections.abc import Callable
from typing import Any, cast

import pytest
import trio
from pyfuse3 import FUSEError, InodeT, RequestContext

from ckptfs.errors import CheckpointError, CommandError, StateError, StorageError
from ckptfs.fuse import connection
from ckptfs.fuse.nodes import Nodes
from ckptfs.fuse.opening import Opening
from ckptfs.fuse.operations import Operations

NOBODY_ASKS = cast(RequestContext, None)


class FailingNodes:
    """Whatever is asked for, ``error`` is the answer."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


def failing(error: BaseException) -> Operations:
    return Operations(cast(Nodes, FailingNodes(error)), cast(Opening, None))


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (StateError("busy"), errno.EBUSY),
        (StateError("no", errno.EPERM), errno.EPERM),
        (CommandError("what?"), errno.EINVAL),
        (StorageError("full", errno.ENOSPC), errno.ENOSPC),
        (CheckpointError("broken", 7), errno.EINVAL),
        (OSError(errno.ENOMEM, "no memory"), errno.ENOMEM),
        (OSError("without a number"), errno.EIO),
        (FUSEError(errno.ENOENT), errno.ENOENT),
    ],
    ids=str,
)
async def test_an_error_is_its_errno(error: Exception, number: int) -> None:
    with pytest.raises(FUSEError) as caught:
        await failing(error).getattr(InodeT(1), NOBODY_ASKS)
    assert caught.value.errno == number


async def test_a_bug_is_eio_and_in_the_log(expect_log: Callable[[str], None]) -> None:
    expect_log("ERROR ckptfs.fuse.operations: getattr failed")
    with pytest.raises(FUSEError) as caught:
        await failing(KeyError("bug")).getattr(InodeT(1), NOBODY_ASKS)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("gone", [True, False])
async def test_a_handler_can_be_cancelled(gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as there is somebody who waits, he is told."""
    monkeypatch.setattr(connection, "is_gone", lambda: gone)

    class Waiting:
        async def open(self, *arguments: object) -> None:
            await trio.sleep_forever()

    class AnyNode:
        tree = property(lambda self: self)

        def node(self, inode: int) -> object:
            return object()

    operations = Operations(cast(Nodes, AnyNode()), cast(Opening, Waiting()))
    context = type("Context", (), {"pid": 1, "uid": 0, "gid": 0})()
    with trio.move_on_after(0) as scope, contextlib.nullcontext() if gone else pytest.raises(FUSEError) as told:
        await operations.open(InodeT(1), 0, context)
    assert scope.cancelled_caught == gone
    assert gone or told.value.errno == errno.ENOTCONN
