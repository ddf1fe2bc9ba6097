"""How objects are reached and kept: what `-o endpoint=`, `cache=` and their kin say."""

import re
from dataclasses import dataclass

from ckptfs.errors import CommandError
from ckptfs.migration.size import MiB

PART_SIZE_MIN = 5 * MiB
PART_SIZE_MAX = 5 << 30
"""Bytes of one part of a multipart upload (Amazon S3 User Guide, multipart upload limits)."""


@dataclass
class StoreOptions:
    """Of one mount. Sizes are in bytes; of what is None, the environment or the store has a default."""

    endpoint: str | None = None
    """URL of the store, where it is not the one that the scheme is named after."""
    region: str | None = None
    part_size: int | None = None
    """Of a part of an upload."""
    cache: str | None = None
    """Directory in which what was fetched is kept, for all mounts."""
    cache_size: int | None = None
    """What it may hold."""


def parse_endpoint(text: str) -> str:
    """A URL of a host alone. Raises CommandError, also for a password in it: everybody sees a mount's options."""
    if not re.fullmatch(r"https?://[^/?#@\s]+/?", text):
        raise CommandError(
            "expects a URL without user, password or path, as in endpoint=https://s3.example.com:9000"
        )
    return text.rstrip("/")
