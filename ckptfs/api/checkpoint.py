"""A checkpoint as a program sees it, without a mount.

::

    with ckptfs.open("/ckpt/vm1") as checkpoint:
        ram = checkpoint.blocks["pc.ram"]
        ram[0x1000:0x2000]                                 # a numpy array, read-only
        checkpoint.physical.read(0x100000000, 64)          # above the hole
        checkpoint.registers()[0]["rip"]
        checkpoint.device("mc146818rtc").value("cmos_data")
"""

import errno
import mmap
import os
from collections.abc import Sequence
from functools import cached_property
from types import TracebackType
from typing import Self

import numpy as np

from ckptfs.api.blocks import Block, Pages, PhysicalMemory, read_place
from ckptfs.channels.backing_file import FileSource
from ckptfs.channels.opened import Opened, open_file
from ckptfs.errors import CommandError
from ckptfs.guest.mappable import stale_page
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.sections import Section
from ckptfs.physical.devices import DeviceState, read_device
from ckptfs.physical.look import Known, Looker, seen
from ckptfs.physical.vmcoreinfo import text_of
from ckptfs.qemu.memory import memory_of


class OpenCheckpoint:
    """An open checkpoint, until `close` or the end of a ``with``; arrays of it can be used after that."""

    def __init__(self, opened: Opened, named: Sequence[str] = ()) -> None:
        self._opened = opened
        self._checkpoint = opened.checkpoint
        memory = memory_of([block.idstr for block in self._checkpoint.blocks])
        known = Known(memory.main, memory.plugged, opened.trailer, named)
        self._looker = Looker(self._checkpoint, FileSource(opened.fd), known)
        self.path = opened.path
        """The file, as it was named."""
        self.blocks = {
            block.idstr: _block_of(opened, block, opened.content.file_bmaps[block.idstr])
            for block in self._checkpoint.blocks
            if block.idstr in opened.content.file_bmaps
        }
        """The RAM blocks that are in the file, by idstr; x-ignore-shared leaves some out."""

    @property
    def machine(self) -> str:
        """QEMU's machine type."""
        return self._checkpoint.machine

    @property
    def run_state(self) -> str | None:
        """Whether the machine was ``running`` or ``paused`` ...; None if the checkpoint does not tell."""
        return self._checkpoint.run_state

    @cached_property
    def physical(self) -> PhysicalMemory:
        """Memory by guest-physical address. Raises CheckpointError where that is not known: `open` takes a map."""
        memory = seen(self._looker.memory_map(), lambda place: read_place(self.blocks, place))
        return PhysicalMemory(memory, self.blocks)

    def registers(self) -> list[dict[str, int]]:
        """The registers of each vCPU by name (x86-64). Raises CheckpointError where there are none to be told."""
        return [registers.named() for registers in self._looker.registers()]

    def vmcoreinfo(self) -> str:
        """What a Linux kernel tells debuggers, lines ``NAME=VALUE``. Raises CheckpointError where it has not."""
        return text_of(seen(self._looker.note(), lambda place: read_place(self.blocks, place)))

    @property
    def devices(self) -> list[tuple[str, int]]:
        """The device sections in the order of the file: idstr and instance."""
        return [(section.idstr, section.instance_id) for section in self._sections]

    def device(self, idstr: str, instance: int | None = None) -> DeviceState:
        """The state of a device: ``fields`` by name, `value` of one, `values` of all, and the raw ``payload``.

        Without ``instance`` it is the first of that name. Raises CommandError if there is no such device;
        CheckpointError where its fields can't be told (no vmdesc).
        """
        for section in self._sections:
            if section.idstr == idstr and instance in (None, section.instance_id):
                return read_device(FileSource(self._opened.fd), self._checkpoint, section)
        which = idstr if instance is None else f"{idstr} {instance}"
        raise CommandError(f"{self.path}: has no device {which}", errno.ENOENT)

    @property
    def _sections(self) -> tuple[Section, ...]:
        return *self._checkpoint.setup_sections, *self._checkpoint.sections

    def close(self) -> None:
        """Close the file."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str], *, offset: int = 0, map: Sequence[str] = ()) -> OpenCheckpoint:  # noqa: A002
    """Open the checkpoint at ``path``: a mapped-ram file or a plain stream, of QEMU, libvirt or ckptfs.

    ``offset`` is where in the file it begins, in bytes. ``map`` tells where RAM blocks are in physical memory, as
    the mount option does (``["pc.ram@0+3G", "pc.ram@4G:3G"]``), where the checkpoint does not.

    Raises CheckpointError, naming file and byte, if it is not whole and sound; StorageError or OSError if it can't
    be read.
    """
    return OpenCheckpoint(open_file(os.fspath(path), offset), map)


def _block_of(opened: Opened, block: RAMBlock, file_bmap: PagesBitmap) -> Block:
    return Block(
        block.idstr,
        block.page_size,
        file_bmap,
        lambda start, stop: opened.read_pages(block, start, stop),
        lambda: _mapped(opened, block, file_bmap),
    )


def _mapped(opened: Opened, block: RAMBlock, file_bmap: PagesBitmap) -> Pages | None:
    """The block as it lies in the file; None where that is not what the block holds."""
    if block.pages_offset is None or block.used_length == 0:
        return None
    if stale_page(opened.fd, block, file_bmap) is not None:
        return None
    start = block.pages_offset % mmap.ALLOCATIONGRANULARITY
    try:
        memory = mmap.mmap(
            opened.fd,
            start + block.used_length,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ,
            offset=block.pages_offset - start,
        )
    except (OSError, ValueError):  # a storage that maps nothing; a file that ends before the block does
        return None
    return np.frombuffer(memory, np.uint8)[start:]
