"""The trailer: read back as it was written, or not at all, whatever a file claims."""

import json
import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram import trailer as trailer_module
from ckptfs.mapped_ram.trailer import NO_TRAILER, Depends, Entry, SavedMachine, Trailer, read_trailer
from tests.doubles.migration_file import BytesSource

MACHINE = SavedMachine(
    program="/usr/bin/qemu-system-x86_64",
    arguments=("-m", "1G", "-name", "a \udcff b"),
    directory="/srv",
    uid=107,
    qemu="10.0.2",
    host="somewhere",
    time=1_700_000_000,
    ckptfs="0.1",
)
THREE = Trailer(
    (MACHINE.entry(), Entry("working-set", b"\0" * 100, Depends.RAM), Entry("later", b"", Depends.NOTHING))
)
HEADER_LENGTH = 32


def read(data: bytes, offset: int = 0) -> Trailer:
    return read_trailer(BytesSource(data), offset)


entries = st.lists(
    st.builds(
        Entry,
        st.text(st.characters(codec="ascii"), min_size=1, max_size=40),
        st.binary(max_size=100),
        st.integers(0, (1 << 32) - 1).map(Depends),
    ),
    max_size=5,
    unique_by=lambda entry: entry.name,
)


@given(entries, st.binary(max_size=20), st.binary(max_size=20))
def test_it_comes_back(entries: list[Entry], before: bytes, behind: bytes) -> None:
    trailer = Trailer(tuple(entries))
    assert read(before + trailer.encode() + (behind if entries else b""), len(before)) == trailer


def test_its_bytes() -> None:
    """As docs/format.md has them."""
    entry = struct.pack(">BIQI", 3, 1, 2, zlib.crc32(b"hi")) + b"abc"
    header = b"CKPTFS\r\n" + struct.pack(">IIQI", 1, 1, len(entry) + 2, zlib.crc32(entry))
    expected = header + struct.pack(">I", zlib.crc32(header)) + entry + b"hi"
    assert Trailer((Entry("abc", b"hi", Depends.RAM),)).encode() == expected
    assert NO_TRAILER.encode() == b""


@pytest.mark.parametrize("data", [b"", b"CKPTFS", b"garbage" * 100, bytes(5000), b"QEVM" + bytes(50)])
def test_something_else_is_no_trailer(data: bytes) -> None:
    assert read(data) == NO_TRAILER
    assert read(data, len(data) + 5) == NO_TRAILER


@given(st.data())
@settings(max_examples=300)
def test_damage_anywhere_loses_all_of_it(data: st.DataObject) -> None:
    encoded = bytearray(THREE.encode())
    position = data.draw(st.integers(8, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CheckpointError, match="trailer"):
        read(bytes(encoded))


def test_cut_anywhere() -> None:
    encoded = THREE.encode()
    for stop in range(8, len(encoded)):
        with pytest.raises(CheckpointError, match="trailer"):
            read(encoded[:stop])


def sealed(version: int, count: int, length: int, directory: bytes, rest: bytes = b"") -> bytes:
    """A trailer whose checksums are right, whatever it says."""
    header = b"CKPTFS\r\n" + struct.pack(">IIQI", version, count, length, zlib.crc32(directory))
    return header + struct.pack(">I", zlib.crc32(header)) + directory + rest


NAMED = struct.pack(">BIQI", 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (sealed(2, 0, 0, b""), "version 2"),
        (sealed(1, 257, 0, b""), "claims 257 entries"),
        (sealed(1, 1, (64 << 20) + 1, b""), "entries in 67108865 bytes"),
        (sealed(1, 1, 1 << 63, b""), "entries in"),
        (sealed(1, 2, 18, NAMED + b"a"), "directory is longer"),
        (sealed(1, 1, 17, NAMED), "do not add up|directory is damaged|none"),
        (sealed(1, 2, 36, (NAMED + b"a") * 2), "name twice"),
        (sealed(1, 1, 18, NAMED + b"\xff"), "one that is none"),
        (sealed(1, 1, 18, struct.pack(">BIQI", 0, 0, 0, 0), b"z"), "do not add up"),
        (sealed(1, 1, 18, struct.pack(">BIQI", 1, 0, 1 << 40, 0) + b"a"), "do not add up"),
        (sealed(1, 1, 19, struct.pack(">BIQI", 1, 0, 0, 0) + b"a", b"z"), "do not add up"),
        (sealed(1, 0, 1, b"", b"z"), "do not add up"),
    ],
)
def test_sizes_and_names_that_lie(data: bytes, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        read(data)


@given(st.integers(0, 3), st.integers(0, 300), st.integers(0, 200), st.binary(max_size=120), st.binary(max_size=60))
@example(1, 1, 18, NAMED + b"a", b"")
def test_whatever_it_claims(version: int, count: int, length: int, directory: bytes, rest: bytes) -> None:
    try:
        found = read(sealed(version, count, length, directory, rest))
    except CheckpointError:
        return
    assert len(found.entries) == count


def test_what_goes_with_a_change() -> None:
    trailer = THREE.with_entry(Entry("odd", b"", Depends(4)))
    for change, kept in [
        (Depends.NOTHING, ["machine", "working-set", "later"]),
        (Depends.RAM, ["machine", "later"]),
        (Depends.DEVICE_STATE, ["working-set", "later"]),
        (Depends.RAM | Depends.DEVICE_STATE, ["later"]),
    ]:
        assert [entry.name for entry in trailer.after(change).entries] == kept


def test_an_entry_takes_the_place_of_its_namesake() -> None:
    trailer = THREE.with_entry(Entry("later", b"new"))
    assert [entry.name for entry in trailer.entries] == ["machine", "working-set", "later"]
    assert trailer.get("later") == b"new"
    assert trailer.get("never") is None


def test_the_machine_comes_back() -> None:
    assert read(THREE.encode()).machine == MACHINE
    assert NO_TRAILER.machine is None
    assert MACHINE.entry().payload.isascii()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        *(
            json.dumps({**MACHINE.describe(), **change}).encode()
            for change in (
                {"program": 5},
                {"program": "a\0b"},
                {"arguments": "-m"},
                {"arguments": [1]},
                {"arguments": ["\ud800"]},
                {"uid": "root"},
                {"time": "now"},
                {"time": True},
                {"time": -1},
                {"time": 10**20},
            )
        ),
    ],
)
def test_a_machine_that_makes_no_sense_is_none(payload: bytes) -> None:
    assert Trailer((replace(MACHINE.entry(), payload=payload),)).machine is None


def test_more_keys_do_no_harm() -> None:
    payload = json.dumps({**MACHINE.describe(), "later": 1}).encode()
    assert SavedMachine.parse(payload) == MACHINE


def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = THREE.encode()
    monkeypatch.setattr(trailer_module, "MAX_LENGTH", 10)
    with pytest.raises(CheckpointError, match="claims 3 entries"):
        read(encoded)
    with pytest.raises(CheckpointError, match="are more than a trailer can hold"):
        THREE.encode()
