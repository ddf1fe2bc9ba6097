"""A small Linux guest that knows when its memory is wrong: a Debian kernel and an initrd made here.

What it prints on ttyS0, a line each:

* ``blob MD5``: once, the md5 of a blob of random bytes in its RAM,
* ``tick N MD5OK`` or ``tick N MD5BAD``: three times a second, N counts up; the blob was hashed again,
* ``dirty G OK`` or ``dirty G BAD``: with `dirty=MIB`, pass G over a file of that size ended, every page of it
  rewritten with other content than before, and read back.
"""

import hashlib
import lzma
import os
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache" / "guest"
KERNEL_COMMAND_LINE = "console=ttyS0 quiet cryptomgr.notests panic=-1"
BLOB_LENGTH = 8 << 20  # hashed in 0.1 s under TCG

# The kernel hands unknown NAME=VALUE words of its command line to init as environment variables.
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t tmpfs -o size=100% none /tmp
exec >/dev/ttyS0 2>&1
[ ${vmcoreinfo:-0} -eq 0 ] || insmod /qemu_fw_cfg.ko # hands QEMU the note of that name

unit=65536
units=$(($(stat -c %s /blob) / unit)) # of the blob
blobs() { echo $(($1 * 1048576 / (unit * units))); } # that fit into $1 MiB
units_of() { dd if=$1 bs=$unit skip=$2 count=$3 2>/dev/null; }
good() { [ "$(md5sum)" = "$(cat /blob.md5)" ]; }

# Blob after blob into /tmp/dirty, each one rotated by another number of units in each pass.
rotation() { echo $(((pass + blob) % (units - 1) + 1)); }
rewrite() {
    for blob in $(seq 0 $((count - 1))); do
        by=$(rotation)
        units_of /blob $by $((units - by))
        units_of /blob 0 $by
    done
}
is_whole() {
    for blob in $(seq 0 $((count - 1))); do
        by=$(rotation)
        start=$((blob * units))
        { units_of /tmp/dirty $((start + units - by)) $by
          units_of /tmp/dirty $start $((units - by)); } | good || return 1
    done
}

echo "blob $(md5sum </blob)"
if [ ${fill:-0} -gt 0 ]; then
    for blob in $(seq $(blobs $fill)); do cat /blob; done >/tmp/fill
    echo filled
fi
if [ ${dirty:-0} -gt 0 ]; then
    count=$(blobs $dirty)
    pass=0
    while :; do
        pass=$((pass + 1))
        rewrite 1<>/tmp/dirty
        is_whole && echo "dirty $pass OK" || echo "dirty $pass BAD"
    done &
fi
tick=0
while :; do
    tick=$((tick + 1))
    good </blob && echo "tick $tick MD5OK" || echo "tick $tick MD5BAD"
    usleep 200000
done
"""


@dataclass(frozen=True)
class Guest:
    """What QEMU boots, and the md5 (hex digits) of the blob in the guest's RAM."""

    kernel: Path
    initrd: Path
    blob_md5: str

    def boot(self, append: str) -> list[str]:
        """QEMU's arguments; `append` are further words for the kernel's command line."""
        command_line = f"{KERNEL_COMMAND_LINE} {append}"
        return ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", command_line]


def build_guest(directory: Path) -> Guest:
    """Write an initrd with a new blob of random bytes into `directory`.

    Raises FileNotFoundError where `.ci/install` has not fetched the kernel and busybox yet.
    """
    blob = os.urandom(BLOB_LENGTH)
    md5 = hashlib.md5(blob).hexdigest()
    initrd = directory / "initrd"
    initrd.write_bytes(
        _cpio(
            [
                *(_directory(name) for name in ("bin", "dev", "proc", "tmp")),
                _file("bin/busybox", (CACHE / "busybox").read_bytes(), 0o755),
                _file("init", INIT.encode(), 0o755),
                *_module("qemu_fw_cfg.ko"),
                _file("blob", blob, 0o444),
                _file("blob.md5", f"{md5}  -\n".encode(), 0o444),
                _CONSOLE,
                _TRAILER,
            ]
        )
    )
    return Guest(CACHE / "vmlinuz", initrd, md5)


@dataclass(frozen=True)
class _Entry:
    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


_CONSOLE = _Entry("dev/console", 0o020600, device=(5, 1))  # for what init prints before it has mounted /dev
_TRAILER = _Entry("TRAILER!!!", 0)


def _module(name: str) -> list[_Entry]:
    """A module of the kernel, which Debian has packed since 13; none where it was not fetched."""
    path = CACHE / name
    if not path.exists():
        return []
    data = path.read_bytes()
    return [_file(name, lzma.decompress(data) if data.startswith(b"\xfd7zXZ") else data, 0o444)]


def _directory(name: str) -> _Entry:
    return _Entry(name, 0o040755)


def _file(name: str, data: bytes, permissions: int) -> _Entry:
    return _Entry(name, 0o100000 | permissions, data)


def _cpio(entries: list[_Entry]) -> bytes:
    """An archive in the "newc" format, the one that the kernel unpacks (its buffer-format.rst)."""
    archive = bytearray()
    for inode, entry in enumerate(entries, start=1):
        name = entry.name.encode() + b"\0"
        uid = gid = mtime = major = minor = checksum = 0
        fields = (inode, entry.mode, uid, gid, 1, mtime, len(entry.data), major, minor, *entry.device)
        archive += b"070701" + b"".join(b"%08X" % field for field in (*fields, len(name), checksum))
        archive += name
        archive += bytes(-len(archive) % 4)
        archive += entry.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
