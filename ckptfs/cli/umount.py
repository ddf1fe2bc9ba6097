"""ckptfs umount, and the helper of umount(8): the daemon has ended and the storage is free when they return.

umount(2) itself returns while the daemon finishes a save and holds its files. As the helper this is
/sbin/umount.fuse.ckptfs, which umount(8) calls with the directory and then its options.
"""

import argparse
import os
import select
import subprocess
import sys

from ckptfs import __version__
from ckptfs.api.status import Status, is_dead_mount, read_status
from ckptfs.cli.control import perform, wait_until_idle
from ckptfs.cli.progress import Lines, display_for, tell
from ckptfs.errors import CkptfsError, StateError
from ckptfs.migration.size import format_size
from ckptfs.namespace.status import counted

EXIT_MOUNT = 32
"""As umount(8) has it."""

_PATIENCE = 1.0
"""Seconds of waiting for the daemon that need no words."""


def run(arguments: argparse.Namespace) -> int:
    """Unmount; with ``save``, save before that."""
    directory = os.path.realpath(arguments.directory)
    display = display_for(arguments)
    if is_dead_mount(directory):
        _umount(directory)
        return 0
    status = read_status(directory)
    if arguments.save:
        tell(arguments, perform(directory, "save", display))
    elif status["state"] == "saving":
        wait_until_idle(directory, display)
    status = read_status(directory)
    _umount_and_wait(directory, status, quiet=arguments.quiet or arguments.json)
    if arguments.json:
        tell(arguments, f"unmounted, {_dropped(status)} not saved" if status["written-pages"] else "unmounted")
    return 0


def main() -> int:
    """Run as /sbin/umount.fuse.ckptfs; returns umount(8)'s exit code."""
    parser = argparse.ArgumentParser(prog="umount.fuse.ckptfs", description="The helper of umount(8) for ckptfs.")
    parser.add_argument("--version", action="version", version=f"umount.fuse.ckptfs {__version__}")
    parser.add_argument("directory", metavar="DIR")
    for flag in ("-f", "-l", "-n", "-r", "-v"):
        parser.add_argument(flag, action="append_const", dest="flags", const=flag, default=[])
    parser.add_argument("-N", metavar="NAMESPACE", dest="namespace")
    parser.add_argument("-t", metavar="TYPE")
    arguments = parser.parse_args()
    directory, flags = arguments.directory, arguments.flags
    if arguments.namespace:
        flags += ["-N", arguments.namespace]
    try:
        if "-l" in flags or arguments.namespace or not _can_be_read(directory):
            _umount(directory, *flags)  # nobody knows when the last user goes, or who the daemon is
            return 0
        if read_status(directory)["state"] == "saving":
            print(f"{directory}: a save is running: waiting for it to end", file=sys.stderr)
            wait_until_idle(directory, Lines())
        _umount_and_wait(directory, read_status(directory), *flags)
    except CkptfsError as error:
        print(f"umount.fuse.ckptfs: {error}", file=sys.stderr)
        return EXIT_MOUNT
    return 0


def _can_be_read(directory: str) -> bool:
    """Whether there is a daemon, and we may ask it: root may not look into a mount of somebody else."""
    return os.access(os.path.join(directory, "status.json"), os.R_OK)


def _umount_and_wait(directory: str, status: Status, *flags: str, quiet: bool = False) -> None:
    pidfd = _open_daemon(status["pid"])
    try:
        _umount(directory, *flags)
        if status["written-pages"] and not quiet:
            print(f"{directory}: {_dropped(status)} not saved", file=sys.stderr)
        if pidfd is not None:
            _wait_for_end(pidfd, directory, status["pid"], quiet=quiet)
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _dropped(status: Status) -> str:
    length = sum(block["written-pages"] * block["page-size"] for block in status["blocks"])
    return f"{counted(status['written-pages'], 'written page')} ({format_size(length)})"


def _open_daemon(pid: int) -> int | None:
    """The daemon's pidfd; None if it lives in another pid namespace, where its number means nothing to us."""
    try:
        pidfd = os.pidfd_open(pid)
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"ckptfs" in file.read():
                return pidfd
        os.close(pidfd)
    except OSError:
        pass
    return None


def _umount(directory: str, *flags: str) -> None:
    """Have umount(8) unmount without its helper, which we are; those who are not root have fusermount3."""
    command = ["umount", "-i", *flags] if os.geteuid() == 0 else ["fusermount3", "-u"]
    result = subprocess.run([*command, directory], stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise StateError(result.stderr.strip() or f"{directory}: {command[0]} failed")


def _wait_for_end(pidfd: int, directory: str, pid: int, *, quiet: bool) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if poll.poll(_PATIENCE * 1000):
        return
    if not quiet:
        print(f"{directory}: waiting for its daemon, process {pid}, to end", file=sys.stderr)
    poll.poll()
