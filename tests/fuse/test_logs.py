"""Syslog that is away, comes back, or does not listen; a disk that is full."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptfs.fuse import logs
from ckptfs.fuse.logs import Log
from ckptfs.namespace.options import MountOptions

NewLog = Callable[[str], Log]
log = logging.getLogger("ckptfs.test")


@pytest.fixture
def new_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewLog]:
    """`new_log(WHERE)`, with the socket of syslogd in tmp_path; logging is as it was afterwards."""
    monkeypatch.setattr(logs, "SYSLOG", str(tmp_path / "syslog"))
    root, own = logging.getLogger(), logging.getLogger("ckptfs")
    levels, handlers = (root.level, own.level), list(root.handlers)
    yield lambda where: Log(MountOptions(log=where))
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(levels[0])
    own.setLevel(levels[1])


@pytest.fixture
def syslogd(tmp_path: Path) -> Iterator[Callable[[], socket.socket]]:
    """`syslogd()` listens from now on."""
    sockets = []

    def listen() -> socket.socket:
        (tmp_path / "syslog").unlink(missing_ok=True)
        sockets.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sockets[-1].bind(str(tmp_path / "syslog"))
        return sockets[-1]

    yield listen
    for listener in sockets:
        listener.close()


def test_syslog_that_goes_away_and_comes_back(new_log: NewLog, syslogd: Callable[[], socket.socket]) -> None:
    journal = new_log("syslog")
    assert journal.missing is not None
    log.info("nobody hears")
    assert journal.state == "none: syslog: No such file or directory (1 line lost)"
    first = syslogd()
    assert journal.missing is None
    log.info("one\ntwo")
    pid = os.getpid()
    assert first.recv(1000) == f"<30>mount.ckptfs[{pid}]: INFO: one\\ntwo\0".encode()
    assert first.recv(1000) == f"<28>mount.ckptfs[{pid}]: WARNING: 1 line could not be logged\0".encode()
    assert journal.state == "syslog (1 line lost)"
    first.close()
    log.info("nobody hears")
    assert journal.state == "none: syslog: Connection refused (2 lines lost)"
    second = syslogd()
    log.info("three")
    assert second.recv(1000).endswith(b"INFO: three\0")
    assert second.recv(1000).endswith(b"1 line could not be logged\0")


def test_a_syslogd_that_stands_still_is_not_waited_for(
    new_log: NewLog, syslogd: Callable[[], socket.socket]
) -> None:
    listener = syslogd()
    journal = new_log("syslog")
    while not journal.state.startswith("none"):
        log.info("%s", "x" * 10000)
    assert "temporarily unavailable" in journal.state
    assert listener.recv(20000).startswith(b"<30>mount.ckptfs[")


def test_a_full_disk_is_told(new_log: NewLog) -> None:
    journal = new_log("/dev/full")
    log.info("a line")
    assert journal.state == "none: /dev/full: No space left on device (1 line lost)"
    assert journal.missing is None


def test_an_answer_that_nobody_waits_for(
    new_log: NewLog, tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    """A caller was killed, or the mount is gone: pyfuse3 calls that an error, and it is none."""
    expect_log("pyfuse3: ")
    new_log(str(tmp_path / "log"))
    for name in ("fuse_release", "fuse_read"):
        for reason in ("No such file or directory", "Invalid argument"):
            logging.getLogger("pyfuse3").error(f"{name}(): fuse_reply_* failed with %s", reason)
    logging.getLogger("pyfuse3").error("No such file or directory")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.partition("ERROR: ")[2] for line in lines] == [
        "fuse_release(): fuse_reply_* failed with Invalid argument",
        "fuse_read(): fuse_reply_* failed with Invalid argument",
        "No such file or directory",
    ]
