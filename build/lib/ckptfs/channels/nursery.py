"""A nursery whose tasks do one thing together, and fail with one error."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """As `trio.open_nursery`, but it raises the leading error, not a group of all."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        raise leading_error(group) from None


def leading_error(error: BaseException) -> BaseException:
    """The error that matters in a group of them: the first that is no consequence of the others' end."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [leading_error(inner) for inner in error.exceptions]
    return next((leaf for leaf in leaves if not isinstance(leaf, trio.Cancelled)), leaves[0])
