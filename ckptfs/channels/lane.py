"""The blocking calls on one file, one after another, each in a thread that can be left behind.

A storage may never answer open, fsync or rename, and a thread that waits for it can't be interrupted. So whoever
waits for the thread can go: when a command is cancelled, the mount ends, or a deadline passes. The thread gets a
moment to come back first. The next call on the file waits for it: nothing is closed or removed under its hands.

Who goes must know whether the call still counts. One token decides that, and who takes it first: the thread, when
it has its result or is about to do what can't be undone; or the waiter, when he goes. A result that comes while he
goes is undone all the same, unless the call has committed itself.
"""

import contextlib
import math
import threading
from collections.abc import Callable
from typing import TypeVar

import trio

from ckptfs.channels.channels import CLOSING_DEADLINE, NoAnswerError
from ckptfs.errors import StorageError

T = TypeVar("T")


class LeftBehindError(Exception):
    """Nobody waits for the call any more, and it must not go on; raised in its thread, where nobody sees it."""


class _Token:
    """Can be taken once, by whichever thread is first: list.pop is atomic."""

    def __init__(self) -> None:
        self._tokens = [None]

    def take(self) -> bool:
        """Take it; False if it was taken before."""
        try:
            self._tokens.pop()
        except IndexError:
            return False
        return True

    @property
    def taken(self) -> bool:
        """Whether it was."""
        return not self._tokens


class Lane:
    """The calls on one file."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._token = _Token()
        self._committed = False

    def commit(self) -> None:
        """In a call, before what can't be undone: from here on it counts, whoever goes.

        Raises LeftBehindError if nobody waits for it any more.
        """
        if not self._committed and not self._token.take():
            raise LeftBehindError
        self._committed = True

    def go_on(self) -> None:
        """In a call that takes long: raises LeftBehindError if nobody waits for it any more."""
        if self._token.taken and not self._committed:
            raise LeftBehindError

    async def ask(
        self,
        call: Callable[[], T],
        *,
        undo: Callable[[T], object] = lambda result: None,
        deadline: float = math.inf,
    ) -> T:
        """Run ``call`` in a worker thread, after all that were asked before, and return what it returns.

        When this is cancelled, or ``deadline`` (seconds) has passed, which raises NoAnswerError, the call does not
        count: if it has a result after all, its thread gives that to ``undo``. One that has committed does count;
        StorageError if it does not come back then.
        """
        token = _Token()
        answered = trio.Event()
        results: list[T] = []
        errors: list[BaseException] = []
        trio_token = trio.lowlevel.current_trio_token()

        def run() -> None:
            with self._one_at_a_time:
                self._token, self._committed = token, False
                try:
                    result = call()
                    if self._committed or token.take():
                        results.append(result)
                    else:
                        undo(result)
                except BaseException as error:  # noqa: BLE001 - it is raised where the call is waited for
                    if self._committed or token.take():
                        errors.append(error)
            with contextlib.suppress(trio.RunFinishedError):
                trio_token.run_sync_soon(answered.set)

        trio.lowlevel.start_thread_soon(run, lambda outcome: None)
        try:
            with trio.CancelScope(deadline=trio.current_time() + deadline):
                await answered.wait()
        except trio.Cancelled:
            if await _leave(token, answered) or not self._committed:
                if results:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(undo, results.pop())
                raise
        if not answered.is_set() and await _leave(token, answered):
            raise NoAnswerError(deadline)
        if results:
            return results.pop()
        if errors:
            raise errors.pop()  # and keep it nowhere: its traceback has this frame
        raise StorageError("the backing storage does not answer: whether the last step was done is unknown")


async def _leave(token: _Token, answered: trio.Event) -> bool:
    """Go, if the call does not count yet; return whether that is so. Either way it gets a moment to come back."""
    left = token.take()
    with trio.CancelScope(deadline=trio.current_time() + CLOSING_DEADLINE, shield=True):
        await answered.wait()
    return left
