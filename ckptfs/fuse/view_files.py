"""The files in views/: found out anew whenever the checkpoint below is another one."""

from collections.abc import Collection, Sequence

from ckptfs.guest.base import Base
from ckptfs.guest.guest import Guest
from ckptfs.guest.views import Views, look
from ckptfs.guest.vmstate import memory_on
from ckptfs.physical.layouts import Layout
from ckptfs.physical.memory_map import words_of


class ViewFiles:
    """What views/ holds. ``generation`` counts the checkpoints that were looked at: each has files of its own, as
    the kernel keeps what it has read of one.

    ``backends`` and ``named`` are the mount options backends= and map=.
    """

    def __init__(self, guest: Guest, backends: Collection[str], named: Sequence[str]) -> None:
        self._guest = guest
        self._backends = backends
        self._named = named
        self._views = Views()
        self._base: Base | None = None
        self._was_written = False
        self.generation = 0

    async def refresh(self) -> None:
        """Look at the checkpoint if it is another one than before, or if RAM was written at the last look."""
        base, generation = self._guest.base, self.generation
        if base is self._base and (not self._was_written or self._guest.has_written):
            return
        views = await look(self._guest, memory_on(self._guest, self._backends), self._named)
        if base is self._guest.base and generation == self.generation:  # nobody else has looked, and it is the same
            self._views, self._base, self._was_written = views, base, self._guest.has_written
            self.generation += 1

    @property
    def names(self) -> Collection[str]:
        """Those that there are."""
        return self._views.layouts

    @property
    def missing(self) -> dict[str, str]:
        """Why others are not there, by their names."""
        return {name: words_of(error, "-o map=") for name, error in self._views.missing.items()}

    def layout(self, name: str) -> Layout:
        """What a file is made of."""
        return self._views.layouts[name]
