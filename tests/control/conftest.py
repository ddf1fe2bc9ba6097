"""Real mounts, as in tests/mount, and what the daemon of one has open and mapped."""

import pytest

from tests.mount.conftest import _adopt_orphans, mount, mount_point, public, standing

__all__ = ["_adopt_orphans", "mount", "mount_point", "public", "standing"]


@pytest.fixture(autouse=True)
def _faults_reach_all_reads(reads_by_threads: None) -> None:
    """Threads read, and faults are put into what they call."""
