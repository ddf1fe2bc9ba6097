"""max-bandwidth: a real limit, on a clock that the test turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.migration.ratelimit import WINDOW, RateLimit
from ckptfs.migration.size import MiB


class Clock:
    """A migration that sends payload after payload, and sleeps when told to."""

    def __init__(self, limit: RateLimit) -> None:
        self.limit = limit
        self.now = 1000.0
        self.sent = 0

    def send(self, length: int) -> None:
        while delay := self.limit.delay(self.now):
            assert delay <= WINDOW
            self.now += delay
        self.limit.charge(length)
        self.sent += length

    def send_for(self, seconds: float, length: int) -> float:
        """Bytes a second that get through."""
        start, sent = self.now, self.sent
        while self.now - start < seconds:
            self.send(length)
        return (self.sent - sent) / (self.now - start)


@given(st.integers(1 * MiB, 10_000 * MiB), st.integers(20, 500))
def test_the_limit_is_held_within_a_tenth(bytes_per_second: int, payloads_a_second: int) -> None:
    clock = Clock(RateLimit(bytes_per_second))
    rate = clock.send_for(1.0, bytes_per_second // payloads_a_second)
    assert rate == pytest.approx(bytes_per_second, rel=0.1)


@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(0, MiB)), max_size=50))
def test_late_wake_ups_are_made_up_for_but_no_window_is_exceeded(steps: list[tuple[float, int]]) -> None:
    clock = Clock(RateLimit(10 * MiB))
    for late, length in steps:
        clock.send(length)
        clock.now += late
    longest = max((length for _, length in steps), default=0)
    assert clock.sent <= (clock.now - 1000.0 + WINDOW) * 10 * MiB + longest


def test_idle_time_is_not_saved_up() -> None:
    clock = Clock(RateLimit(MiB))
    clock.send(4096)
    clock.now += 3600
    assert clock.send_for(1.0, 4096) == pytest.approx(MiB, rel=0.11)


def test_zero_is_unlimited() -> None:
    limit = RateLimit()
    assert [limit.delay(0.0) for _ in range(3)] == [0.0, 0.0, 0.0]


def test_a_new_limit_counts_at_once() -> None:
    clock = Clock(RateLimit(1024))
    clock.send(MiB)  # owes a quarter of an hour
    assert 0 < clock.limit.delay(clock.now) <= WINDOW
    clock.limit.bytes_per_second = 100 * MiB
    clock.now += WINDOW
    assert clock.limit.delay(clock.now) == 0
    clock.limit.bytes_per_second = 0
    assert clock.limit.delay(clock.now) == 0
    clock.limit.bytes_per_second = 10 * MiB
    assert clock.send_for(2.0, 65536) == pytest.approx(10 * MiB, rel=0.1)


def test_a_payload_larger_than_a_window_goes_and_is_paid_for() -> None:
    assert Clock(RateLimit(MiB)).send_for(60.0, 2 * MiB) == pytest.approx(MiB, rel=0.1)


def test_many_channels_share_one_limit() -> None:
    limit = RateLimit(8 * MiB)
    now, sent = 0.0, 0
    while now < 1.0:
        delays = []
        for _ in range(8):
            delay = limit.delay(now)
            delays.append(delay)
            if not delay:
                limit.charge(65536)
                sent += 65536
        now += min(delay for delay in delays if delay)
    assert sent == pytest.approx(8 * MiB, rel=0.1)
