"""mount.ckptfs: mount the RAM of a guest, by hand or as the helper of mount(8)."""

import argparse
import ctypes
import errno
import grp
import logging
import os
import pwd
import stat
import sys
from collections.abc import Callable
from textwrap import fill
from typing import NoReturn

import trio

from ckptfs import __version__
from ckptfs.channels.descriptors import Descriptors, describe_address
from ckptfs.channels.identity import Identity
from ckptfs.channels.lease.keeping import Lease
from ckptfs.channels.lease.places import lock_place
from ckptfs.channels.stores.object_file import find_object
from ckptfs.channels.target import wait_for_saves
from ckptfs.channels.version import NOTHING
from ckptfs.errors import CkptfsError, CommandError, StateError
from ckptfs.fuse.daemon import Starter, harden, run_in_background
from ckptfs.fuse.logs import Log
from ckptfs.fuse.mount import Mount
from ckptfs.fuse.outcome import describe
from ckptfs.guest.guest import Guest
from ckptfs.guest.machine import Machine, Machines
from ckptfs.guest.opening import open_checkpoint
from ckptfs.guest.settings import Settings
from ckptfs.migration.address import (
    FdAddress,
    FileMigrationArgs,
    ObjectAddress,
    QMPSocket,
    SeekableAddress,
    parse_target,
    seekable_file,
)
from ckptfs.migration.capabilities import CAPABILITIES
from ckptfs.migration.capture import CaptureOptions
from ckptfs.migration.parameters import PARAMETERS
from ckptfs.namespace.options import OPTIONS, MountOptions, parse_options

_CLONE_FS = 0x200
_CLONE_NEWNS = 0x20000

EXIT_USAGE = 1
EXIT_SYSTEM = 2
EXIT_MOUNT = 32

SAVE_PATIENCE = 60.0
"""Seconds for which a mount waits for the end of a save to its file."""

log = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    """mount(8) wants 1 for wrong usage, and a user one line."""

    def error(self, message: str) -> NoReturn:
        print(f"mount.ckptfs: {message} (mount.ckptfs --help tells more)", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def parser() -> argparse.ArgumentParser:
    """The parser of mount.ckptfs: mount(8)'s flags, and what -o takes."""
    whole = _Parser(
        prog="mount.ckptfs",
        description="Mount a virtual machine's memory: a checkpoint in QEMU's mapped-ram format, or fresh RAM.",
        epilog=_options_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("-V", "--version", action="version", version=f"mount.ckptfs {__version__}")
    whole.add_argument("spec", metavar="SPEC", help="PATH, file:PATH[,offset=SIZE], s3://BUCKET/KEY, or none")
    whole.add_argument("directory", metavar="DIR", help="where to mount it")
    whole.add_argument(
        "-o", dest="options", action="append", default=[], metavar="OPT[,OPT...]", help="mount options"
    )
    whole.add_argument("-s", dest="sloppy", action="store_true", help="ignore options that are not known")
    whole.add_argument("-f", dest="fake", action="store_true", help="check everything, mount nothing")
    whole.add_argument("-n", action="store_true", help="ignored: there is no mtab to write")
    whole.add_argument("-v", action="store_true", help="ignored: success is silent")
    whole.add_argument("-N", metavar="NAMESPACE", help="mount in another mount namespace (a path)")
    whole.add_argument("-t", metavar="TYPE", help="ignored: the type is ckptfs")
    return whole


def _options_help() -> str:
    """All mount options, for --help."""
    lines = ["mount options (mount.ckptfs(8) tells more):"]
    for option in OPTIONS:
        term = f"  {option.name}={option.value}" if option.value else f"  {option.name}"
        text = fill(option.meaning.replace("`", ""), 78, initial_indent=" " * 24, subsequent_indent=" " * 24)
        lines += [f"{term:23} {text.lstrip()}"] if len(term) < 24 else [term, text]
    for title, names in (("migration parameters", PARAMETERS), ("migration capabilities, on or off", CAPABILITIES)):
        text = ", ".join(name.replace("-", "_") for name in names)
        lines += ["", f"{title}:", fill(text, 78, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(lines)


def main() -> int:
    """Run mount.ckptfs; returns mount(8)'s exit code."""
    whole = parser()
    arguments = whole.parse_args()
    if not arguments.spec or not arguments.directory:
        whole.error("SPEC or DIR is empty: is a variable of your script not set?")
    try:
        options = parse_options(arguments.options, sloppy=arguments.sloppy)
        spec = _parse_spec(arguments.spec, options)
        owner = _find_owner(options)
        _make_absolute(options)
    except CkptfsError as error:
        print(f"mount.ckptfs: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        directory = os.path.abspath(arguments.directory)
        if arguments.N:
            _enter_namespace(arguments.N)
        _check_mount_point(directory)
        _wait_for_saves(spec)
    except (CkptfsError, OSError) as error:
        print(f"mount.ckptfs: {describe(error)}", file=sys.stderr)
        return EXIT_MOUNT

    def serve(starter: Starter) -> int:
        source = _absolute_source(arguments.spec, spec)
        return _serve(starter, source, spec, directory, options, owner, fake=arguments.fake)

    return serve(Starter(None)) if options.foreground or arguments.fake else run_in_background(serve)


def _serve(
    starter: Starter,
    source: str,
    spec: SeekableAddress | None,
    directory: str,
    options: MountOptions,
    owner: tuple[int, int],
    *,
    fake: bool,
) -> int:
    """Open the guest and serve it until umount."""
    try:
        is_io_flusher = harden()
        journal = Log(options)
        if not is_io_flusher:
            log.info("no I/O flusher without CAP_SYS_RESOURCE: no memory cgroup should hold this daemon and a VM")
        lease, guest = _lease_and_guest(spec, options, starter)
    except (CkptfsError, OSError) as error:
        starter.failed(EXIT_MOUNT, describe(error))
    if fake:
        trio.run(lease.release)
        return 0

    async def run() -> None:
        try:
            await Mount(guest, directory, source, options, spec, owner, journal, lease).serve(starter)
        finally:
            with trio.CancelScope(shield=True):
                await lease.release()

    try:
        trio.run(run)
    except StateError as error:
        starter.failed(EXIT_MOUNT, describe(error))
    except BaseException as error:
        log.exception("%s: the daemon ends", directory)
        starter.failed(EXIT_SYSTEM, f"{directory}: {error}")
    return 0


def _lease_and_guest(spec: SeekableAddress | None, options: MountOptions, starter: Starter) -> tuple[Lease, Guest]:
    """The lease comes first, if one is wanted: who has it has mounted what the former holder saved last."""
    lease = Lease(lambda device: lock_place(spec, options.store, device))
    if not options.exclusive:
        return lease, open_guest(spec, options)
    trio.run(lease.take, starter.remark)
    try:
        return lease, open_guest(spec, options)
    except BaseException:
        trio.run(lease.release)
        raise


def _wait_for_saves(spec: SeekableAddress | None) -> None:
    """Who unmounts and mounts again means what the former daemon is still writing. StateError: that takes long."""
    if not isinstance(spec, FileMigrationArgs) or spec.fdset_id is not None:
        return
    path = spec.filename

    def tell() -> None:
        print(f"mount.ckptfs: {path}: a save to it is running: waiting for it to end", file=sys.stderr)

    if not wait_for_saves(path, SAVE_PATIENCE, tell):
        raise StateError(
            f"{path}: a save to it is still running after {SAVE_PATIENCE:.0f} s: mount it when the save has ended"
        )


def _parse_spec(text: str, options: MountOptions) -> SeekableAddress | None:
    """SPEC with an absolute path and its offset; None for ``none``."""
    if text == "none":
        return None
    target = seekable_file(parse_target(text))
    if isinstance(target, FdAddress):
        return target
    if isinstance(target, ObjectAddress):
        if options.image_offset:
            raise CommandError(f"{text}: an object begins with its checkpoint: leave out image_offset")
        return target
    if target.offset and options.image_offset:
        raise CommandError(f"{text}: its offset is given twice, image_offset={options.image_offset} too")
    return FileMigrationArgs(os.path.abspath(target.filename), target.offset or options.image_offset or 0)


def _absolute_source(text: str, spec: SeekableAddress | None) -> str:
    """SPEC as findmnt and status show it: as it was given, but with an absolute path."""
    if not isinstance(spec, FileMigrationArgs):
        return text
    if not text.startswith("file:"):
        return spec.filename
    _, comma, offset = text.partition(",offset=")
    return f"file:{spec.filename}{comma}{offset}"


def _find_owner(options: MountOptions) -> tuple[int, int]:
    """The uid and gid of the files; CommandError, naming the option, for a name that is nobody's."""
    uid, gid = os.getuid(), os.getgid()
    if options.uid is not None:
        uid = _number(options.uid, "uid", "user", lambda name: pwd.getpwnam(name).pw_uid)
    if options.gid is not None:
        gid = _number(options.gid, "gid", "group", lambda name: grp.getgrnam(name).gr_gid)
    return uid, gid


def _number(text: str, option: str, what: str, find: Callable[[str], int]) -> int:
    try:
        return int(text) if text.isdecimal() else find(text)
    except KeyError:
        raise CommandError(f"mount option '{option}={text}': there is no such {what}") from None


def _make_absolute(options: MountOptions) -> None:
    """Paths are meant from where the caller stands; the daemon will stand elsewhere."""
    if isinstance(options.qmp, QMPSocket):
        options.qmp = QMPSocket(os.path.abspath(options.qmp.path))
    if options.log not in (None, "syslog"):
        options.log = os.path.abspath(str(options.log))
    if options.store.cache is not None:
        options.store.cache = os.path.abspath(options.store.cache)


def open_guest(spec: SeekableAddress | None, options: MountOptions) -> Guest:
    """The guest that SPEC and the options describe: incoming, fresh, or empty.

    Raises CheckpointError for a bad file, CommandError where SPEC and ram= contradict one another, or OSError.
    """
    descriptors = Descriptors(options.fdset, options.fd)
    descriptors.check()
    capture = CaptureOptions(options.capture, options.capture_rounds)
    settings = Settings(
        options.parameters,
        options.capabilities,
        descriptors,
        options.uuid,
        options.shared,
        capture,
        verify=options.verify,
        libvirt_uri=options.libvirt_uri,
        store=options.store,
    )
    bound = None if options.qmp is None else Machine(settings.located(options.qmp), Identity.of_daemon())
    guest = Guest(settings, Machines(bound), read_only=options.read_only)
    for idstr, used_length in options.ram.items():
        guest.add_block(idstr, used_length)
    if spec is not None and _is_there(spec, options):
        identity = Identity.of_daemon()
        guest.fill(open_checkpoint(spec, identity, descriptors, settings.base_options(), settings.store))
    return guest


def _is_there(spec: SeekableAddress, options: MountOptions) -> bool:
    """Whether there is a checkpoint to restore. Refuses what would shadow one, and a guest without any RAM.

    What lies behind a handed descriptor is a new guest's if ram= says so: a descriptor has no name to look up.
    """
    if isinstance(spec, FdAddress) or (isinstance(spec, FileMigrationArgs) and spec.fdset_id is not None):
        return not options.ram
    name = describe_address(spec)
    what = "object" if isinstance(spec, ObjectAddress) else "file"
    exists = find_object(spec, options.store) != NOTHING if isinstance(spec, ObjectAddress) else _exists(name)
    if exists and options.ram:
        raise CommandError(
            f"{name}: already exists; mount it without ram=, or choose another {what} for the new guest",
            errno.EEXIST,
        )
    if not exists and not options.ram and options.qmp is None:
        raise CommandError(
            f"{name}: no such {what}. For a new guest, say how much RAM it has: -o ram=pc.ram:1G. For a"
            " machine that has its own RAM, say where its QMP socket is: -o qmp=SOCKET",
            errno.ENOENT,
        )
    if not exists and isinstance(spec, FileMigrationArgs):
        _check_directory(name)
    return exists


def _check_directory(path: str) -> None:
    """See that `save` can create ``path``: better to know now than when RAM has been written."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise CommandError(
            f"{directory}: no such directory; the first save would create {path} in it", errno.ENOENT
        )
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        raise CommandError(
            f"{directory}: can't be written; the first save would create {path} in it. To save elsewhere, mount"
            " `none`",
            errno.EACCES,
        )


def _exists(path: str) -> bool:
    """As os.path.lexists, but what can't be looked at is an error: there may be a checkpoint."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _check_mount_point(directory: str) -> None:
    try:
        status = os.stat(directory)
        os.statvfs(directory)  # stat is answered out of a cache for a while after the daemon died
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise CommandError(f"{directory}: there is a dead mount; `umount {directory}` first") from None
        raise
    if not stat.S_ISDIR(status.st_mode):
        raise CommandError(f"{directory}: is not a directory")
    if _is_ckptfs(status.st_dev):  # a mount on top would hide it, and what runs on it
        raise CommandError(f"{directory}: ckptfs is already mounted there; `umount {directory}` first", errno.EBUSY)


def _is_ckptfs(device: int) -> bool:
    """Whether the file system with this st_dev is one of ours (proc(5), /proc/pid/mountinfo)."""
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(" - ")
            if fields.split(" ")[2] == f"{os.major(device)}:{os.minor(device)}":
                return rest.startswith("fuse.ckptfs ")
    return False


def _enter_namespace(path: str) -> None:
    """mount(8) -N: everything from here on happens in another mount namespace, and from its root directory.

    Threads of libraries have our root and working directory as well, until unshare(2); setns(2) would refuse that.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns is in Python 3.12 and later
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(_CLONE_FS) or libc.setns(fd, _CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
