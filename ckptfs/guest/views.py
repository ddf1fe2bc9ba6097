"""A checkpoint's memory in the forms that debuggers open: laid out by `physical.look`, read where RAM is.

What can't be made of a checkpoint is left out, and `Views.missing` says why. All views are of the checkpoint's one
moment: registers belong to RAM as device state does, so once RAM was written nothing that is made of it is served
(`refuse_written`). The texts do not change.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field

from ckptfs.errors import CkptfsError, StateError
from ckptfs.guest.base import Base
from ckptfs.guest.guest import Guest
from ckptfs.physical.layouts import Layout
from ckptfs.physical.look import MAKERS, Known, Looker, awaited
from ckptfs.qemu.memory import MachineMemory

_READ_LENGTH = 1 << 20


@dataclass
class Views:
    """What there is of one base: layouts by name, and why the others are missing."""

    layouts: dict[str, Layout] = field(default_factory=dict)
    missing: dict[str, CkptfsError | OSError] = field(default_factory=dict)


async def look(guest: Guest, memory: MachineMemory, named: Sequence[str] = ()) -> Views:
    """Find out what can be shown of the guest's base.

    ``memory`` is what its blocks are to a machine, ``named`` is the user's memory map (`parse_map`). Reads a few
    pages of RAM: the firmware's tables, and a kernel's note and page tables.
    """
    views = Views()
    if guest.base is None:
        return views
    known = Known(memory.main, memory.plugged, guest.base.trailer, named)
    looker = Looker(guest.base.checkpoint, _DeviceState(guest.base), known)
    for name, make in MAKERS.items():
        try:
            views.layouts[name] = await awaited(make(looker), lambda place: _read_block(guest, *place))
        except (CkptfsError, OSError) as error:
            views.missing[name] = error
    return views


def refuse_written(guest: Guest, layout: Layout) -> None:
    """Raise StateError (EPERM) for a view of RAM that is not the checkpoint's any more."""
    if layout.has_memory and guest.has_written:
        raise StateError(
            "pages have been written since the checkpoint, so its registers do not match this RAM: "
            "`reset` drops them, `save` makes a new checkpoint",
            errno.EPERM,
        )


async def read_layout(guest: Guest, layout: Layout, offset: int, length: int) -> bytes:
    """Return up to ``length`` bytes of a view; fewer only at its end. Raises StorageError for a bad page."""
    parts = []
    for size, content in layout.pieces(offset, length):
        if content is None:
            parts.append(bytes(size))
        elif isinstance(content, bytes):
            parts.append(content)
        else:
            parts.append(await _read_block(guest, content.idstr, content.block_offset, size))
    return b"".join(parts)


async def _read_block(guest: Guest, idstr: str, block_offset: int, length: int) -> bytes:
    """Bytes of a block, as many as one likes."""
    stop = block_offset + length
    starts = range(block_offset, stop, _READ_LENGTH)
    return b"".join(
        [bytes(await guest.read(guest.blocks[idstr], start, min(_READ_LENGTH, stop - start))) for start in starts]
    )


class _DeviceState:
    """The device state of a base as a source: bytes by their offset in the file."""

    def __init__(self, base: Base) -> None:
        self._data = base.device_state
        self._start = base.checkpoint.device_state_offset
        self.length = self._start + len(self._data)

    def pread(self, file_offset: int, length: int) -> bytes:
        """Bytes of the device state."""
        return self._data[file_offset - self._start : file_offset - self._start + length]
