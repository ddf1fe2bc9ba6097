"""The answer of query-migrate: fields, names and units of QEMU's MigrationInfo (qapi/migration.json, 10.0)."""

from dataclasses import dataclass, fields
from typing import Any

from ckptfs.migration.status import MigrationStatus


@dataclass(frozen=True)
class MigrationStats:
    """How much RAM went where. Bytes, unless the name says pages; ``mbps`` is megabits a second."""

    transferred: int = 0
    remaining: int = 0
    total: int = 0
    duplicate: int = 0
    """Zero pages."""
    normal: int = 0
    """Pages with data."""
    normal_bytes: int = 0
    mbps: float = 0.0
    dirty_pages_rate: int = 0
    dirty_sync_count: int = 0
    postcopy_requests: int = 0
    page_size: int = 4096
    multifd_bytes: int = 0
    pages_per_second: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0
    dirty_sync_missed_zero_copy: int = 0


@dataclass(frozen=True)
class QueryMigrate:
    """The newest migration, as QEMU reports its own. Times are in milliseconds; None: not known (yet)."""

    status: MigrationStatus = MigrationStatus.NONE
    total_time: int | None = None
    expected_downtime: int | None = None
    downtime: int | None = None
    setup_time: int | None = None
    error_desc: str | None = None
    ram: MigrationStats | None = None

    def to_json(self) -> dict[str, Any]:
        """QMP's answer; ``{}`` before the first migration."""
        if self.status is MigrationStatus.NONE:
            return {}
        members = _members(self)
        if self.ram is not None:
            members["ram"] = _members(self.ram)
        return members

    def info(self) -> str:
        """The text of ``info migrate``, without the block of globals that QEMU prints in front."""
        error = f" ({self.error_desc})" if self.status is MigrationStatus.FAILED and self.error_desc else ""
        lines = [f"Migration status: {self.status}{error}"]
        times = [
            ("total time", self.total_time),
            ("expected downtime", self.expected_downtime),
            ("downtime", self.downtime),
            ("setup", self.setup_time),
        ]
        lines += [f"{name}: {time} ms" for name, time in times if time is not None]
        if self.ram is not None:
            lines += _ram_lines(self.ram)
        return "".join(line + "\n" for line in lines)


def _members(values: MigrationStats | QueryMigrate) -> dict[str, Any]:
    named = {field.name.replace("_", "-"): getattr(values, field.name) for field in fields(values)}
    return {name: value for name, value in named.items() if value is not None}


def _ram_lines(ram: MigrationStats) -> list[str]:
    """As hmp_info_migrate of migration/migration-hmp-cmds.c, 10.0."""
    lines = [
        f"transferred ram: {ram.transferred >> 10} kbytes",
        f"throughput: {ram.mbps:.2f} mbps",
        f"remaining ram: {ram.remaining >> 10} kbytes",
        f"total ram: {ram.total >> 10} kbytes",
        f"duplicate: {ram.duplicate} pages",
        f"normal: {ram.normal} pages",
        f"normal bytes: {ram.normal_bytes >> 10} kbytes",
        f"dirty sync count: {ram.dirty_sync_count}",
        f"page size: {ram.page_size >> 10} kbytes",
        f"multifd bytes: {ram.multifd_bytes >> 10} kbytes",
        f"pages-per-second: {ram.pages_per_second}",
    ]
    more = [
        (ram.dirty_pages_rate, f"dirty pages rate: {ram.dirty_pages_rate} pages"),
        (ram.postcopy_requests, f"postcopy request count: {ram.postcopy_requests}"),
        (ram.precopy_bytes, f"precopy ram: {ram.precopy_bytes >> 10} kbytes"),
        (ram.downtime_bytes, f"downtime ram: {ram.downtime_bytes >> 10} kbytes"),
        (ram.postcopy_bytes, f"postcopy ram: {ram.postcopy_bytes >> 10} kbytes"),
        (
            ram.dirty_sync_missed_zero_copy,
            f"Zero-copy-send fallbacks happened: {ram.dirty_sync_missed_zero_copy} times",
        ),
    ]
    return lines + [line for count, line in more if count]
