"""ckptfs info: what a checkpoint holds, and how a mount of one stands.

Both are described as one JSON object, with the keys of status.json where they mean the same, and written for
people from that object.
"""

import argparse
import json
import os
import shlex
import stat
import sys
import textwrap
import time
from collections import Counter
from typing import Any

from ckptfs.api.status import is_dead_mount, read_status
from ckptfs.channels.opened import open_file
from ckptfs.cli.progress import describe_progress
from ckptfs.cli.state import describe as describe_state
from ckptfs.cli.state import format_state
from ckptfs.errors import CkptfsError, CommandError, StateError
from ckptfs.foreign.content import Content
from ckptfs.foreign.libvirt import Domain
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.checkpoint import Checkpoint
from ckptfs.mapped_ram.checksums import checksums_in
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.sections import Section
from ckptfs.migration.size import format_size
from ckptfs.namespace.status import printable

Document = dict[str, Any]

_WIDTH = 100


def run(arguments: argparse.Namespace) -> int:
    """Print the descriptions of files and mounts; 1 if one of them is none that can be described."""
    if not arguments.paths and arguments.devices:  # `--devices FILE`: it was no NAME
        arguments.paths, arguments.devices = [arguments.devices], ""
    if not arguments.paths:
        raise CommandError("info: which FILE_OR_DIR?")
    of_state = arguments.registers or arguments.devices is not None
    documents, failed = [], False
    for path in arguments.paths:
        try:
            if of_state:
                documents.append(describe_state(path, arguments))
            elif arguments.xml:
                print(_xml(path, arguments.offset).rstrip("\n"))
            else:
                documents.append(describe(path, arguments.offset))
        except (CkptfsError, OSError) as error:
            print(error if isinstance(error, CkptfsError) else f"{path}: {error.strerror}", file=sys.stderr)
            failed = True
    if arguments.json and documents:
        print(json.dumps(documents[0] if len(arguments.paths) == 1 else documents, indent=2))
    elif documents:
        print("\n\n".join(map(format_state if of_state else format_document, documents)))
    return int(failed)


def describe(path: str, stream_offset: int) -> Document:
    """Describe what is at ``path``: a mount's directory, or a file."""
    if os.path.isdir(path) or is_dead_mount(path):
        return describe_mount(path)
    return describe_file(path, stream_offset)


def _xml(path: str, offset: int) -> str:
    """The XML of the domain in a file. Raises StateError where it is not known, and whatever `open_file` raises."""
    with open_file(path, offset) as opened:
        domain = Domain.of(opened.trailer)
    if domain is None:
        raise StateError(f"{path}: has no XML: it is no save image of libvirt, and was not saved through libvirt")
    return domain.xml


def format_document(document: Document) -> str:
    """Write a description for people."""
    return format_mount(document) if "mount" in document else format_file(document)


def describe_file(path: str, stream_offset: int) -> Document:
    """Describe the migration stream at ``stream_offset`` of the file at ``path``.

    Raises CheckpointError, naming file and byte, if it is not whole and sound; StorageError or OSError if it
    can't be read.
    """
    with open_file(path, stream_offset, whole=False) as opened:
        stored = os.fstat(opened.fd).st_blocks * 512
    checkpoint, content = opened.checkpoint, opened.content
    blocks = [_describe_block(block, content.file_bmaps.get(block.idstr)) for block in checkpoint.blocks]
    return {
        "file": path,
        "format": content.kind,
        "complete": all(block["present"] for block in blocks) and not checkpoint.vmdesc_cut,
        "machine": printable(checkpoint.machine),
        "run-state": checkpoint.run_state,
        "uuid": None if checkpoint.uuid is None else str(checkpoint.uuid),
        "capabilities": [printable(name) for name in checkpoint.capabilities],
        "offset": checkpoint.stream_offset,
        "end": checkpoint.end_offset,
        "length": opened.length,
        "stored": stored if stat.S_ISREG(opened.mode) and not opened.of_store else None,
        "page-size": checkpoint.page_size,
        "blocks": blocks,
        "devices": None if checkpoint.opaque else [_describe_section(section) for section in _sections(checkpoint)],
        "device-state-length": checkpoint.device_state_length,
        "vmdesc": _describe_vmdesc(checkpoint),
        "trailer": _describe_trailer(content),
        "checksums": _describe_checksums(content),
        "libvirt": _describe_libvirt(content),
    }


