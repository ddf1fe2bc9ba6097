"""The note VMCOREINFO, with which a Linux kernel tells debuggers about itself (Documentation/admin-guide/kdump).

The guest hands QEMU its address through the device ``vmcoreinfo`` (hw/misc/vmcoreinfo.c, 10.0), if it has one and
loads the driver qemu_fw_cfg. Elsewhere it lies at the beginning of a page, and has to be looked for. The guest
may write anything there: sizes are limited, and a note that does not fit is none.
"""

import re
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckptfs.errors import CheckpointError
from ckptfs.physical.devices import DeviceState

MAX_NOTE_LENGTH = 1 << 16
"""QEMU takes a note of up to 1 MiB; Linux fills a page."""

NAME = b"VMCOREINFO\0"
_HEADER = struct.Struct("<III")
HEAD_LENGTH = _HEADER.size + 12
"""Bytes of a note's header and its name, padded."""

_KERNEL_OFFSET = re.compile(rb"^KERNELOFFSET=([0-9a-f]{1,16})$", re.MULTILINE)
_PHYS_BASE = re.compile(rb"^NUMBER\(phys_base\)=(-?[0-9]{1,20})$", re.MULTILINE)


@dataclass(frozen=True)
class NotePlace:
    """Where in physical memory a note lies."""

    address: int
    length: int


def place_of(device: DeviceState) -> NotePlace | None:
    """Where the guest said that its note is; None if it has not said so."""
    if device.number("has_vmcoreinfo") != 1 or device.number("vmcoreinfo.guest_format") != 1:
        return None
    place = NotePlace(device.number("vmcoreinfo.paddr"), device.number("vmcoreinfo.size"))
    return place if HEAD_LENGTH < place.length <= MAX_NOTE_LENGTH else None


def check_note(data: bytes) -> bytes:
    """Return the note that ``data`` begins with, padded as notes are. Raises CheckpointError if it is none."""
    length = note_length(data)
    if length is None or length > len(data):
        raise CheckpointError("what lies where the guest said is no VMCOREINFO note")
    return data[:length]


def note_length(head: bytes) -> int | None:
    """Bytes of the note whose first `HEAD_LENGTH` bytes are given, padding included; None if it is none."""
    if len(head) < HEAD_LENGTH:
        return None
    name_length, description_length, kind = _HEADER.unpack_from(head)
    if (name_length, kind) != (len(NAME), 0) or head[_HEADER.size :][: len(NAME)] != NAME:
        return None
    length = HEAD_LENGTH + -(-int(description_length) // 4) * 4
    return length if length <= MAX_NOTE_LENGTH else None


def note_pages(data: npt.NDArray[np.uint8], page_size: int) -> list[int]:
    """The pages of ``data`` (whole pages) that begin as such a note does."""
    heads = data.reshape(-1, page_size)[:, :HEAD_LENGTH]
    pattern = np.frombuffer(struct.pack("<I", len(NAME)) + bytes(4) + bytes(4) + NAME, np.uint8)
    compared = np.r_[0:4, 8:12, 12 : 12 + len(NAME)]
    return np.flatnonzero((heads[:, compared] == pattern[compared]).all(axis=1)).tolist()


def text_of(note: bytes) -> str:
    """The note's lines ``NAME=VALUE``."""
    description_length = _HEADER.unpack_from(note)[1]
    return note[HEAD_LENGTH : HEAD_LENGTH + description_length].rstrip(b"\0").decode("utf-8", "replace")


def kernel_offset(note: bytes) -> int | None:
    """By how much KASLR has moved the kernel's text."""
    match = _KERNEL_OFFSET.search(note)
    return None if match is None else int(match[1], 16)
