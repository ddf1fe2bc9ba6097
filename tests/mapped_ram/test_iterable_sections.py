"""Iterable sections other than the RAM's: s390x has one, of storage attributes (hw/s390x/s390-stattrib.c)."""

import pytest

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.checkpoint import read_checkpoint, read_device_state, read_setup
from tests.doubles.migration_file import BytesSource, MigrationFile

EOS, MORE, DONE = 1, 2, 8
SECTION_ID = 77


def be64(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8) for number in numbers)


def be32(number: int) -> bytes:
    return number.to_bytes(4)


FOOTER = b"\x7e" + be32(SECTION_ID)
NAME = b"s390-storage_attributes"
START = b"\1" + be32(SECTION_ID) + bytes([len(NAME)]) + NAME + be32(0) + be32(0) + be64(EOS) + FOOTER
PART = b"\2" + be32(SECTION_ID) + be64(0x5000 | MORE, 3) + b"abc" + be64(EOS) + FOOTER
END = b"\3" + be32(SECTION_ID) + be64(DONE, EOS) + FOOTER


def with_attributes(start: bytes = START, part: bytes = PART, end: bytes = END) -> bytes:
    """A file with its START behind the RAM's, a PART before the RAM's END, and its END behind that."""
    data, marks = MigrationFile().build()
    command, ram_end, device_state = marks["command"], marks["part.0"], marks["device_state"]
    return (
        data[:command]
        + start
        + data[command:ram_end]
        + part
        + data[ram_end:device_state]
        + end
        + data[device_state:]
    )


def test_their_parts_are_kept_and_their_end_is_device_state() -> None:
    source = BytesSource(with_attributes())
    checkpoint, _ = read_checkpoint(source)
    assert read_setup(source, checkpoint) == START + PART
    assert read_device_state(source, checkpoint).startswith(END)
    assert [section.idstr for section in checkpoint.sections] == ["timer", "globalstate"]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"start": START.replace(NAME, NAME[:-1] + b"x")}, "iterable section 's390-storage_attributex' is not"),
        ({"start": b""}, "section id 77 was not started"),
        ({"start": START + START}, "iterable section 's390-storage_attributes' is not supported"),
        ({"part": PART.replace(be64(EOS), be64(4))}, "storage attributes: unexpected flags 0x4"),
        ({"part": PART.replace(be64(3), be64(1 << 60))}, "the file ends inside the storage attributes"),
        ({"part": PART[:-1] + b"\0"}, "the footer of section 77"),
        ({"end": END.replace(be32(SECTION_ID), be32(9))}, "section id 9 was not started"),
    ],
)
def test_broken_ones_are_refused(parts: dict[str, bytes], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        read_checkpoint(BytesSource(with_attributes(**parts)))
