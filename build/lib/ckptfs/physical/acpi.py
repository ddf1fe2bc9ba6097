"""The sizes of a machine's NUMA nodes, out of the ACPI tables that QEMU has made for it.

The tables are in RAM block ``/rom@etc/acpi/tables``, one after another (hw/i386/acpi-build.c, build_srat, 10.0;
ACPI 6.5, 5.2.16). A guest can't write them there.
"""

import struct
from collections.abc import Collection, Iterator, Mapping

BLOCK = "/rom@etc/acpi/tables"

_HEADER = struct.Struct("<4sI")
_HEADER_LENGTH = 36
_SRAT_HEAD = 12  # two reserved fields behind the header
_MEMORY_AFFINITY = 1
_AFFINITY = struct.Struct("<BBI2xQQ4xI")
_ENABLED, _HOT_PLUGGABLE = 1, 2

_LEGACY_HOLE = 0x60000
"""What the SRAT does not count of the node that begins at address 0: 640 KiB to 1 MiB."""


def node_sizes(tables: bytes) -> dict[int, int]:
    """Bytes of RAM of each node that the machine was started with, by its number; empty without an SRAT."""
    sizes: dict[int, int] = {}
    for kind, node, length, flags in _memory_affinities(tables):
        if kind == _MEMORY_AFFINITY and flags & _ENABLED and not flags & _HOT_PLUGGABLE:
            sizes[node] = sizes.get(node, 0) + length
    return {node: size for node, size in sorted(sizes.items()) if size}


def _memory_affinities(tables: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Type, node, length and flags of the SRAT's entries that are long enough to be about memory."""
    table = _find(tables, b"SRAT")
    position = _HEADER_LENGTH + _SRAT_HEAD
    while position + 2 <= len(table):
        length = table[position + 1]
        if length < 2 or position + length > len(table):
            return
        if length >= _AFFINITY.size:
            kind, _, node, _, size, flags = _AFFINITY.unpack_from(table, position)
            yield kind, node, size, flags
        position += length


def _find(tables: bytes, signature: bytes) -> bytes:
    """The table with that signature; nothing if it is not there."""
    position = 0
    while position + _HEADER_LENGTH <= len(tables):
        name, length = _HEADER.unpack_from(tables, position)
        if length < _HEADER_LENGTH or position + length > len(tables):
            following = tables.find(signature, position + 1)  # tables are aligned, with zeros in between
            if following < 0:
                return b""
            position = following
            continue
        if name == signature:
            return tables[position : position + length]
        position += length
    return b""


def in_node_order(lengths: Mapping[str, int], sizes: Mapping[int, int], first: Collection[str]) -> list[str] | None:
    """The blocks (idstr: bytes) in the order of the nodes that they are; None where that can't be told.

    ``first`` are those that may begin at address 0: the firmware's area in them is not all zeros. Blocks of one
    size can't be told apart but for that.
    """
    left = dict(lengths)
    order = []
    for node, size in sizes.items():
        fitting = [idstr for idstr, length in left.items() if size in (length, length - _LEGACY_HOLE)]
        if node == min(sizes):
            fitting = [idstr for idstr in fitting if idstr in first] or fitting
        if len(fitting) != 1:
            return None
        order.append(fitting[0])
        del left[fitting[0]]
    return None if left else order
