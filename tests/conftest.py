"""For every test: nothing is skipped in CI, nothing is logged unannounced, stock QEMU is at hand."""

import logging
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.doubles.storage import open_descriptors, wait_until_open
from tests.qemu.guest import Guest, build_guest
from tests.qemu.stock_checkpoint import StockCheckpoints

# A machine that is busy with something else fails no test: no example has a deadline.
settings.register_profile("ckptfs", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ckptfs")

# --- a test that CI skips has failed -----------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not hasattr(report, "wasxfail"):  # an expected failure is reported as skipped, too
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and CI is set: {report.longreprtext}"


# --- nothing stays open -----------------------------------------------------------------------------------

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    item.stash[_FAILED] = True
    yield
    item.stash[_FAILED] = False


@pytest.fixture
def nothing_stays_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """This process has in the end what it had open before: to be used by whatever opens and closes things.

    Of a test that failed that is not asked: its traceback holds on to them, and would be hidden by another error.
    """
    before = open_descriptors()
    yield
    if not request.node.stash.get(_FAILED, True):
        wait_until_open(before)


# --- who reads --------------------------------------------------------------------------------------------


@pytest.fixture
def reads_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have threads read, as where there is no io_uring: for tests that put faults into `os.preadv`.

    What the kernel reads by itself is tested in tests/channels/test_ring.py, and by all tests of mounts.
    """
    monkeypatch.setattr("ckptfs.channels.channels.ring_of_this_run", lambda: None)


# --- a warning or a traceback in the log fails the test ---------------------------------------------------


class _Alarms(logging.Handler):
    """Keeps what is a warning or worse, or carries a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.expected: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or record.exc_info:
            self.records.append(record)


@pytest.fixture(autouse=True)
def _log_alarms() -> Iterator[_Alarms]:
    alarms = _Alarms()
    logging.getLogger().addHandler(alarms)
    yield alarms
    logging.getLogger().removeHandler(alarms)
    texts = [f"{record.levelname} {record.name}: {record.getMessage()}" for record in alarms.records]
    for pattern in alarms.expected:
        assert any(re.search(pattern, text) for text in texts), f"nothing was logged that matches {pattern!r}"
    unannounced = [text for text in texts if not any(re.search(pattern, text) for pattern in alarms.expected)]
    assert not unannounced, "logged unannounced:\n" + "\n".join(unannounced)


@pytest.fixture
def expect_log(_log_alarms: _Alarms) -> Callable[[str], None]:
    """`expect_log(PATTERN)` announces warnings and errors: they have to come, and any other fails the test.

    PATTERN is searched for in "LEVEL LOGGER: MESSAGE".
    """
    return _log_alarms.expected.append


# --- stock QEMU -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def guest_files(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """Kernel and initrd of the tests' guest."""
    return build_guest(tmp_path_factory.mktemp("guest"))


@pytest.fixture(scope="session")
def stock_checkpoint(guest_files: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockCheckpoints]:
    """`stock_checkpoint(multifd=4, direct_io=True)` is a checkpoint that stock QEMU wrote: see Variant."""
    directory: Path = tmp_path_factory.mktemp("stock")
    yield StockCheckpoints(guest_files, directory)
    shutil.rmtree(directory)  # hundreds of MiB that pytest would keep
