"""A plain migration stream read by nothing of ckptfs, record by record: the judge of what was written."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.mount.decode import Reader

PAGE = 4096
_RAM_ZERO, _RAM_PAGE, _RAM_EOS, _RAM_CONTINUE = 0x02, 0x08, 0x10, 0x20


@dataclass
class Block:
    """A RAM block: what a loader makes of its records, and how many of each kind there were of each page."""

    used_length: int
    address: int | None
    ram: npt.NDArray[np.uint8] = field(init=False)
    page_records: Counter[int] = field(default_factory=Counter)
    zero_records: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.ram = np.zeros(self.used_length, np.uint8)

    @property
    def records(self) -> Counter[int]:
        """How many records each page has."""
        return self.page_records + self.zero_records


@dataclass(frozen=True)
class Decoded:
    """A stream's configuration (payloads of the subsections by name), its blocks, and the verbatim rest."""

    machine: str
    configuration: dict[str, bytes]
    blocks: dict[str, Block]
    device_sections: bytes

    @property
    def capabilities(self) -> list[str]:
        """Those that the configuration names."""
        payload, names = self.configuration.get("configuration/capabilities", b"")[4:], []
        while payload:
            names.append(payload[1 : 1 + payload[0]].decode())
            payload = payload[1 + payload[0] :]
        return names


def decode(path: Path, offset: int = 0) -> Decoded:
    """Decode a file as QEMU 10 writes it for a PC; AssertionError or ValueError if it is none."""
    reader = Reader(path, offset)
    _expect(reader, b"QEVM\0\0\0\3\7")
    machine = reader.take(reader.number(4)).decode()
    configuration = _configuration(reader)
    _expect(reader, b"\1")
    ram_id = reader.take(4)
    _expect(reader, b"\3ram\0\0\0\0\0\0\0\4")
    decoded = Decoded(machine, configuration, {}, b"")
    _read_blocks(reader, decoded)
    end = _RAM_EOS.to_bytes(8) + b"\x7e" + ram_id
    _expect(reader, end)
    block = None
    while (section_type := reader.number(1)) in (2, 3, 8):
        if section_type == 8:
            reader.take(2)
            reader.take(reader.number(2))
            continue
        _expect(reader, ram_id)
        block = _read_records(reader, decoded.blocks, block)
        reader.position -= 8
        _expect(reader, end)
        if section_type == 3:
            return Decoded(machine, configuration, decoded.blocks, reader.rest())
    raise AssertionError(f"section type {section_type} before byte {reader.position:#x}")


def _expect(reader: Reader, data: bytes) -> None:
    found = reader.take(len(data))
    assert found == data, f"{found!r} before byte {reader.position:#x} should be {data!r}"


def _configuration(reader: Reader) -> dict[str, bytes]:
    subsections = {}
    while reader.data[reader.position] == 5:
        reader.take(1)
        name = reader.text().decode()
        _expect(reader, b"\0\0\0\1")
        start = reader.position
        if name == "configuration/uuid":
            reader.take(16)
        else:
            assert name == "configuration/capabilities"
            for _ in range(reader.number(4)):
                reader.text().decode()
        subsections[name] = reader.data[start : reader.position].tobytes()
    return subsections


def _read_blocks(reader: Reader, decoded: Decoded) -> None:
    total = reader.number(8)
    assert total % PAGE == 4
    total -= 4
    while total:
        idstr, used_length = reader.text().decode(), reader.number(8)
        address = reader.number(8) if "x-ignore-shared" in decoded.capabilities else None
        decoded.blocks[idstr] = Block(used_length, address)
        total -= used_length
        assert total >= 0


def _read_records(reader: Reader, blocks: dict[str, Block], block: Block | None) -> Block | None:
    """Read the records of a section; ``block`` is that of the last record before, and of the last one here."""
    while (word := reader.number(8)) != _RAM_EOS:
        flags, block_offset = word % PAGE, word - word % PAGE
        if not flags & _RAM_CONTINUE:
            block = blocks[reader.text().decode()]
        assert block is not None
        page = block_offset // PAGE
        if flags & ~_RAM_CONTINUE == _RAM_PAGE:
            block.ram[block_offset : block_offset + PAGE] = np.frombuffer(reader.take(PAGE), np.uint8)
            block.page_records[page] += 1
        else:
            assert flags & ~_RAM_CONTINUE == _RAM_ZERO
            _expect(reader, b"\0")
            block.ram[block_offset : block_offset + PAGE] = 0
            block.zero_records[page] += 1
    return block
