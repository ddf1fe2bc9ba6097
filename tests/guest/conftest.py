"""Checkpoints of a module's `PAGES`, a place for more of them, and that nothing stays open."""

from pathlib import Path

import pytest

from tests.doubles.migration_file import Block, MigrationFile


@pytest.fixture
def golden(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A checkpoint of one block, of the module's `PAGE_COUNT` pages, with data in its `PAGES`."""
    path = tmp_path / "golden"
    MigrationFile(blocks=[Block("pc.ram", request.module.PAGE_COUNT, request.module.PAGES)]).write(path)
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An empty directory to save to."""
    directory = tmp_path / "ckpt"
    directory.mkdir()
    return directory


@pytest.fixture(autouse=True)
def _faults_reach_all_reads(reads_by_threads: None) -> None:
    """Threads read, and faults are put into what they call."""
