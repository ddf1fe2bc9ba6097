"""query-migrate: QEMU's fields, in the order and the words of its monitor."""

import json

from ckptfs.migration.query import MigrationStats, QueryMigrate
from ckptfs.migration.status import MigrationStatus
from tests.migration.conftest import StockMonitor


def test_never_migrated(stock_monitor: StockMonitor) -> None:
    assert QueryMigrate().to_json() == {} == stock_monitor.qmp("query-migrate")
    assert QueryMigrate().info() == "Migration status: none\n"


def test_a_running_save() -> None:
    query = QueryMigrate(MigrationStatus.ACTIVE, total_time=10, setup_time=1, ram=MigrationStats(remaining=8192))
    answer = query.to_json()
    assert list(answer) == ["status", "total-time", "setup-time", "ram"]
    assert answer["ram"]["remaining"] == 8192
    assert json.loads(json.dumps(answer)) == answer


def test_fields_are_those_of_stock_qemu(stock_monitor: StockMonitor) -> None:
    schema = {entity["name"]: entity for entity in stock_monitor.qmp("query-qmp-schema")}

    def members(name: str) -> dict[str, str]:
        return {member["name"]: member["type"] for member in schema[name]["members"]}

    information = members(schema["query-migrate"]["ret-type"])
    query = QueryMigrate(MigrationStatus.FAILED, 1, 2, 3, 4, "why", MigrationStats())
    assert set(query.to_json()) <= set(information)
    assert set(query.to_json()["ram"]) == set(members(information["ram"]))


def test_info_of_a_completed_save() -> None:
    stats = MigrationStats(
        transferred=2048, total=1 << 20, duplicate=3, normal=4, normal_bytes=16384, mbps=1.255, dirty_sync_count=1
    )
    query = QueryMigrate(MigrationStatus.COMPLETED, total_time=12, downtime=3, setup_time=1, ram=stats)
    assert query.info().splitlines() == [
        "Migration status: completed",
        "total time: 12 ms",
        "downtime: 3 ms",
        "setup: 1 ms",
        "transferred ram: 2 kbytes",
        "throughput: 1.25 mbps",
        "remaining ram: 0 kbytes",
        "total ram: 1024 kbytes",
        "duplicate: 3 pages",
        "normal: 4 pages",
        "normal bytes: 16 kbytes",
        "dirty sync count: 1",
        "page size: 4 kbytes",
        "multifd bytes: 0 kbytes",
        "pages-per-second: 0",
    ]


def test_info_of_a_failure_names_it() -> None:
    query = QueryMigrate(MigrationStatus.FAILED, total_time=1, error_desc="No space left on device")
    assert query.info().splitlines()[0] == "Migration status: failed (No space left on device)"
