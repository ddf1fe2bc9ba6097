"""A live checkpoint put together: frozen RAM of the mount, and all else out of QEMU's device state stream."""

import errno
from collections.abc import Collection
from dataclasses import replace

from ckptfs.errors import QemuError
from ckptfs.guest.block import PageStack
from ckptfs.guest.layer import Layer
from ckptfs.guest.outgoing import Epoch
from ckptfs.mapped_ram.checkpoint import Checkpoint, read_device_state, read_setup, with_run_state
from ckptfs.mapped_ram.layout import Image, image_of
from ckptfs.mapped_ram.precopy import PrecopyStream, read_precopy
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.stream import BytesSource
from ckptfs.qemu.capture.mounted import Capture
from ckptfs.qemu.memory import memory_of


def compose(capture: Capture[Epoch], blocks: Collection[str]) -> tuple[Epoch, Image]:
    """Return the epoch with all of QEMU's RAM blocks, and the image to write beside it.

    Blocks of the mount are in the epoch already; small ones (VGA memory, ROMs) come with the stream, as page
    records. Raises QemuError if QEMU's blocks and the mount's do not fit together.
    """
    source = BytesSource(capture.stream)
    stream = read_precopy(source)
    checkpoint = stream.checkpoint
    frozen = capture.epoch.stacks
    _check_blocks(checkpoint, frozen, memory_of(list(blocks)).main)
    _refuse_left_out(checkpoint, stream, frozen)
    carried = {
        block.idstr: _stack_of(stream, source, block) for block in checkpoint.blocks if block.idstr not in frozen
    }
    device_state = with_run_state(read_device_state(source, checkpoint), checkpoint, capture.run_state)
    image = replace(image_of(checkpoint, read_setup(source, checkpoint), device_state), run_state=capture.run_state)
    return Epoch(frozen | carried, capture.epoch.base, frozenset(carried)), image


def left_out(epoch: Epoch, blocks: Collection[str]) -> list[str]:
    """The blocks of the mount that are no RAM of this QEMU now: reserved for memory devices, or unplugged again."""
    return [idstr for idstr in blocks if idstr not in epoch.stacks]


def _check_blocks(checkpoint: Checkpoint, frozen: dict[str, PageStack], memory: Collection[str]) -> None:
    """QEMU must have the main ``memory`` of the mount, and all that is frozen in the same size."""
    lengths = {block.idstr: block.used_length for block in checkpoint.blocks}
    for idstr in memory:
        if idstr not in lengths:
            raise QemuError(f"the block {idstr!r} of this mount is no RAM of this QEMU", errno.EINVAL)
    for idstr, stack in frozen.items():
        length = stack.page_count * checkpoint.page_size
        if lengths[idstr] != length:
            raise QemuError(
                f"QEMU's RAM {idstr!r} has {lengths[idstr]} bytes, the mount's block {length}", errno.EINVAL
            )


def _refuse_left_out(checkpoint: Checkpoint, stream: PrecopyStream, frozen: dict[str, PageStack]) -> None:
    """A block without any record is one that QEMU left out: RAM in a shared file that is none of ours."""
    for block in checkpoint.blocks:
        if block.idstr not in frozen and block.idstr not in stream.page_offsets:
            raise QemuError(
                f"QEMU's RAM {block.idstr!r} lies in a shared file, and is no block of main memory on this mount: "
                "QEMU leaves it out of a checkpoint; give its device (ivshmem?) a memory-backend-ram",
                errno.EINVAL,
            )


def _stack_of(stream: PrecopyStream, source: BytesSource, block: RAMBlock) -> PageStack:
    """A block's content as the stream has it, in a layer of its own."""
    layer = Layer(block.idstr, block.page_count, block.page_size)
    for run in stream.file_bmap(block.idstr).runs():
        pages = stream.read_pages(source, block.idstr, run.start, run.stop)
        layer.store(run.start * block.page_size, pages.reshape(-1).data)
    return PageStack(block.page_count, (layer,), None, None)
