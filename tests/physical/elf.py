"""Reads ELF cores, without any code of ckptfs."""

import struct
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Note:
    """One note: its name without the NUL."""

    name: bytes
    kind: int
    description: bytes


@dataclass(frozen=True)
class Load:
    """One PT_LOAD."""

    virtual: int
    physical: int
    file_offset: int
    length: int


@dataclass(frozen=True)
class Elf:
    """The notes of a core, and its PT_LOADs by physical address."""

    path: Path
    machine: int
    notes: list[Note]
    loads: list[Load]

    def read(self, physical: int, length: int) -> bytes:
        """Bytes that are in one PT_LOAD."""
        for load in self.loads:
            if load.physical <= physical and physical + length <= load.physical + load.length:
                with self.path.open("rb") as file:
                    file.seek(load.file_offset + physical - load.physical)
                    return file.read(length)
        raise KeyError(hex(physical))


def read_elf(path: Path) -> Elf:
    """The core in `path`."""
    with path.open("rb") as file:
        head = file.read(64)
        assert head[:7] == b"\x7fELF\x02\x01\x01"
        machine = struct.unpack_from("<H", head, 18)[0]
        (offset,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        file.seek(offset)
        table = file.read(size * count)
        notes: list[Note] = []
        loads = []
        for index in range(count):
            kind, _, start, virtual, physical, length, memory, _ = struct.unpack_from(
                "<IIQQQQQQ", table, index * size
            )
            if kind == 4:
                file.seek(start)
                notes = parse_notes(file.read(length))
            else:
                assert (kind, memory) == (1, length)
                loads.append(Load(virtual, physical, start, length))
    return Elf(path, machine, notes, sorted(loads, key=lambda load: load.physical))


def parse_notes(data: bytes) -> list[Note]:
    """All notes, one after another, to the last byte."""
    notes = []
    position = 0
    while position < len(data):
        name_length, length, kind = struct.unpack_from("<III", data, position)
        position += 12
        name = data[position : position + name_length]
        position += -(-name_length // 4) * 4
        notes.append(Note(name.rstrip(b"\0"), kind, data[position : position + length]))
        position += -(-length // 4) * 4
    assert position == len(data)
    return notes
