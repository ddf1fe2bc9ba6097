"""How a machine whose RAM is its own is captured, and how long that may be tried."""

from dataclasses import dataclass
from enum import StrEnum


class Way(StrEnum):
    """AUTO is the first that works."""

    AUTO = "auto"
    SNAPSHOT = "snapshot"
    PRECOPY = "precopy"


@dataclass(frozen=True)
class CaptureOptions:
    """``way`` forces one; after ``max_rounds`` rounds of precopy the guest is stopped for what is left."""

    way: Way = Way.AUTO
    max_rounds: int = 10