def _describe_libvirt(content: Content) -> Document | None:
    """The domain that it is of; ``format`` and ``was-running`` are those of a save image's header."""
    domain, image = Domain.of(content.trailer), content.image
    if domain is None:
        return None
    return {
        "domain": None if domain.name is None else printable(domain.name),
        "format": None if image is None else image.kind,
        "was-running": None if image is None else image.was_running,
    }


def _describe_checksums(content: Content) -> Document | None:
    """How much of RAM has a checksum, which `ckptfs verify` compares."""
    checksums = checksums_in(content.trailer, content.checkpoint.blocks)
    if checksums is None:
        return None
    known, windows = checksums.known(content.file_bmaps)
    return {"window-length": checksums.window_length, "windows": windows, "known": known}


def _describe_trailer(content: Content) -> Document:
    """What is behind the stream: ``problem`` says why nothing of it can be read; ``machine`` is who was saved."""
    machine = content.trailer.machine
    return {
        "problem": content.trailer_problem,
        "entries": [
            {"name": printable(entry.name), "depends": int(entry.depends), "length": len(entry.payload)}
            for entry in content.trailer.entries
        ],
        "machine": None if machine is None else machine.describe(),
    }


def _describe_block(block: RAMBlock, file_bmap: PagesBitmap | None) -> Document:
    data_pages = None if file_bmap is None else file_bmap.count()
    return {
        "idstr": printable(block.idstr),
        "page-size": block.page_size,
        "used-length": block.used_length,
        "present": data_pages is not None,
        "page-count": block.page_count,
        "data-pages": data_pages,
        "zero-pages": None if data_pages is None else block.page_count - data_pages,
        "bitmap-offset": block.bitmap_offset,
        "pages-offset": block.pages_offset,
    }


def _describe_vmdesc(checkpoint: Checkpoint) -> str:
    """How the JSON at the end of the stream fares: whole, cut (the file ends inside it), unreadable, none."""
    if checkpoint.vmdesc is not None:
        return "whole"
    if checkpoint.vmdesc_cut:
        return "cut"
    return "unreadable" if checkpoint.has_vmdesc else "none"


def _sections(checkpoint: Checkpoint) -> tuple[Section, ...]:
    return *checkpoint.setup_sections, *checkpoint.sections


def _describe_section(section: Section) -> Document:
    return {
        "idstr": printable(section.idstr),
        "instance": section.instance_id,
        "version": section.version_id,
        "offset": section.file_offset,
        "payload-length": section.payload_length,
    }


def describe_mount(directory: str) -> Document:
    """Describe a mount by its status.json. Raises StateError where none is mounted, OSError."""
    return {"mount": directory, **read_status(directory)}


def format_file(document: Document) -> str:
    """Write a file's description for people."""
    lines = [
        f"{document['file']}: {document['format']} checkpoint, {_completeness(document)}",
        f"machine  {_machine(document['machine'], document['run-state'])}",
        *([] if document["uuid"] is None else [f"uuid     {document['uuid']}"]),
        f"stream   bytes {document['offset']:#x} to {document['end']:#x} of {document['length']:#x}"
        + ("" if document["stored"] is None else f", {format_size(document['stored'])} stored"),
        *_saved_machine(document["trailer"]),
        *_checksums(document["checksums"]),
        *_domain(document["libvirt"]),
        *_table(document["blocks"], ("data-pages", "zero-pages")),
    ]
    if document["devices"] is None:
        lines.append(f"devices  {document['device-state-length']} bytes whose sections can't be told apart")
    else:
        lines += _devices([section["idstr"] for section in document["devices"]])
    return "\n".join(lines)


