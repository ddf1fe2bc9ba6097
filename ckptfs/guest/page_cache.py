"""What a guest asks of the kernel, which has its RAM in the page cache when it is mounted."""

import contextlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Protocol

from ckptfs.qemu.backends import RAMFile


class PageCache(Protocol):
    """The kernel's cache of RAM, above the daemon."""

    @property
    def device(self) -> int:
        """st_dev of the mount; -1 before there is one."""
        ...

    async def flush(self, idstrs: list[str]) -> None:
        """Have every page that was dirtied through mmap written to the daemon."""

    def settled(self, idstrs: list[str]) -> contextlib.AbstractAsyncContextManager[None]:
        """Within this, the daemon holds the newest content of every page, and nothing can change it."""
        ...

    async def forget(self, idstrs: Iterable[str]) -> None:
        """Have the kernel drop what it holds: the content has changed below it."""

    def files(self, idstrs: Iterable[str]) -> list[RAMFile]:
        """The files that the blocks are seen as."""
        ...


class NoPageCache:
    """That of a guest that is not mounted: there is nothing above the daemon."""

    device = -1

    async def flush(self, idstrs: list[str]) -> None:
        """Nothing is held back."""

    @asynccontextmanager
    async def settled(self, idstrs: list[str]) -> AsyncIterator[None]:
        """RAM is at rest between two awaits."""
        yield

    async def forget(self, idstrs: Iterable[str]) -> None:
        """Nothing is held."""

    def files(self, idstrs: Iterable[str]) -> list[RAMFile]:
        """There are none."""
        return []
