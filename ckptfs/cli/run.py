"""ckptfs run, and ckptfs vmstate: a checkpoint goes on without a mount.

QEMU maps the file itself, so neither root nor FUSE is needed, and no daemon stands between a machine and its
memory. What it maps and the device state reach it as descriptors: it gets the very file that was looked at,
whatever happens to its name, and no other file has to be written.
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from ckptfs.channels.opened import open_file
from ckptfs.errors import CheckpointError, CommandError, StateError
from ckptfs.guest.resume import check_mappable, inherited_file, vmstate_of
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.checkpoint import Checkpoint
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.qemu.clones import Clone, MACAddresses, arguments_of
from ckptfs.qemu.command_line import Option, escaped, join, parse, without_memory
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


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that is about to go on: its open file, and the blocks that QEMU maps of it."""

    path: str
    fd: int
    checkpoint: Checkpoint
    file_bmaps: Mapping[str, PagesBitmap]
    backends: tuple[RAMBlock, ...]

    def vmstate(self) -> bytes:
        """The stream from which QEMU starts on these blocks."""
        left_out = [block.idstr for block in self.backends]
        return vmstate_of(self.fd, self.checkpoint, self.file_bmaps, left_out)

    def memory(self, path: str) -> list[Option]:
        """QEMU's options that make this file, which it opens at ``path``, the machine's memory."""
        options = []
        for block in self.backends:
            place = f"mem-path={escaped(path)},offset={block.pages_offset},share=off,readonly=on,rom=off"
            name, plain = id_of(block.idstr), naming_property(block.idstr, self.checkpoint.machine)
            options.append(
                Option("object", f"memory-backend-file,id={name},size={block.used_length},{place}{plain}")
            )
        machine = self.checkpoint.machine
        if len(self.backends) == 1:
            machine += f",memory-backend={id_of(self.backends[0].idstr)}"
        return [*options, Option("m", f"{self.backends[0].used_length}B"), Option("machine", machine)]


def run_vmstate(arguments: argparse.Namespace) -> int:
    """Write the stream that starts a machine on a file's RAM to the standard output."""
    with _opened(arguments) as resumed:
        sys.stdout.buffer.write(resumed.vmstate())
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Become the QEMU that goes on from a checkpoint, or start many and end with them."""
    with _opened(arguments) as resumed:
        options = parse(arguments.arguments[arguments.arguments[:1] == ["--"] :])
        program = _program(resumed, arguments.qemu)
        check_mappable(resumed.fd, resumed.backends, resumed.file_bmaps)
        if arguments.show:
            shown = _resuming(resumed, options, os.path.abspath(resumed.path), "VMSTATE")
            print(shlex.join([program, *join(shown)]))
            return 0
        vmstate = inherited_file("ckptfs:vmstate", resumed.vmstate())
        options = _resuming(resumed, options, f"/proc/self/fd/{resumed.fd}", f"/proc/self/fd/{vmstate}")
        descriptors = (resumed.fd, vmstate)
        if arguments.count is None:
            _become(program, options, descriptors)
        from ckptfs.cli.clones import run_clones  # trio is slow to import

        directory = os.path.abspath(arguments.directory or tempfile.mkdtemp(prefix="ckptfs-clones-"))
        os.makedirs(directory, exist_ok=True)
        name = os.path.basename(resumed.path)
        clones = [Clone(number, directory, f"{name}-{number}") for number in range(1, arguments.count + 1)]
        addresses, has_serial = MACAddresses(), _has_serial_line(resumed.checkpoint)

        def command(clone: Clone) -> list[str]:
            own = arguments_of(clone, options, addresses, has_serial=has_serial, snapshot=arguments.snapshot)
            return [program, *join(own)]

        run_clones(clones, command, descriptors)
    return 0


def _has_serial_line(checkpoint: Checkpoint) -> bool:
    return any(section.idstr in _SERIAL_SECTIONS for section in checkpoint.sections)


def _resuming(resumed: Resumed, options: Sequence[Option], path: str, vmstate: str) -> list[Option]:
    """What starts QEMU: ``options`` are the caller's, and what is decided here comes after them."""
    others = without_memory(options, {block.idstr for block in resumed.backends})
    return [*others, *resumed.memory(path), Option("incoming", f"file:{vmstate}")]


@contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[Resumed]:
    with open_file(arguments.file, arguments.offset) as opened:
        try:
            if opened.content.stream is not None:
                raise StateError("is a plain stream, which QEMU can't map: mount it, and `save` to another name")
            names = memory_of([block.idstr for block in opened.checkpoint.blocks]).main
            backends = tuple(block for block in opened.checkpoint.blocks if block.idstr in names)
            yield Resumed(opened.path, opened.fd, opened.checkpoint, opened.file_bmaps, backends)
        except CheckpointError as error:
            raise error.of_file(opened.path) from None
        except StateError as error:
            raise StateError(f"{opened.path}: {error}", error.errno) from None


def _program(resumed: Resumed, named: str | None) -> str:
    program = named or _PROGRAMS.get(resumed.checkpoint.machine.partition("-")[0])
    if program is None:
        raise CommandError(
            f"machine {resumed.checkpoint.machine!r} exists in more than one QEMU: name it, as in "
            "--qemu qemu-system-aarch64"
        )
    found = shutil.which(program)
    if found is None:
        raise CommandError(f"{program}: no such program; --qemu names another one")
    return found


def _become(program: str, options: Sequence[Option], descriptors: Sequence[int]) -> NoReturn:
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    os.execv(program, [program, *join(options)])
