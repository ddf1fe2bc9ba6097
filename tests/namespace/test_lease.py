"""Leases by a clock of the test's own: when one is lost, when another's is free, and what a text says."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import CommandError
from ckptfs.namespace.lease import COUNTED_ON, TERM, Hold, Holder, Watch, free_text, read_holder

HOLDER = Holder("a", 7, "0123-4567", "2026-11-25 10:00:00 UTC", "abc", TERM)


def test_a_text_says_who_and_since_when() -> None:
    assert read_holder("vm1.lock", HOLDER.text()) == HOLDER
    assert str(HOLDER) == "process 7 on host a, since 2026-11-25 10:00:00 UTC"
    assert read_holder("vm1.lock", HOLDER.renewed().text()) == HOLDER.renewed() != HOLDER
    assert read_holder("vm1.lock", b"") is None
    assert read_holder("vm1.lock", free_text()) is None


@pytest.mark.parametrize(
    "text",
    [
        b"Dear Sir",
        b"[]",
        b"[" * 4000,
        b'{"host": "a"}',
        json.dumps({**json.loads(HOLDER.text()), "pid": "7"}).encode(),
        json.dumps({**json.loads(HOLDER.text()), "ckptfs-lease": 2}).encode(),
    ],
)
def test_what_is_no_lease_is_left_alone(text: bytes) -> None:
    with pytest.raises(CommandError, match=r"vm1.lock: is no lease of ckptfs: move it away"):
        read_holder("vm1.lock", text)


@given(st.binary(max_size=200))
def test_any_text_is_a_holder_or_an_error(text: bytes) -> None:
    with contextlib.suppress(CommandError):
        read_holder("vm1.lock", text)


def test_a_name_from_another_host_breaks_no_line() -> None:
    odd = Holder("a\nb" + "x" * 1000, 7, "", "now", "abc", 1e9)
    found = read_holder("vm1.lock", odd.text())
    assert found is not None
    assert "\n" not in str(found)
    assert len(str(found)) < 400
    assert found.term == 3600


def test_one_that_stands_still_for_a_term_is_free_and_one_that_is_renewed_is_not() -> None:
    watch = Watch(HOLDER, HOLDER.text(), 100.0)
    assert not watch.is_free(HOLDER.text(), 100.0 + TERM - 0.001)
    assert watch.is_free(HOLDER.text(), 100.0 + TERM)
    assert not watch.is_renewed(HOLDER.text())
    renewed = HOLDER.renewed().text()
    assert watch.is_renewed(renewed)
    assert not watch.is_free(renewed, 100.0 + 2 * TERM)


def test_a_holder_gives_it_up_before_it_is_free_to_others() -> None:
    hold = Hold(HOLDER, 100.0)
    until = 100.0 + COUNTED_ON * TERM
    assert COUNTED_ON < 1
    assert hold.lost(until - 0.001) is None
    assert hold.lost(until) == "it has not been renewed for 24 s (no answer yet)"
    hold.problem = "Input/output error"
    assert hold.lost(until) == "it has not been renewed for 24 s (Input/output error)"
    hold.renewed(HOLDER.renewed(), until - 1)
    assert hold.lost(until + 1) is None
    assert hold.lost(until - 1 + COUNTED_ON * TERM) is not None


def test_a_late_answer_prolongs_it_from_when_its_question_began() -> None:
    hold = Hold(HOLDER, 100.0)
    hold.renewed(HOLDER.renewed(), 110.0)
    hold.renewed(HOLDER.renewed(), 105.0)
    assert hold.lost(110.0 + COUNTED_ON * TERM - 0.001) is None


def test_what_somebody_has_taken_stays_lost() -> None:
    hold = Hold(HOLDER, 100.0)
    hold.take(Holder("b", 8, "", "now", "def"))
    assert hold.taken
    assert hold.lost(100.0) == "process 8 on host b, since now has taken it"
    hold.take(None)
    assert hold.lost(100.0) == "somebody has removed it"
