"""A mapped-ram file read by nothing of ckptfs: the judge of what was written."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

PAGE = 4096
_START, _PART, _END, _SUBSECTION, _CONFIGURATION, _COMMAND, _FOOTER = 1, 2, 3, 5, 7, 8, 0x7E
_RAM_FLAG_EOS = 0x10


@dataclass(frozen=True)
class Decoded:
    """RAM blocks (bytes by idstr), and all of the stream that comes after the RAM section, verbatim."""

    blocks: dict[str, npt.NDArray[np.uint8]]
    device_sections: bytes


class Reader:
    """A file that is read from ``position`` on, and further with every call."""

    def __init__(self, path: Path, position: int) -> None:
        self.path = path
        self.position = position
        self.data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)  # slices of a memmap are slow

    def take(self, length: int) -> bytes:
        self.position += length
        if self.position > self.data.size:
            raise ValueError(f"{self.path}: ends before byte {self.position:#x}")
        return self.data[self.position - length : self.position].tobytes()

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length))

    def text(self) -> bytes:
        return self.take(self.number(1))

    def rest(self) -> bytes:
        """All up to the end of the stream, where there may be a trailer."""
        return self.data[self.position :].tobytes().partition(b"CKPTFS\r\n")[0]

    def expect(self, form: str, *values: int) -> None:
        found = struct.unpack(form, self.take(struct.calcsize(form)))
        if found != values:
            raise ValueError(f"{self.path}: {found} before byte {self.position:#x} should be {values}")


def decode(path: Path, offset: int = 0) -> Decoded:
    """Decode a file as QEMU 9.0 or later writes it for a PC; ValueError or struct.error if it is none."""
    reader = Reader(path, offset)
    reader.expect(">IIB", 0x5145564D, 3, _CONFIGURATION)
    reader.take(reader.number(4))  # machine
    reader.expect("B", _SUBSECTION)
    if (name := reader.text()) != b"configuration/capabilities":
        raise ValueError(f"{path}: {name!r}")
    reader.expect(">II", 1, 1)
    if (name := reader.text()) != b"mapped-ram":
        raise ValueError(f"{path}: {name!r}")
    reader.expect("B", _START)
    ram_id = reader.number(4)
    if (name := reader.text()) != b"ram":
        raise ValueError(f"{path}: {name!r}")
    reader.expect(">II", 0, 4)
    blocks = _decode_blocks(reader)
    reader.expect(">QBI", _RAM_FLAG_EOS, _FOOTER, ram_id)
    while (section_type := reader.number(1)) != _END:
        if section_type == _COMMAND:
            reader.number(2)
            reader.take(reader.number(2))
        elif section_type == _PART:
            reader.expect(">IQBI", ram_id, _RAM_FLAG_EOS, _FOOTER, ram_id)
        else:
            raise ValueError(f"{path}: section type {section_type} before byte {reader.position:#x}")
    reader.expect(">IQBI", ram_id, _RAM_FLAG_EOS, _FOOTER, ram_id)
    return Decoded(blocks, reader.rest())


def _decode_blocks(reader: Reader) -> dict[str, npt.NDArray[np.uint8]]:
    blocks = {}
    total = reader.number(8) & ~0xFFF
    while total > 0:
        idstr = reader.text().decode()
        used_length = reader.number(8)
        total -= used_length
        reader.expect(">IQQ", 1, PAGE, reader.position + 28)
        pages_offset = reader.number(8)
        page_count = used_length // PAGE
        bitmap = np.frombuffer(reader.take(-(-page_count // 64) * 8), np.uint8)
        present = np.unpackbits(bitmap, bitorder="little", count=page_count)
        pages = reader.data[pages_offset : pages_offset + used_length].reshape(-1, PAGE)
        blocks[idstr] = (pages * present[:, None]).reshape(-1)
        reader.position = pages_offset + used_length
    return blocks
