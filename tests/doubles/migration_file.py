"""Writes migration files from a tiny description, sound ones and broken ones, without any code of ckptfs.

``MigrationFile(blocks=[Block("pc.ram", 256, {0: b"boot", 7: page})]).write(path)`` is a mapped-ram file as
QEMU 10.0 makes it, with two small devices. ``build`` gives the bytes together with ``marks``, the offset of
each field by name, so that a test can break just that field.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

PAGE_SIZE = 4096


def be32(value: int) -> bytes:
    """A number as QEMU's qemu_put_be32 writes it."""
    return struct.pack(">I", value)


def be64(value: int) -> bytes:
    """A number as QEMU's qemu_put_be64 writes it."""
    return struct.pack(">Q", value)


def globalstate(run_state: str) -> bytes:
    """The payload of the section globalstate."""
    return struct.pack(">I32s2x66x", len(run_state) + 1, run_state.encode())


class BytesSource:
    """A file's bytes, as ckptfs reads them; as picky as pread(2) is."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def length(self) -> int:
        return len(self._data)

    def pread(self, file_offset: int, length: int) -> bytes:
        assert 0 <= file_offset < 1 << 63
        assert 0 <= length < 1 << 31
        return self._data[file_offset : file_offset + length]


@dataclass(frozen=True)
class Block:
    """A RAM block; ``pages`` and ``stale`` map page numbers to content (filled up with zeros).

    Pages in ``pages`` have their bit set, those in ``stale`` are bytes in the file under a clear bit.
    """

    idstr: str
    page_count: int
    pages: Mapping[int, bytes] = field(default_factory=dict)
    stale: Mapping[int, bytes] = field(default_factory=dict)
    address: int = 0
    ignored: bool = False
    host_page_size: int | None = None


@dataclass(frozen=True)
class Device:
    """A FULL section. ``described_length`` is what the vmdesc claims, if not the truth."""

    idstr: str
    payload: bytes
    instance_id: int = 0
    version_id: int = 1
    described_length: int | None = None


DEVICES = (Device("timer", b"\1\2\3\4" * 6, version_id=2), Device("globalstate", globalstate("paused")))


@dataclass(frozen=True)
class MigrationFile:
    """A mapped-ram file, or a plain one if ``capabilities`` lack mapped-ram."""

    blocks: Sequence[Block] = (Block("pc.ram", 16, {0: b"first", 5: b"sixth"}),)
    devices: Sequence[Device] = DEVICES
    setup_devices: Sequence[Device] = ()
    machine: str = "pc-i440fx-10.0"
    capabilities: Sequence[str] = ("mapped-ram",)
    target_page_bits: int | None = None
    uuid: bytes | None = None
    stream_offset: int = 0
    alignment: int = 0x100000
    part_count: int = 1
    switchover_start: bool = True
    footers: bool = True
    vmdesc: bool = True
    byteorder: Literal["little", "big"] = "little"
    ram_section_id: int = 1

    @property
    def page_size(self) -> int:
        return PAGE_SIZE if self.target_page_bits is None else 1 << self.target_page_bits

    def data(self) -> bytes:
        """The file's bytes."""
        return self.build()[0]

    def write(self, path: Path) -> None:
        """Make the file, with holes where nothing is."""
        writer = self._written()
        with path.open("wb") as file:
            for file_offset, extent in writer.extents:
                file.seek(file_offset)
                file.write(extent)
            file.truncate(writer.position)

    def build(self) -> tuple[bytes, dict[str, int]]:
        """The file's bytes, and the offset of each field."""
        writer = self._written()
        data = bytearray(writer.position)
        for file_offset, extent in writer.extents:
            data[file_offset : file_offset + len(extent)] = extent
        return bytes(data), writer.marks

    def _written(self) -> "_Writer":
        writer = _Writer()
        writer.position = self.stream_offset
        self._write_header(writer)
        self._write_ram_start(writer)
        for section_id, device in enumerate(self.setup_devices, 100):
            self._write_device(writer, device, section_id)
        self._write_ram_parts(writer)
        writer.mark("device_state")
        for section_id, device in enumerate(self.devices, 200):
            self._write_device(writer, device, section_id)
        writer.put("eof", b"\0")
        if self.vmdesc:
            text = json.dumps(self._vmdesc()).encode()
            writer.put("vmdesc", b"\6" + struct.pack(">I", len(text)))
            writer.put("vmdesc.json", text)
        return writer

    def _write_header(self, writer: "_Writer") -> None:
        writer.put("magic", b"QEVM")
        writer.put("version", struct.pack(">I", 3))
        writer.put("configuration", b"\7")
        machine = self.machine.encode()
        writer.put("machine.length", struct.pack(">I", len(machine)))
        writer.put("machine", machine)
        if self.target_page_bits is not None:
            payload = struct.pack(">I", self.target_page_bits)
            writer.put("target-page-bits", _subsection("configuration/target-page-bits", payload))
        if self.capabilities:
            payload = struct.pack(">I", len(self.capabilities))
            payload += b"".join(bytes([len(name)]) + name.encode() for name in self.capabilities)
            writer.put("capabilities", _subsection("configuration/capabilities", payload))
        if self.uuid is not None:
            writer.put("uuid", _subsection("configuration/uuid", self.uuid))

    def _write_ram_start(self, writer: "_Writer") -> None:
        self._write_section_header(writer, "ram", 1, Device("ram", b"", version_id=4), self.ram_section_id)
        writer.put("total", struct.pack(">Q", sum(b.page_count for b in self.blocks) * self.page_size | 4))
        for block in self.blocks:
            name = block.idstr.encode("utf-8", "surrogateescape")
            writer.put(f"{block.idstr}", bytes([len(name)]) + name)
            writer.put(f"{block.idstr}.used_length", struct.pack(">Q", block.page_count * self.page_size))
            if block.host_page_size is not None:
                writer.put(f"{block.idstr}.host_page_size", struct.pack(">Q", block.host_page_size))
            if "x-ignore-shared" in self.capabilities:
                writer.put(f"{block.idstr}.address", struct.pack(">Q", block.address))
            if "mapped-ram" in self.capabilities:
                self._write_block(writer, block)
        writer.put("eos", struct.pack(">Q", 0x10))
        self._write_footer(writer, "ram", self.ram_section_id)

    def _write_block(self, writer: "_Writer", block: Block) -> None:
        writer.put(f"{block.idstr}.version", struct.pack(">I", 1))
        writer.put(f"{block.idstr}.page_size", struct.pack(">Q", self.page_size))
        bitmap_offset = writer.position + 16
        words = [0] * -(-block.page_count // 64)
        for page in block.pages:
            words[page // 64] |= 1 << page % 64
        pages_offset = -(-(bitmap_offset + 8 * len(words)) // self.alignment) * self.alignment
        writer.put(f"{block.idstr}.bitmap_offset", struct.pack(">Q", 0 if block.ignored else bitmap_offset))
        writer.put(f"{block.idstr}.pages_offset", struct.pack(">Q", 0 if block.ignored else pages_offset))
        if block.ignored:
            return
        order = "<" if self.byteorder == "little" else ">"
        writer.put(f"{block.idstr}.bitmap", struct.pack(f"{order}{len(words)}Q", *words))
        for page, content in {**block.stale, **block.pages}.items():
            writer.position = pages_offset + page * self.page_size
            writer.put(f"{block.idstr}.page.{page}", content)
        writer.position = pages_offset + block.page_count * self.page_size

    def _write_ram_parts(self, writer: "_Writer") -> None:
        for part in range(self.part_count):
            last = part == self.part_count - 1
            if last and self.switchover_start:
                writer.put("command", struct.pack(">BHH", 8, 0x0B, 0))
            writer.put(f"part.{part}", struct.pack(">BI", 3 if last else 2, self.ram_section_id))
            if last and "mapped-ram" not in self.capabilities:
                self._write_records(writer)
            writer.put(f"part.{part}.eos", struct.pack(">Q", 0x10))
            self._write_footer(writer, f"part.{part}", self.ram_section_id)

    def _write_records(self, writer: "_Writer") -> None:
        """Page records of a plain stream, in QEMU's order; none of an ignored block."""
        for block in self.blocks:
            name = block.idstr.encode("utf-8", "surrogateescape")
            named = bytes([len(name)]) + name
            for page in range(0 if block.ignored else block.page_count):
                content = block.pages.get(page)
                flags = (0x02 if content is None else 0x08) | (0x20 if not named else 0)
                writer.put(f"{block.idstr}.record.{page}", struct.pack(">Q", page * self.page_size | flags) + named)
                content = b"\0" if content is None else content.ljust(self.page_size, b"\0")
                writer.put(f"{block.idstr}.page.{page}", content)
                named = b""

    def _write_device(self, writer: "_Writer", device: Device, section_id: int) -> None:
        self._write_section_header(writer, device.idstr, 4, device, section_id)
        writer.put(f"{device.idstr}.payload", device.payload)
        self._write_footer(writer, device.idstr, section_id)

    def _write_section_header(
        self, writer: "_Writer", mark: str, section_type: int, device: Device, section_id: int
    ) -> None:
        writer.put(mark, bytes([section_type]))
        writer.put(f"{mark}.section_id", struct.pack(">I", section_id))
        writer.put(f"{mark}.idstr", bytes([len(device.idstr)]) + device.idstr.encode())
        writer.put(f"{mark}.instance_id", struct.pack(">I", device.instance_id))
        writer.put(f"{mark}.version_id", struct.pack(">I", device.version_id))

    def _write_footer(self, writer: "_Writer", mark: str, section_id: int) -> None:
        if self.footers:
            writer.put(f"{mark}.footer", struct.pack(">BI", 0x7E, section_id))

    def _vmdesc(self) -> dict[str, object]:
        devices = [
            {
                "name": device.idstr,
                "instance_id": device.instance_id,
                "vmsd_name": device.idstr,
                "version": device.version_id,
                "fields": [{"name": "data", "type": "buffer", "size": _described_length(device)}],
            }
            for device in [*self.setup_devices, *self.devices]
        ]
        return {"configuration": {}, "page_size": self.page_size, "devices": devices}


class _Writer:
    """Extents put down one after the other, and where each field begins."""

    def __init__(self) -> None:
        self.position = 0
        self.extents: list[tuple[int, bytes]] = []
        self.marks: dict[str, int] = {}

    def mark(self, name: str) -> None:
        self.marks[name] = self.position

    def put(self, name: str, data: bytes) -> None:
        self.mark(name)
        self.extents.append((self.position, data))
        self.position += len(data)


def _subsection(name: str, payload: bytes) -> bytes:
    return bytes([5, len(name)]) + name.encode() + struct.pack(">I", 1) + payload


def _described_length(device: Device) -> int:
    return len(device.payload) if device.described_length is None else device.described_length
