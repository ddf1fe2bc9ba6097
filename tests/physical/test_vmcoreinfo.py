import struct

import numpy as np
import pytest

from ckptfs.errors import CheckpointError
from ckptfs.physical.vmcoreinfo import HEAD_LENGTH, check_note, kernel_offset, note_length, note_pages, text_of

TEXT = b"OSRELEASE=6.1.0\nNUMBER(phys_base)=18874368\nKERNELOFFSET=1e000000\n"


def note(text: bytes = TEXT, name: bytes = b"VMCOREINFO\0", kind: int = 0, length: int | None = None) -> bytes:
    size = len(text) if length is None else length
    return struct.pack("<III", len(name), size, kind) + name.ljust(12, b"\0") + text + bytes(-len(text) % 4)


def test_a_note_and_what_follows_it() -> None:
    assert check_note(note() + b"more") == note()
    assert text_of(note()) == TEXT.decode()
    assert kernel_offset(note()) == 0x1E000000
    assert kernel_offset(note(b"OSRELEASE=1\n")) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        note()[: HEAD_LENGTH - 1],
        note()[:-8],
        note(name=b"VMCOREINFX\0"),
        note(kind=1),
        note(length=0xFFFFFFFF),
        note(length=1 << 20),
        bytes(4096),
    ],
)
def test_what_is_none(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="no VMCOREINFO note"):
        check_note(data)


def test_its_length_has_a_limit() -> None:
    assert note_length(note(length=0xFFFFFFF0)) is None
    assert note_length(note()) == len(note())


def test_pages_that_begin_with_one() -> None:
    memory = np.zeros(16 * 4096, np.uint8)
    for page in (3, 9):
        memory[page * 4096 :][: len(note())] = np.frombuffer(note(), np.uint8)
    memory[5 * 4096 + 8 :][: len(note())] = np.frombuffer(note(), np.uint8)
    assert note_pages(memory, 4096) == [3, 9]
