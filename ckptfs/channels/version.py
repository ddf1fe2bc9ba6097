"""Which file is under a name, so that a save replaces the one it knows and no other.

A new file has another inode; one that was written in place has another time of change. Owner, mode, links and names
may change without anything being lost, so st_ctime does not count. st_dev does not either: network file systems
get another number whenever they are mounted.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class FileVersion:
    """A file and its content, as far as stat(2) tells: inode, length in bytes, time of the last write."""

    inode: int
    length: int
    mtime_ns: int

    @classmethod
    def of(cls, fd: int) -> "FileVersion":
        """That of an open file; of an empty one `NOTHING`. A network file system looks anew for an open file."""
        status = os.fstat(fd)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns) if status.st_size else NOTHING


NOTHING = FileVersion(0, 0, 0)
"""No file, or one that is empty: nothing that could be lost."""


@dataclass(frozen=True)
class ObjectVersion:
    """An object of a store and its content: ETag (RFC 9110, 8.8.3), length in bytes, and the version's id.

    ``version`` is None where the store keeps no versions.
    """

    etag: str
    length: int
    version: str | None = None


Version = FileVersion | ObjectVersion


@dataclass
class KnownFile:
    """What a mount knows to be under the name that it was given: what it came from, or has last written there."""

    version: Version
