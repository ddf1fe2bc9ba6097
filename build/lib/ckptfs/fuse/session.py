"""The FUSE session: mounting, and what the matter is where that fails.

libfuse and fusermount3 know the cause and print it; pyfuse3 raises "fuse_session_mount failed". So what they print
is caught, and becomes the text of the error.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyfuse3

from ckptfs.errors import StateError

log = logging.getLogger(__name__)

_REMEDIES = (
    (
        "device not found|failed to open /dev/fuse: No such file",
        "/dev/fuse is not there: load the kernel module (modprobe fuse); a container has to be given the device"
        " (--device /dev/fuse)",
    ),
    (
        "failed to open /dev/fuse: (Permission denied|Operation not permitted)",
        "{text}: a container has to be given the device (--device /dev/fuse); elsewhere its mode is 0666",
    ),
    ("failed to exec fusermount3", "{text}: mounting without root takes the package fuse3"),
    (
        "mount failed: Operation not permitted",
        "{text}: mounting in a container takes CAP_SYS_ADMIN (--cap-add SYS_ADMIN) and a security profile that"
        " allows mount(2)",
    ),
)
"""What to say of a text of libfuse's (3.10 to 3.17) in which this is found; any other is clear by itself."""


class _Option(str):
    """A mount option: pyfuse3 asks it for its bytes, and would take ASCII alone, but a path may hold anything."""

    def encode(self, encoding: str = "", errors: str = "") -> bytes:
        return os.fsencode(str(self))


def open_session(operations: pyfuse3.Operations, mountpoint: str, source: str, *, allow_other: bool) -> None:
    """Mount on ``mountpoint``; StateError, naming the cause, where that can't be done.

    A comma or backslash in ``source`` would end the option and begin another. Option ro is never given: nobody
    could open ctl with it; the daemon itself refuses to change RAM.
    """
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    options = {"default_permissions", _Option(f"fsname={escaped}"), "subtype=ckptfs"}
    if allow_other:
        options.add("allow_other")
    with _standard_error_caught() as caught:
        try:
            pyfuse3.init(operations, mountpoint, options)
        except RuntimeError as error:
            raise StateError(f"{mountpoint}: {_with_remedy(caught() or str(error))}") from None
        remarks = caught()
    if remarks:
        log.info("%s: %s", mountpoint, remarks)


def _with_remedy(text: str) -> str:
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, text):
            return remedy.format(text=text)
    return text


@contextmanager
def _standard_error_caught() -> Iterator[Callable[[], str]]:
    """Within this, what this process and its children write to descriptor 2 is kept, and read by a call."""
    kept = os.dup(2)
    with open(os.memfd_create("stderr"), "r+", errors="replace") as file:
        os.dup2(file.fileno(), 2)

        def caught() -> str:
            file.seek(0)
            return "; ".join(file.read().splitlines())

        try:
            yield caught
        finally:
            os.dup2(kept, 2)
            os.close(kept)
