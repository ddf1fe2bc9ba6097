"""ckptfs run, and ckptfs vmstate: a checkpoint goes on without a mount.

QEMU maps the file itself, so neither root nor FUSE is needed, and no daemon stands between a machine and its
memory. What it maps and the device state reach it as descriptors: it gets the very file that was looked at,
whatever happens to its name, and no other file has to be written.
"""

import argparse
import contextlib
import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

from ckptfs.channels.opened import Opened, open_file
from ckptfs.channels.working_set import SUFFIX, read_ahead, read_working_set, touched, write_working_set
from ckptfs.errors import CheckpointError, CommandError, QemuError, StateError
from ckptfs.guest.resume import check_mappable, inherited_file, vmstate_of
from ckptfs.mapped_ram.checkpoint import Checkpoint
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.qemu.clones import Clone, MACAddresses, arguments_of
from ckptfs.qemu.command_line import (
    Option,
    escaped,
    inherited_descriptors,
    join,
    memory_backends,
    parse,
    without_memory,
)
from ckptfs.qemu.memory import id_of, memory_of, naming_property

_PROGRAMS = {
    "pc": "qemu-system-x86_64",
    "q35": "qemu-system-x86_64",
    "microvm": "qemu-system-x86_64",
    "isapc": "qemu-system-x86_64",
    "s390": "qemu-system-s390x",
    "pseries": "qemu-system-ppc64",
}
"""The QEMU of a machine type that only one architecture has, by the type's first word."""

_SERIAL_SECTIONS = frozenset({"serial", "pl011"})

_NOT_ONCE_MORE = frozenset({"S", "preconfig"})
"""Options of a machine that was started, which keep one that goes on from going on."""

_NOT_TWICE = frozenset({"qmp", "qmp-pretty", "mon", "monitor", "pidfile", "gdb", "s", "vnc", "spice"})
"""Options that name what only one QEMU can have; clones have sockets of their own."""


@dataclass(frozen=True)
class QEMU:
    """How a QEMU is started: its program, its options, and where relative paths in them start (None: here)."""

    program: str
    options: list[Option]
    directory: str | None = None


def run_vmstate(arguments: argparse.Namespace) -> int:
    """Write the stream that starts a machine on a file's RAM to the standard output."""
    with _opened(arguments) as opened:
        main = memory_of([block.idstr for block in opened.checkpoint.blocks]).main
        sys.stdout.buffer.write(vmstate_of(opened.fd, opened.checkpoint, opened.file_bmaps, main))
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Become the QEMU that goes on from a checkpoint, or start many and end with them."""
    with _opened(arguments) as opened:
        given = arguments.arguments[arguments.arguments[:1] == ["--"] :]
        qemu = _given(opened, given, arguments.qemu) if given else _remembered(opened, arguments)
        backends = _backends(opened, qemu.options)
        check_mappable(opened.fd, backends, opened.file_bmaps)
        if arguments.show:
            shown = _resuming(opened.checkpoint, backends, qemu.options, os.path.abspath(opened.path), "VMSTATE")
            print(shlex.join([qemu.program, *join(shown)]))
            return 0
        left_out = [block.idstr for block in backends]
        vmstate = inherited_file(
            "ckptfs:vmstate", vmstate_of(opened.fd, opened.checkpoint, opened.file_bmaps, left_out)
        )
        path, incoming = f"/proc/self/fd/{opened.fd}", f"/proc/self/fd/{vmstate}"
        qemu = replace(qemu, options=_resuming(opened.checkpoint, backends, qemu.options, path, incoming))
        descriptors = (opened.fd, vmstate)
        directory = os.path.abspath(arguments.directory) if arguments.directory else None
        path = os.path.abspath(opened.path)
        read_ahead(opened.fd, read_working_set(path, opened.fd))
        if qemu.directory is not None:
            os.chdir(qemu.directory)
        if arguments.record is not None:
            return _run_recorded(path, opened.fd, qemu, descriptors, arguments.record)
        if arguments.count is None:
            _become(qemu, descriptors)
        _run_clones(opened, qemu, descriptors, directory, arguments)
    return 0


def run_qemu_args(path: str, stream_offset: int) -> list[str]:
    """QEMU's arguments that make the file at ``path`` a machine's memory, without those of its devices."""
    with open_file(path, stream_offset) as opened, _named(opened):
        _refuse_unfit(opened)
        backends = _backends(opened, [])
        check_mappable(opened.fd, backends, opened.file_bmaps)
        return join(_memory(opened.checkpoint, backends, os.path.abspath(path)))


@contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[Opened]:
    with open_file(arguments.file, arguments.offset) as opened, _named(opened):
        _refuse_unfit(opened)
        yield opened


@contextmanager
def _named(opened: Opened) -> Iterator[None]:
    """Errors begin with the file's name."""
    try:
        yield
    except CheckpointError as error:
        raise error.of_file(opened.path) from None
    except StateError as error:
        raise StateError(f"{opened.path}: {error}", error.errno) from None


def _refuse_unfit(opened: Opened) -> None:
    if not opened.checkpoint.has_device_state:
        raise StateError("contains RAM but no machine: there is nothing to run", errno.EINVAL)
    if opened.content.stream is not None:
        raise StateError(
            "is a plain stream, which QEMU can't map: "
            "`ckptfs export FILE OUT --format mapped-ram` makes a file that it can"
        )


def _given(opened: Opened, arguments: Sequence[str], program: str | None) -> QEMU:
    """The machine as the caller describes it."""
    for option in ("--count", "--directory", "--no-snapshot", "--qemu", "--show", "--offset", "--record"):
        if option in arguments:
            raise CommandError(f"{option} goes before the file: what follows that is QEMU's")
    return QEMU(_program(opened, program), parse(arguments))


