"""States: one table, and its two rules."""

import itertools

import pytest

from ckptfs.errors import StateError
from ckptfs.migration.status import RUNNING, TRANSITIONS, MigrationStatus, next_status
from tests.migration.conftest import StockMonitor


def walk(*path: str) -> MigrationStatus:
    status = MigrationStatus.NONE
    for name in path:
        status = next_status(status, MigrationStatus(name))
    return status


@pytest.mark.parametrize(
    "path",
    [
        "setup active device completed",
        "setup active completed",
        "setup active cancelling cancelled",
        "setup cancelling cancelled setup active device completed setup",
        "setup failed setup",
        "setup active device failed",
        "setup active cancelling failed",
    ],
)
def test_the_walks_of_a_save_and_a_restore(path: str) -> None:
    walk(*path.split())


def test_a_step_is_in_the_table_or_refused() -> None:
    for old, new in itertools.product(MigrationStatus, MigrationStatus):
        if new in TRANSITIONS.get(old, ()):
            assert next_status(old, new) is new
        elif old is MigrationStatus.CANCELLING and new in RUNNING:
            assert next_status(old, new) is old
        else:
            with pytest.raises(StateError, match=f"'{old}' to '{new}'"):
                next_status(old, new)


def test_whatever_runs_can_fail_and_be_cancelled() -> None:
    for status in RUNNING - {MigrationStatus.CANCELLING}:
        assert {MigrationStatus.FAILED, MigrationStatus.CANCELLING} <= TRANSITIONS[status]
    ends = set(TRANSITIONS) - RUNNING
    assert all(TRANSITIONS[status] == {MigrationStatus.SETUP} for status in ends)


def test_names_are_those_of_stock_qemu(stock_monitor: StockMonitor) -> None:
    schema = stock_monitor.qmp("query-qmp-schema")
    values = next(set(entity["values"]) for entity in schema if "postcopy-paused" in entity.get("values", ()))
    assert {str(status) for status in MigrationStatus} == values | {"postcopy-device"}
