"""Files that are no checkpoint, by the bytes that they begin with, and what to do about each.

One table; where more than the magic matters, a function looks at the head. Sources: file(1)'s magic, and the
formats' own documents.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from ckptfs.mapped_ram.stream import MAGIC, VERSION, SectionType, Source

HEAD_LENGTH = 4096
_SEARCH_LENGTH = 1 << 20
_STREAM = struct.pack(">IIB", MAGIC, VERSION, SectionType.CONFIGURATION)

_ET_CORE = 4
_QCOW2_SNAPSHOTS = 60  # be32 nb_snapshots, docs/interop/qcow2.rst

_VMWARE = (0xBED2BED0, 0xBAD1BAD1, 0xBED2BED2, 0xBED3BED3)
"""Of .vmss and .vmsn, as volatility3 knows them (layers/vmware.py)."""

_UNPACK = "unpack it, and give the file that was in it"
_DISK = "a checkpoint holds RAM and devices, and disks are other files"
_RAM_ALONE = (
    "it has RAM, but no machine that could go on: debuggers (crash, gdb, drgn, volatility) read it as it is"
)
_OTHER_MONITOR = "QEMU does not read it, and neither does ckptfs"


@dataclass(frozen=True)
class Row:
    """Files with ``magic`` at ``offset``; ``what`` says what such a file is and what to do, from its head."""

    magic: bytes
    what: str | Callable[[bytes], str]
    offset: int = 0


def describe(source: Source, file_offset: int = 0) -> str | None:
    """What the file is and what to do with it, judged by what begins at ``file_offset``; None if it is unknown."""
    head = source.pread(file_offset, HEAD_LENGTH) if file_offset < source.length else b""
    if not source.length:
        return "this file is empty"
    for row in TABLE:
        if head.startswith(row.magic, row.offset):
            return f"this is {row.what if isinstance(row.what, str) else row.what(head)}"
    found = source.pread(0, _SEARCH_LENGTH).find(_STREAM)
    if found >= 0 and found != file_offset:
        return f"a stream begins at byte {found:#x}: say so, as in file:PATH,offset={found:#x}"
    return None


def _elf(head: bytes) -> str:
    order = ">" if head[5:6] == b"\2" else "<"
    (kind,) = struct.unpack_from(f"{order}H", head.ljust(20, b"\0"), 16)
    return f"an ELF core: {_RAM_ALONE}" if kind == _ET_CORE else "an ELF program or library, not a checkpoint"


def _qcow2(head: bytes) -> str:
    if int.from_bytes(head[4:8]) >= 2 and int.from_bytes(head[_QCOW2_SNAPSHOTS : _QCOW2_SNAPSHOTS + 4]):
        return (
            "a qcow2 image with internal snapshots (savevm): start QEMU with -loadvm NAME -S, and save from there: "
            "migrate_set_capability mapped-ram on, migrate file:PATH"
        )
    return f"a qcow2 disk image: {_DISK}"


TABLE = (
    Row(b"LibvirtQemudPart", "a save image that libvirt has not finished: the save failed, or still runs"),
    Row(b"\x1f\x8b", f"a gzip file: {_UNPACK} (gunzip)"),
    Row(b"\x28\xb5\x2f\xfd", f"a zstd file: {_UNPACK} (unzstd)"),
    Row(b"\xfd7zXZ\0", f"an xz file: {_UNPACK} (unxz)"),
    Row(b"BZh", f"a bzip2 file: {_UNPACK} (bunzip2)"),
    Row(b"\x89LZO\0\r\n\x1a\n", f"an lzop file: {_UNPACK} (lzop -d)"),
    Row(b"\x04\x22\x4d\x18", f"an lz4 file: {_UNPACK} (unlz4)"),
    Row(b"7z\xbc\xaf\x27\x1c", f"a 7z archive: {_UNPACK}"),
    Row(b"PK\3\4", f"a zip archive: {_UNPACK} (unzip)"),
    Row(b"ustar", f"a tar archive: {_UNPACK} (tar -x)", offset=257),
    Row(b"QFI\xfb", _qcow2),
    Row(b"KDMV", f"a VMDK disk image: {_DISK}"),
    Row(b"\x7f\x10\xda\xbe", f"a VDI disk image: {_DISK}", offset=64),
    Row(b"vhdxfile", f"a VHDX disk image: {_DISK}"),
    Row(b"conectix", f"a VHD disk image: {_DISK}"),
    Row(b"QED\0", f"a QED disk image: {_DISK}"),
    Row(b"\x7fELF", _elf),
    Row(b"EMiL", f"a LiME dump: {_RAM_ALONE}"),
    Row(b"AVML", f"an AVML dump: {_RAM_ALONE}"),
    Row(b"KDUMP   ", f"a kdump file (makedumpfile, or QEMU's dump-guest-memory): {_RAM_ALONE}"),
    Row(b"DISKDUMP", f"a diskdump file: {_RAM_ALONE}"),
    Row(b"makedumpfile\0", f"a flattened kdump file (makedumpfile -F, or QEMU's dump-guest-memory): {_RAM_ALONE}"),
    Row(b"PAGEDU64", f"a Windows crash dump: {_RAM_ALONE}"),
    Row(b"PAGEDUMP", f"a Windows crash dump: {_RAM_ALONE}"),
    Row(b"\x7fVirtualBox SavedState V", f"a saved state of VirtualBox: {_OTHER_MONITOR}"),
    *(Row(magic.to_bytes(4, "little"), f"a saved state of VMware: {_OTHER_MONITOR}") for magic in _VMWARE),
    Row(b"\0\0\x64\x86\x84\x19\x10\x07", f"a snapshot of Firecracker: {_OTHER_MONITOR}"),
    Row(b"\0\0\xaa\xaa\x84\x19\x10\x07", f"a snapshot of Firecracker: {_OTHER_MONITOR}"),
    Row(b"Xen saved domain", f"a saved domain of Xen: {_OTHER_MONITOR}"),
    Row(
        b"\x53\xff\x00\xf0\x53\xff\x00\xf0",
        "probably raw memory of a PC, as pmemsave or a copy of ram/pc.ram has it: to have it as RAM, mount a new "
        "guest (-o ram=pc.ram:SIZE) and copy it to ram/pc.ram",
    ),
    Row(b"\x55\xaa", f"a raw disk or boot sector: {_DISK}", offset=510),
)
"""The first that fits."""
