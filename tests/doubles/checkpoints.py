"""Checkpoints as the tests of a guest open, save and judge them."""

import os
import struct
from collections.abc import Mapping
from pathlib import Path

import xxhash

from ckptfs.channels.backing_file import DirectIO, FileSource, OpenedFile
from ckptfs.channels.identity import Identity
from ckptfs.channels.opened import open_file
from ckptfs.channels.verifying import Verified, verify
from ckptfs.foreign.content import read_content
from ckptfs.guest.base import Base, BaseOptions
from ckptfs.guest.guest import Guest
from ckptfs.guest.saving import SaveRequest
from ckptfs.mapped_ram.checkpoint import read_checkpoint
from ckptfs.migration.address import FileMigrationArgs


def open_base(path: Path, *, channel_count: int = 2, direct_io: bool = False, deadline: float = 60.0) -> Base:
    """Open a checkpoint to restore from."""
    file = OpenedFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), os.O_RDONLY)
    return Base(str(path), file, 0, BaseOptions(DirectIO(direct_io), channel_count, {}, deadline))


def save_request(path: Path, stream_offset: int = 0, *, ram_only: bool = False) -> SaveRequest:
    """A save to ``path`` by the daemon's own user."""
    return SaveRequest(FileMigrationArgs(str(path), stream_offset), Identity.of_daemon(), ram_only)


def ram_in(path: Path, stream_offset: int = 0) -> dict[str, bytes]:
    """All RAM that a mapped-ram file holds, as its bitmaps say, by idstr."""
    with path.open("rb") as file:
        checkpoint, file_bmaps = read_checkpoint(FileSource(file.fileno()), stream_offset)
        ram = {}
        for block in checkpoint.blocks:
            assert block.pages_offset is not None
            content = bytearray(block.used_length)
            for start, stop in file_bmaps[block.idstr].runs():
                file.seek(block.pages_offset + start * block.page_size)
                data = file.read((stop - start) * block.page_size)
                content[start * block.page_size : stop * block.page_size] = data.ljust(
                    (stop - start) * block.page_size, b"\0"
                )
            ram[block.idstr] = bytes(content)
    return ram


def verified(path: Path) -> Verified:
    """What `ckptfs verify` finds."""
    with open_file(str(path)) as opened:
        found = Verified()
        verify(opened, found)
        return found


def unsummed(path: Path, stream_offset: int = 0) -> int:
    """How many windows of a mapped-ram file have no checksum; those that there are have to be right."""
    with path.open("rb") as file:
        source = FileSource(file.fileno())
        content = read_content(source, stream_offset)
    payload = content.trailer.get("checksums")
    assert payload is not None
    kind, window_length, count = struct.unpack_from(">4sII", payload)
    position, unknown, ram = 12, 0, ram_in(path, stream_offset)
    assert (kind, count) == (b"XXH3", len(ram))
    for _ in range(count):
        name_length, used_length, run_count = struct.unpack_from(">BQI", payload, position)
        position += 13 + name_length
        content_of_block = ram[payload[position - name_length : position].decode()]
        assert len(content_of_block) == used_length
        runs = struct.unpack_from(f">{2 * run_count}I", payload, position)
        position += 8 * run_count
        sums = {}
        for start, length in zip(runs[::2], runs[1::2], strict=True):
            sums |= dict(enumerate(struct.unpack_from(f">{length}I", payload, position), start))
            position += 4 * length
        for start in range(0, used_length, window_length):
            window = content_of_block[start : start + window_length]
            found = sums.pop(start // window_length, 0)
            unknown += found == 1
            low = xxhash.xxh3_64_intdigest(window) & 0xFFFFFFFF
            assert found in (1, 0 if not any(window) else low if low > 1 else low + 2)
        assert not sums
    assert position == len(payload)
    return unknown


async def ram_of(guest: Guest) -> dict[str, bytes]:
    """All RAM of a guest, read as FUSE reads it: in requests of 1 MiB."""
    ram = {}
    for idstr, block in guest.blocks.items():
        requests = range(0, block.used_length, 1 << 20)
        ram[idstr] = b"".join([bytes(await guest.read(block, offset, 1 << 20)) for offset in requests])
    return ram


def fill(page_count: int, pages: Mapping[int, bytes], page_size: int = 4096) -> bytes:
    """What a block of `tests.doubles.migration_file` holds."""
    return b"".join(pages.get(page, b"").ljust(page_size, b"\0") for page in range(page_count))
