"""Leases: who alone saves to a checkpoint, and when that is over.

A lease is a small text beside the checkpoint, which its holder writes anew three times a term. Clocks of two hosts
are never compared: to others it is free when its text has stood still for a whole term of their own clock, and its
holder counts on it for less than that. What is here knows no clock: ``now`` is the caller's, in seconds.
"""

import json
from dataclasses import asdict, dataclass, replace

from ckptfs.errors import CommandError
from ckptfs.namespace.status import printable

TERM = 30.0
"""Seconds after which a lease that is not renewed is free."""

RENEWALS = 3
"""In a term."""

COUNTED_ON = 0.8
"""The part of a term in which the holder counts on it: a save that goes by it needs time for its last step."""

SUFFIX = ".lock"
TEXT_LENGTH_MAX = 4096

_HEAD = "ckptfs-lease"
_TERM_MAX = 3600.0
_TYPES = {"host": str, "pid": int, "boot": str, "since": str, "token": str, "term": float, "renewal": int}


@dataclass(frozen=True)
class Holder:
    """Who has a lease: host, process, the host's boot, since when (UTC), for how long at a time (seconds).

    ``token`` is its own for each mount; ``renewal`` counts, so that no two texts are the same.
    """

    host: str
    pid: int
    boot: str
    since: str
    token: str
    term: float = TERM
    renewal: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on host {printable(self.host[:255])}, since {printable(self.since[:32])}"

    def text(self) -> bytes:
        """What is kept beside the checkpoint."""
        return json.dumps({_HEAD: 1, **asdict(self)}).encode() + b"\n"

    def renewed(self) -> "Holder":
        """The same, one renewal later."""
        return replace(self, renewal=self.renewal + 1)


def free_text() -> bytes:
    """The text of a lease that nobody has, where it can't be removed."""
    return json.dumps({_HEAD: 1}).encode() + b"\n"


def read_holder(name: str, text: bytes) -> Holder | None:
    """The holder in the text of the lease ``name``; None if it is free. CommandError if it is no lease."""
    if not text:
        return None
    try:
        found = json.loads(text[:TEXT_LENGTH_MAX])
        if found.pop(_HEAD) != 1:
            raise ValueError
        if not found:
            return None
        if {name: type(value) for name, value in found.items()} != _TYPES:
            raise TypeError
        holder = Holder(**found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CommandError(f"{name}: is no lease of ckptfs: move it away, or mount without `exclusive`") from None
    return replace(holder, term=min(max(holder.term, 0.1), _TERM_MAX))


class Watch:
    """A lease of somebody else, looked at again and again: its holder is alive if its text changes."""

    def __init__(self, holder: Holder, text: bytes, now: float) -> None:
        self.holder = holder
        self._text = text
        self._until = now + holder.term

    def is_renewed(self, text: bytes) -> bool:
        """Whether somebody has written it since."""
        return text != self._text

    def is_free(self, text: bytes, now: float) -> bool:
        """Whether it has stood still for its term."""
        return text == self._text and now >= self._until


class Hold:
    """A lease that is ours, as far as we know."""

    def __init__(self, holder: Holder, began: float) -> None:
        """``began``: when the call had begun that took it."""
        self.holder = holder
        self._renewed = began
        self._taken: str | None = None
        self.problem: str | None = None
        """Why the newest renewal failed."""

    def renewed(self, holder: Holder, began: float) -> None:
        """It was written anew, by a call that had begun then."""
        self.holder, self.problem = holder, None
        self._renewed = max(self._renewed, began)

    def take(self, by: Holder | None) -> None:
        """Somebody else has it, or has removed it."""
        self._taken = "somebody has removed it" if by is None else f"{by} has taken it"

    @property
    def taken(self) -> bool:
        """Whether it is gone for good."""
        return self._taken is not None

    def lost(self, now: float) -> str | None:
        """Why nobody may count on it; None while one may."""
        if self._taken is not None:
            return self._taken
        if now < self._renewed + COUNTED_ON * self.holder.term:
            return None
        return f"it has not been renewed for {now - self._renewed:.0f} s ({self.problem or 'no answer yet'})"
