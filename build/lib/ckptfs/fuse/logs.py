"""Where the daemon logs: syslog, a file, or standard error. What could not be logged is counted, and told.

The trio thread writes here, so nothing waits for syslogd, nor for the reader of a FIFO.
"""

import contextlib
import errno
import logging
import os
import socket
import sys
from logging.handlers import SysLogHandler
from typing import TextIO

from ckptfs.errors import StateError
from ckptfs.fuse.outcome import describe
from ckptfs.namespace.options import MountOptions
from ckptfs.namespace.status import counted

log = logging.getLogger(__name__)

SYSLOG = "/dev/log"
_FORMAT = "mount.ckptfs[%(process)d]: %(levelname)s: %(message)s"


class _Formatter(logging.Formatter):
    """Writes one line a message, whatever is quoted in it; a traceback comes after it as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        return super().formatMessage(record).replace("\n", "\\n")


class _Counting(logging.Handler):
    """Counts what could not be written; when it can be again, the log itself says how much is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = 0
        self.trouble: str | None = None
        """Why the newest line could not be written; None if it was."""
        self._untold = 0

    def handle(self, record: logging.LogRecord) -> bool:
        self.trouble = None
        handled = super().handle(record)
        if self._untold and self.trouble is None:
            text, self._untold = f"{counted(self._untold, 'line')} could not be logged", 0
            super().handle(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None))
        return bool(handled)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        error = sys.exc_info()[1]
        self.trouble = (isinstance(error, OSError) and error.strerror) or str(error)
        self.lost += 1
        self._untold += 1


class _Stream(_Counting):
    """An open file, or standard error."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.stream.write(self.format(record) + "\n")
            self.stream.flush()
        except (OSError, ValueError):
            self.handleError(record)

    def close(self) -> None:
        if self.stream is not sys.stderr:
            with contextlib.suppress(OSError):  # what it could not write
                self.stream.close()
        super().close()


class _Syslog(_Counting):
    """Datagrams to syslogd (RFC 3164). It may be away and come back: what fails is tried on a new connection."""

    def __init__(self) -> None:
        super().__init__()
        self._socket: socket.socket | None = None

    def emit(self, record: logging.LogRecord) -> None:
        level = SysLogHandler.priority_names[SysLogHandler.priority_map[record.levelname]]
        message = f"<{SysLogHandler.LOG_DAEMON << 3 | level}>{self.format(record)}\0".encode(errors="replace")
        try:
            if self._socket is not None:
                try:
                    self._socket.send(message)
                    return
                except OSError:
                    pass
            self.connect().send(message)
        except OSError:
            self.handleError(record)

    def connect(self) -> socket.socket:
        """Connect to the syslogd that is there now; OSError where there is none."""
        if self._socket is not None:
            self._socket.close()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.connect(SYSLOG)
        return self._socket

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        super().close()


class Log:
    """The daemon's log; there is one a process. OSError where its file can't be opened."""

    def __init__(self, options: MountOptions) -> None:
        self._path = None if options.log in (None, "syslog") else options.log
        form = f"%(asctime)s {_FORMAT}"
        self._handler: _Stream | _Syslog
        if self._path is not None:
            self._name, self._handler = self._path, _Stream(_open(self._path))
        elif options.foreground and options.log is None:
            self._name, self._handler = "standard error", _Stream(sys.stderr)
        else:
            self._name, self._handler, form = "syslog", _Syslog(), _FORMAT
        self._handler.setFormatter(_Formatter(form))
        self._handler.addFilter(_matters)
        root = logging.getLogger()
        root.addHandler(self._handler)
        root.setLevel(logging.WARNING)
        logging.getLogger("ckptfs").setLevel(logging.DEBUG if options.debug else logging.INFO)

    @property
    def missing(self) -> str | None:
        """What to tell whoever mounts: there is no syslog; None if all is well."""
        if not isinstance(self._handler, _Syslog):
            return None
        try:
            self._handler.connect()
        except OSError as error:
            return f"there is no syslog here ({SYSLOG}: {error.strerror}): to have a log, give log=FILE"
        return None

    @property
    def state(self) -> str:
        """For status: where the log is, and what is missing in it."""
        handler = self._handler
        if handler.trouble is not None:
            return f"none: {self._name}: {handler.trouble} ({counted(handler.lost, 'line')} lost)"
        return f"{self._name} ({counted(handler.lost, 'line')} lost)" if handler.lost else self._name

    def reopen(self, mount_device: int) -> None:
        """Go on in the file that has the name now, as after a rotation (blocking: use a worker thread).

        Where that can't be opened, or lies on our own mount, the log goes on where it was, and says so.
        """
        if self._path is None:
            log.info("SIGHUP: there is no log file to reopen")
            return
        try:
            stream = _open(self._path)
            if os.fstat(stream.fileno()).st_dev == mount_device:
                stream.close()
                raise StateError(f"{self._path}: lies on this mount")
        except (OSError, StateError) as error:
            log.warning("the log can't be reopened, and continues where it was: %s", describe(error))
            return
        assert isinstance(self._handler, _Stream)
        former, self._handler.stream = self._handler.stream, stream
        former.close()
        log.info("SIGHUP: the log goes on here")


def _matters(record: logging.LogRecord) -> bool:
    """Leave out pyfuse3's word of an answer that nobody waits for: its caller was killed, or the mount is gone.

    write(2) to /dev/fuse is ENOENT then (fs/fuse/dev.c: fuse_dev_do_write, Linux 6.1).
    """
    text = record.getMessage()
    return not (record.name == "pyfuse3" and "fuse_reply_*" in text and text.endswith(os.strerror(errno.ENOENT)))


def _open(path: str) -> TextIO:
    """Open for appending; a FIFO without a reader is an error (ENXIO), and never waited for."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    return open(fd, "a", encoding="utf-8", errors="backslashreplace")
