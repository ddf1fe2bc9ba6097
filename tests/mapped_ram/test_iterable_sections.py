"""Iterable sections other than the RAM's.

s390x has one of storage attributes (hw/s390x/s390-stattrib.c), pseries its hash page table (hw/ppc/spapr.c).
"""

import pytest

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram import checkpoint as checkpoint_module
from ckptfs.mapped_ram import sections
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


HASH_TABLE = b"spapr/htab"


def with_hash_table(start: bytes, part: bytes, end: bytes) -> bytes:
    head = b"\1" + be32(SECTION_ID) + bytes([len(HASH_TABLE)]) + HASH_TABLE + be32(0) + be32(1)
    return with_attributes(
        head + start + FOOTER,
        b"\2" + be32(SECTION_ID) + part + FOOTER,
        b"\3" + be32(SECTION_ID) + end + FOOTER,
    )


ENTRIES = be32(5) + (2).to_bytes(2) + (3).to_bytes(2) + b"an entry, valid." * 2


@pytest.mark.parametrize(
    ("start", "part", "end"),
    [(be32(24), be32(0) + ENTRIES + ENTRIES + bytes(8), be32(0) + bytes(8)), (b"\xff" * 4,) * 3],
    ids=["a table", "no table"],
)
def test_a_hash_table_is_kept(start: bytes, part: bytes, end: bytes) -> None:
    source = BytesSource(with_hash_table(start, part, end))
    checkpoint, _ = read_checkpoint(source)
    assert part in read_setup(source, checkpoint)
    assert read_device_state(source, checkpoint)[5:].startswith(end)
    assert [section.idstr for section in checkpoint.sections] == ["timer", "globalstate"]


def test_a_hash_table_that_lies_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the file ends inside the hash page table"):
        read_checkpoint(BytesSource(with_hash_table(be32(24), be32(0) + ENTRIES[:-1] + bytes(8), be32(0))))


def test_there_are_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    source = BytesSource(with_attributes())
    checkpoint, _ = read_checkpoint(source)
    with monkeypatch.context() as context:
        context.setattr(checkpoint_module, "MAX_DEVICE_STATE_LENGTH", len(START))
        with pytest.raises(CheckpointError, match=f"more than {len(START)}"):
            read_setup(source, checkpoint)
    monkeypatch.setattr(sections, "MAX_RECORDS", 3)
    many = PART.replace(be64(EOS), be64(DONE) * 4 + be64(EOS))
    with pytest.raises(CheckpointError, match="more than 3 records in the storage attributes"):
        read_checkpoint(BytesSource(with_attributes(part=many)))
    with pytest.raises(CheckpointError, match="more than 3 records in the hash page table"):
        read_checkpoint(
            BytesSource(with_hash_table(be32(24), be32(0) + ENTRIES * 4 + bytes(8), be32(0) + bytes(8)))
        )
    monkeypatch.setattr(sections, "MAX_PARTS", 3)
    with pytest.raises(CheckpointError, match="more than 3 parts"):
        read_checkpoint(BytesSource(with_attributes(part=PART * 3)))
