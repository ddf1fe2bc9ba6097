"""Which parts of a checkpoint a start of its machine touches: kept beside the file, read first by the next start.

A text, ``FILE.working-set`` (of an object, one beside it): which version of the file it is about, then a range of
bytes a line. It is a hint and no more: a range that is wrong costs a read. What is recorded are pages that a
process has in its page tables (Documentation/admin-guide/mm/pagemap.rst), or that a mount has read.
"""

import contextlib
import os
import secrets
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ckptfs.channels.version import FileVersion, Version

SUFFIX = ".working-set"
_HEAD = "ckptfs working set 1"
WORKING_SET_LENGTH_MAX = 16 << 20
_JOINED = 256 << 10
"""Bytes between two ranges that are read along: cheaper than another read."""
_PAGE = 4096
_PRESENT = 1 << 63


class ByteRange(NamedTuple):
    """Bytes [start, stop) of a file."""

    start: int
    stop: int


def write_working_set(path: str, fd: int, ranges: Iterable[ByteRange]) -> int:
    """Keep ``ranges`` of the checkpoint at ``path``, which ``fd`` has open; return how many bytes they are.

    Replaces an earlier one at once or not at all. Blocks; raises OSError.
    """
    joined = join(ranges)
    temporary = f"{path}{SUFFIX}.{secrets.token_hex(6)}"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(format_working_set(FileVersion.of(fd), joined))
        os.rename(temporary, path + SUFFIX)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return sum(found.stop - found.start for found in joined)


def read_working_set(path: str, fd: int) -> list[ByteRange]:
    """The ranges that were kept of this version of the file at ``path``; none if there are none (blocks)."""
    try:
        with open(path + SUFFIX, errors="replace") as file:
            text = file.read(WORKING_SET_LENGTH_MAX)
    except OSError:
        return []
    version = FileVersion.of(fd)
    return parse_working_set(text, version, version.length)


def format_working_set(version: Version, ranges: Iterable[ByteRange]) -> str:
    """The text that is kept of ``ranges``."""
    return "".join(f"{line}\n" for line in (_head(version), *(f"{start:#x} {stop:#x}" for start, stop in ranges)))


def parse_working_set(text: str, version: Version, length: int) -> list[ByteRange]:
    """The ranges in a text; none if it is about another version, or nonsense. ``length``: of the file, bytes."""
    head, *lines = text.splitlines() or [""]
    if head != _head(version):
        return []
    try:
        ranges = [ByteRange(*(int(word, 16) for word in line.split())) for line in lines]
    except (ValueError, TypeError):
        return []
    return [found for found in ranges if 0 <= found.start < found.stop <= length]


def _head(version: Version) -> str:
    if isinstance(version, FileVersion):
        return f"{_HEAD} {version.inode} {version.length} {version.mtime_ns}"
    return f"{_HEAD} {version.etag} {version.length} {version.version}"


def join(ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """Put together what is near to one another, so that it can be read in large pieces."""
    joined: list[ByteRange] = []
    for found in sorted(ranges):
        if joined and found.start <= joined[-1].stop + _JOINED:
            joined[-1] = ByteRange(joined[-1].start, max(joined[-1].stop, found.stop))
        else:
            joined.append(found)
    return joined


def read_ahead(fd: int, ranges: Sequence[ByteRange]) -> None:
    """Have the kernel read the ranges into its page cache, without waiting for it (posix_fadvise(2))."""
    for found in ranges:
        os.posix_fadvise(fd, found.start, found.stop - found.start, os.POSIX_FADV_WILLNEED)


def touched(pid: int, fd: int) -> list[ByteRange]:
    """The parts of a file that process ``pid`` has mapped and touched (blocks). Raises OSError."""
    status = os.fstat(fd)
    found: list[ByteRange] = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for line in maps:
            addresses, _, offset, _, inode, *_ = line.split(maxsplit=5)
            if int(inode) != status.st_ino:
                continue
            start, stop = (int(address, 16) for address in addresses.split("-"))
            entries = os.pread(pagemap.fileno(), (stop - start) // _PAGE * 8, start // _PAGE * 8)
            present = (np.frombuffer(entries, "<u8") & np.uint64(_PRESENT)) != 0
            edges = np.flatnonzero(np.diff(present, prepend=False, append=False)).reshape(-1, 2)
            first = int(offset, 16)
            found += [ByteRange(first + a * _PAGE, first + b * _PAGE) for a, b in edges.tolist()]
    return found
