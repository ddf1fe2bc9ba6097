"""The stream from which stock QEMU starts on the RAM of a mount, and who may have it."""

import errno
from collections.abc import Collection

from ckptfs.errors import StateError
from ckptfs.guest.block import GuestBlock
from ckptfs.guest.guest import Guest
from ckptfs.mapped_ram.precopy import vmstate_stream
from ckptfs.migration.outgoing import page_windows
from ckptfs.qemu.memory import MachineMemory, memory_of
from ckptfs.qemu.users import RAMUser


def memory_on(guest: Guest, named: Collection[str]) -> MachineMemory:
    """The blocks that a machine has as memory backends on this mount; ``named`` is option backends=."""
    return memory_of(list(guest.blocks), named)


async def vmstate(guest: Guest, memory: MachineMemory, user: RAMUser, others: list[RAMUser]) -> bytes:
    """Return the stream from which stock QEMU starts on this RAM (`-incoming file:DIR/vmstate`).

    ``user`` is the process that asks for it, ``others`` are those that have some of RAM open. The stream leaves out
    what ``user`` has of this mount as its RAM: all of main memory at least. Everything else is inside of it. Pages
    that were written and hold what the checkpoint holds are no reason to refuse it (QEMU's prealloc=on).

    Raises StateError (EPERM), saying what to do, where RAM and device state would not belong together: QEMU itself
    would start such a guest without a word, and corrupt it.
    """
    if guest.base is None:
        raise StateError("this mount has no checkpoint", errno.ENOENT)
    _refuse_stranger(memory, user)
    _refuse_shared_use(user, others)
    if guest.has_written:
        await guest.drop_unchanged()
    if guest.has_written:
        raise StateError(
            "pages have been written since the checkpoint, so its device state does not match this RAM: "
            "`reset` drops them, `save` makes a new checkpoint",
            errno.EPERM,
        )
    left_out = [block.idstr for block in guest.base.checkpoint.blocks if block.idstr in user.holds]
    inside = [guest.blocks[block.idstr] for block in guest.base.checkpoint.blocks if block.idstr not in user.holds]
    pages = [run for block in inside for run in await _runs(guest, block)]
    stream = vmstate_stream(guest.base.checkpoint, left_out, pages, guest.base.setup, guest.base.device_state)
    if user.maps_shared:
        guest.machines.note_run()
    return stream


def _refuse_stranger(memory: MachineMemory, user: RAMUser) -> None:
    """The process has to have the machine's memory of this mount, or its RAM is somebody else's."""
    missing = [idstr for idstr in memory.main if idstr not in user.holds]
    if not missing and user.holds:
        return
    text = (
        f"the process does not have {', '.join(missing) or 'any RAM'} of this mount as its RAM: "
        "start QEMU with the arguments that `ckptfs qemu-args` prints"
    )
    if memory.by_name and user.holds:
        text += ", or name the blocks that are memory of the machine: mount with -o backends=ID:ID"
    raise StateError(text, errno.EPERM)


async def _runs(guest: Guest, block: GuestBlock) -> list[tuple[str, int, bytes]]:
    """All pages of a block that hold data, in runs: idstr, first page, bytes."""
    with_data = block.stack.with_data()
    runs = []
    for window in page_windows(with_data, guest.page_size):
        length = (window.stop - window.start) * guest.page_size
        data = await guest.read(block, window.start * guest.page_size, length)
        for start, stop in with_data.runs(*window):
            first, last = ((page - window.start) * guest.page_size for page in (start, stop))
            runs.append((block.idstr, start, bytes(data[first:last])))
    return runs


def _refuse_shared_use(user: RAMUser, others: list[RAMUser]) -> None:
    """RAM that one machine writes (share=on) is no other machine's, not even below its private copies."""
    for other in others:
        if other.maps_shared:
            problem = "has this RAM with share=on"
        elif user.maps_shared and other.maps_private:
            problem = "has this RAM with share=off, and would see what is written here"
        else:
            continue
        raise StateError(
            f"process {other.pid} {problem}: end it first, or have share=off for all machines on this mount",
            errno.EPERM,
        )
