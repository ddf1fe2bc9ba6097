"""ckptfs info: what a checkpoint holds, and how a mount of one stands.

Both are described as one JSON object, with the keys of status.json where they mean the same, and written for
people from that object.
"""

import argparse
import errno
import json
import os
import stat
import textwrap
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ckptfs.channels.backing_file import FileSource
from ckptfs.cli.mounted import is_dead_mount, read_status
from ckptfs.errors import CheckpointError, StorageError
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.checkpoint import Checkpoint, read_checkpoint
from ckptfs.mapped_ram.precopy import read_precopy
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.mapped_ram.sections import Section
from ckptfs.mapped_ram.stream import Cursor, is_mapped_ram, read_stream_header
from ckptfs.namespace.status import printable

Document = dict[str, Any]

_WIDTH = 100
_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def run(arguments: argparse.Namespace) -> int:
    """Print the description of a file or a mount."""
    if os.path.isdir(arguments.path) or is_dead_mount(arguments.path):
        document = describe_mount(arguments.path)
        text = format_mount
    else:
        document = describe_file(arguments.path, arguments.offset)
        text = format_file
    print(json.dumps(document, indent=2) if arguments.json else text(document))
    return 0


def describe_file(path: str, stream_offset: int) -> Document:
    """Describe the migration stream at ``stream_offset`` of the file at ``path``.

    Raises CheckpointError, naming file and byte, if it is not whole and sound; StorageError or OSError if it
    can't be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # NONBLOCK: a FIFO must not hang us
    try:
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise StorageError(f"{path}: is not a regular file, so it is no checkpoint", errno.EINVAL)
        try:
            kind, checkpoint, file_bmaps = _read(FileSource(fd), stream_offset)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    finally:
        os.close(fd)
    blocks = [_describe_block(block, file_bmaps.get(block.idstr)) for block in checkpoint.blocks]
    return {
        "file": path,
        "format": kind,
        "complete": all(block["present"] for block in blocks) and not checkpoint.vmdesc_cut,
        "machine": printable(checkpoint.machine),
        "run-state": checkpoint.run_state,
        "uuid": None if checkpoint.uuid is None else str(checkpoint.uuid),
        "capabilities": [printable(name) for name in checkpoint.capabilities],
        "offset": checkpoint.stream_offset,
        "end": checkpoint.end_offset,
        "length": status.st_size,
        "stored": status.st_blocks * 512,
        "page-size": checkpoint.page_size,
        "blocks": blocks,
        "devices": None if checkpoint.opaque else [_describe_section(section) for section in _sections(checkpoint)],
        "device-state-length": checkpoint.device_state_length,
        "vmdesc": _describe_vmdesc(checkpoint),
    }


def _read(source: FileSource, stream_offset: int) -> tuple[str, Checkpoint, Mapping[str, PagesBitmap]]:
    """Read the stream; return its format, and the pages with data of each block that is in the file."""
    if is_mapped_ram(read_stream_header(Cursor(source, stream_offset))):
        return "mapped-ram", *read_checkpoint(source, stream_offset)
    stream = read_precopy(source, stream_offset)
    return "precopy", stream.checkpoint, {idstr: stream.file_bmap(idstr) for idstr in stream.page_offsets}


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
    """How the JSON at the end of the stream fares: whole, cut (the file ends inside it), none."""
    if checkpoint.vmdesc_cut:
        return "cut"
    return "none" if checkpoint.vmdesc is None else "whole"


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
        f"stream   bytes {document['offset']:#x} to {document['end']:#x} of {document['length']:#x}, "
        f"{_size(document['stored'])} stored",
        *_table(document["blocks"], ("data-pages", "zero-pages")),
    ]
    if document["devices"] is None:
        lines.append(f"devices  {document['device-state-length']} bytes whose sections can't be told apart")
    else:
        lines += _devices([section["idstr"] for section in document["devices"]])
    return "\n".join(lines)


def _completeness(document: Document) -> str:
    left_out = [block["idstr"] for block in document["blocks"] if not block["present"]]
    words = [f"without the RAM of {', '.join(left_out)}"] if left_out else []
    if document["vmdesc"] == "cut":
        words.append("cut short inside its vmdesc: RAM and devices are whole, and QEMU loads it")
    return ", ".join(words) or "complete"


def format_mount(document: Document) -> str:
    """Write a mount's description for people."""
    base = "no checkpoint yet" if document["base"] is None else f"checkpoint {document['base']}"
    lines = [f"{document['mount']}: mount of {document['spec']}, {document['state']}", f"base     {base}"]
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
        f"{block['idstr']:{width}}  {_size(block['used-length']):>10}  {block['page-count']:>10}"
        + "".join(f"  {'-' if block[count] is None else block[count]:>10}" for count in counts)
        for block in blocks
    ]
    return [head, *rows]


def _devices(names: list[str]) -> list[str]:
    counted = [name if count == 1 else f"{name} ({count})" for name, count in Counter(names).items()]
    text = f"devices  {len(names)}" + (f": {', '.join(counted)}" if names else "")
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * 9, break_on_hyphens=False)


def _size(length: int) -> str:
    """A size in the largest unit that tells it exactly, as far as a person cares."""
    for unit, value in _UNITS:
        if length >= value:
            return f"{length / value:.4g} {unit}" if length % value else f"{length // value} {unit}"
    return f"{length} B"
