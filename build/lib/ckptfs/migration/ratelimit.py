"""max-bandwidth: when the next bytes may go, so that no window of 100 ms carries more than its share."""

WINDOW = 0.1
"""Seconds. What was not used of a longer time is lost; no wait is longer, so that a new limit counts at once."""


class RateLimit:
    """Bytes a second over all channels of a migration; 0 is unlimited.

    The caller asks before each payload, waits and asks again until the answer is 0, and tells afterwards how
    many bytes it was::

        while delay := limit.delay(now()):
            await sleep(delay)
        ...
        limit.charge(written)

    A payload may go whenever nothing is owed, however large it is, and what it exceeds its window by is owed
    by the next ones: over a second and more, the limit is held to within a window and a payload a channel.
    """

    def __init__(self, bytes_per_second: int = 0) -> None:
        self.bytes_per_second = bytes_per_second
        """May be changed at any time."""
        self._credit = 0.0
        self._counted_until: float | None = None

    def delay(self, now: float) -> float:
        """Seconds to wait before asking again; 0: the next bytes may go.

        ``now`` is in seconds, from any clock that never goes back.
        """
        limit = self.bytes_per_second
        if limit == 0:
            self._credit, self._counted_until = 0.0, now
            return 0.0
        since = 0.0 if self._counted_until is None else now - self._counted_until
        self._credit = min(self._credit + since * limit, WINDOW * limit)
        self._counted_until = now
        if self._credit < 0:
            return min(max(-self._credit / limit, _TICK), WINDOW)
        return 0.0

    def charge(self, length: int) -> None:
        """Count ``length`` bytes that went."""
        if self.bytes_per_second:
            self._credit -= length


_TICK = 1e-3
"""Shorter waits are not worth a task switch."""