def _saved_machine(trailer: Document) -> list[str]:
    """What the trailer tells of the machine that was saved."""
    if trailer["problem"] is not None:
        return [f"trailer  can't be read, as if there were none: {trailer['problem']}"]
    machine = trailer["machine"]
    if machine is None:
        return []
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(machine["time"]))
    command = shlex.join([machine["program"], *machine["arguments"]])
    return [
        printable(f"saved    {when} on {machine['host']} by ckptfs {machine['ckptfs']}, QEMU {machine['qemu']}"),
        printable(f"command  {command}"),
    ]


def _checksums(checksums: Document | None) -> list[str]:
    if checksums is None:
        return []
    known, windows, length = checksums["known"], checksums["windows"], format_size(checksums["window-length"])
    return [f"verify   {'all' if known == windows else f'{known} of {windows}'} windows of {length} have checksums"]


def _domain(libvirt: Document | None) -> list[str]:
    if libvirt is None:
        return []
    words = [] if libvirt["format"] is None else [f"save image ({libvirt['format']})"]
    if libvirt["was-running"] is not None:
        words.append("was running" if libvirt["was-running"] else "was paused")
    return [f"domain   {', '.join([libvirt['domain'] or 'unknown', *words])}"]


def _completeness(document: Document) -> str:
    left_out = [block["idstr"] for block in document["blocks"] if not block["present"]]
    words = [f"without the RAM of {', '.join(left_out)}"] if left_out else []
    if document["vmdesc"] == "cut":
        words.append("cut short inside its vmdesc: RAM and devices are whole, and QEMU loads it")
    return ", ".join(words) or "complete"


def format_mount(document: Document) -> str:
    """Write a mount's description for people."""
    base = "no checkpoint yet" if document["base"] is None else f"checkpoint {document['base']}"
    state = describe_progress(document) or document["state"]
    lines = [f"{document['mount']}: mount of {document['spec']}, {state}", f"base     {base}"]
    if document["base"] is not None:
        lines.append(f"machine  {_machine(document['base-machine'], document['base-run-state'])}")
        lines.append(f"vmstate  {document['vmstate']}")
    if document["qmp"] != "none":
        lines.append(f"qmp      {document['qmp']}, guest {document['guest'] or 'not seen yet'}")
    if document["bad-page-count"]:
        lines.append(f"bad      {document['bad-page-count']} pages can't be read from the checkpoint: see status")
    lines += _table(document["blocks"], ("zero-pages", "checkpoint-pages", "read-pages", "written-pages"))
    return "\n".join([*lines, *_devices(document["base-devices"])])


def _machine(machine: str, run_state: str | None) -> str:
    if machine == "none":
        return "none: RAM alone"
    return machine if run_state is None else f"{machine}, {run_state}"


def _table(blocks: list[Document], counts: tuple[str, ...]) -> list[str]:
    """One line a block: its name, its size, and what of its pages there is."""
    width = max([len(block["idstr"]) for block in blocks] + [9])
    heads = [count.removesuffix("-pages") for count in counts]
    head = f"{'RAM block':{width}}  {'size':>10}  {'pages':>10}" + "".join(f"  {head:>10}" for head in heads)
    rows = [
        f"{block['idstr']:{width}}  {format_size(block['used-length']):>10}  {block['page-count']:>10}"
        + "".join(f"  {'-' if block[count] is None else block[count]:>10}" for count in counts)
        for block in blocks
    ]
    return [head, *rows]


def _devices(names: list[str]) -> list[str]:
    counted = [name if count == 1 else f"{name} ({count})" for name, count in Counter(names).items()]
    text = f"devices  {len(names)}" + (f": {', '.join(counted)}" if names else "")
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * 9, break_on_hyphens=False)