def _remembered(opened: Opened, arguments: argparse.Namespace) -> QEMU:
    """The machine as the checkpoint remembers it. Only trusted files may say what to run."""
    machine = opened.trailer.machine
    if machine is None:
        raise CommandError(
            f"{opened.path}: does not say how its machine was started (only a live checkpoint by ckptfs does): "
            "give QEMU's arguments, for the same devices"
        )
    if not arguments.show and (problem := opened.distrust()) is not None:
        raise StateError(f"{problem}; `ckptfs run --show` prints what it would start", errno.EPERM)
    options = [option for option in parse(machine.arguments) if option.name not in _NOT_ONCE_MORE]
    if inherited := inherited_descriptors(options):
        raise StateError(
            f"its machine got file descriptors from another program ({inherited[0]}), which are gone: give "
            "QEMU's arguments, for the same devices"
        )
    if arguments.count is not None:
        options = [option for option in options if option.name not in _NOT_TWICE]
    left_it = any(option.name == "daemonize" for option in options)  # for /: it was started here, more likely
    directory = machine.directory if os.path.isdir(machine.directory) and not left_it else None
    return QEMU(_program(opened, arguments.qemu or machine.program), options, directory)


def _program(opened: Opened, named: str | None) -> str:
    program = named or _PROGRAMS.get(opened.checkpoint.machine.partition("-")[0])
    if program is None:
        raise CommandError(
            f"machine {opened.checkpoint.machine!r} exists in more than one QEMU: name it, as in "
            "--qemu qemu-system-aarch64"
        )
    found = shutil.which(program)
    if found is None:
        raise CommandError(f"{program}: no such program; --qemu names another one")
    return found


def _backends(opened: Opened, options: Sequence[Option]) -> list[RAMBlock]:
    """The blocks that QEMU maps of the file: main memory, and that of memory devices which the options have."""
    memory = memory_of([block.idstr for block in opened.checkpoint.blocks])
    plugged = memory_backends(options)
    if len(memory.main) > 1 and options and not any(option.name == "numa" for option in options):
        nodes = " ".join(f"-numa node,memdev={id_of(idstr)}" for idstr in memory.main)
        raise CommandError(f"{opened.path}: its memory is in NUMA nodes: say which is which, as in {nodes}")
    return [
        block
        for block in opened.checkpoint.blocks
        if block.idstr in memory.main or (block.idstr in memory.plugged and id_of(block.idstr) in plugged)
    ]


def _resuming(
    checkpoint: Checkpoint, backends: Sequence[RAMBlock], options: Sequence[Option], path: str, vmstate: str
) -> list[Option]:
    """What starts QEMU on the file, which it opens at ``path``; what is decided here comes after the caller's."""
    others = without_memory(options, {id_of(block.idstr) for block in backends})
    return [*others, *_memory(checkpoint, backends, path), Option("incoming", f"file:{vmstate}")]


def _memory(checkpoint: Checkpoint, backends: Sequence[RAMBlock], path: str) -> list[Option]:
    """QEMU's options that make the file at ``path`` the machine's memory."""
    main = memory_of([block.idstr for block in checkpoint.blocks]).main
    options = []
    for block in backends:
        place = f"mem-path={escaped(path)},offset={block.pages_offset},share=off,readonly=on,rom=off"
        name, plain = id_of(block.idstr), naming_property(block.idstr, checkpoint.machine)
        options.append(Option("object", f"memory-backend-file,id={name},size={block.used_length},{place}{plain}"))
    total = sum(block.used_length for block in backends if block.idstr in main)
    machine = checkpoint.machine + (f",memory-backend={id_of(main[0])}" if len(main) == 1 else "")
    return [*options, Option("m", f"{total}B"), Option("machine", machine)]


def _become(qemu: QEMU, descriptors: Sequence[int]) -> NoReturn:
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    os.execv(qemu.program, [qemu.program, *join(qemu.options)])


def _run_recorded(path: str, fd: int, qemu: QEMU, descriptors: Sequence[int], seconds: float) -> int:
    """Run QEMU below this process, and keep what it has touched of the file after `seconds`."""
    process = subprocess.Popen([qemu.program, *join(qemu.options)], pass_fds=descriptors)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both, and QEMU decides
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(seconds)
        raise QemuError(f"QEMU ended with exit code {code} before {seconds:g} s had passed: nothing was recorded")
    length = write_working_set(path, fd, touched(process.pid, fd))
    print(f"{path}{SUFFIX}: {length >> 20} MiB will be read first from now on", file=sys.stderr, flush=True)
    return int(process.wait() != 0)


def _run_clones(
    opened: Opened, qemu: QEMU, descriptors: Sequence[int], directory: str | None, arguments: argparse.Namespace
) -> None:
    import tempfile  # slow to import, as trio is

    from ckptfs.cli.clones import run_clones

    directory = directory or tempfile.mkdtemp(prefix="ckptfs-clones-")
    os.makedirs(directory, exist_ok=True)
    name = os.path.basename(opened.path)
    clones = [Clone(number, directory, f"{name}-{number}") for number in range(1, arguments.count + 1)]
    addresses = MACAddresses()
    has_serial = any(section.idstr in _SERIAL_SECTIONS for section in opened.checkpoint.sections)

    def command(clone: Clone) -> list[str]:
        own = arguments_of(clone, qemu.options, addresses, has_serial=has_serial, snapshot=arguments.snapshot)
        return [qemu.program, *join(own)]

    run_clones(clones, command, descriptors)
