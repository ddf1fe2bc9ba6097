"""LiME's format, version 1: each range of memory behind a header that says where it is (LiME, doc/README).

volatility3 and AVML read it.
"""

import struct
from collections.abc import Iterator

from ckptfs.physical.memory_map import MemoryMap, Region

MAGIC = 0x4C694D45
VERSION = 1
_HEADER = struct.Struct("<IIQQ8x")
HEADER_LENGTH = _HEADER.size


def headers(memory: MemoryMap) -> Iterator[tuple[bytes, Region]]:
    """Each region with the header that stands before its bytes; the last address of a range is inside of it."""
    for region in memory.regions:
        yield _HEADER.pack(MAGIC, VERSION, region.start, region.stop - 1), region
