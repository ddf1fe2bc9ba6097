"""ckptfs diff: the pages that differ between two checkpoints or mounts, in runs."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from ckptfs.api.blocks import PhysicalMemory
from ckptfs.api.compare import Difference, common_blocks, compare, compared, with_data
from ckptfs.api.memory import Memory, open_memory
from ckptfs.cli.progress import Display, Nothing
from ckptfs.errors import CkptfsError, CommandError
from ckptfs.mapped_ram.bitmap import Run
from ckptfs.namespace.status import counted, printable
from ckptfs.physical.memory_map import words_of

EQUAL, DIFFERENT, TROUBLE = 0, 1, 2
"""Exit codes, as those of diff(1) and cmp(1)."""


def run(arguments: argparse.Namespace) -> int:
    """Compare A and B."""
    try:
        with open_memory(arguments.a, arguments.map) as a, open_memory(arguments.b, arguments.map) as b:
            if arguments.quiet:
                return DIFFERENT if _differ(a, b) else EQUAL
            document = describe(a, b, _display())
    except CkptfsError as error:
        print(error, file=sys.stderr)
        return TROUBLE
    except OSError as error:
        print(f"{os.fsdecode(error.filename or '')}: {error.strerror}".removeprefix(": "), file=sys.stderr)
        return TROUBLE
    print(json.dumps(document, indent=2) if arguments.json else format_difference(document), flush=True)
    return EQUAL if document["equal"] else DIFFERENT


def describe(a: Memory, b: Memory, display: Display) -> dict[str, Any]:
    """Compare all that both have, and tell what only one of them has."""
    physical, problem = _physical(a, b)
    with display:
        differences = list(_compared(a, b, display))
    only = [_only(one, other) for one, other in ((a, b), (b, a))]
    return {
        "a": a.path,
        "b": b.path,
        "equal": not any(differences) and not any(only),
        "only-in-a": only[0],
        "only-in-b": only[1],
        "addresses": "known" if problem is None else f"not known: {problem}",
        "blocks": [_describe(difference, physical) for difference in differences],
    }


def _differ(a: Memory, b: Memory) -> bool:
    pairs = common_blocks(a, b)
    if len(pairs) != len(a.blocks) or len(pairs) != len(b.blocks):
        return True
    if any(len(one) != len(other) for one, other in pairs):
        return True
    return any(mask.any() for one, other in pairs for _, mask in compared(one, other))


def _compared(a: Memory, b: Memory, display: Display) -> Iterator[Difference]:
    pairs = common_blocks(a, b)
    total = sum(with_data(*pair).count() * pair[0].page_size for pair in pairs)
    done = 0

    def seen(length: int) -> None:
        nonlocal done
        done += length
        ram = {"total": total, "remaining": max(total - done, 0)}
        display.show({"state": "comparing", "migration": {"status": "active", "ram": ram}})

    for one, other in pairs:
        yield compare(one, other, lambda pages, size=one.page_size: seen(pages * size))  # type: ignore[misc]


def _only(one: Memory, other: Memory) -> list[str]:
    return [printable(idstr) for idstr in one.blocks if idstr not in other.blocks]


def _physical(a: Memory, b: Memory) -> tuple[PhysicalMemory | None, str | None]:
    """Where RAM lies, as one of them tells; or why neither does. Raises CommandError for a wrong --map."""
    problem = None
    for memory in (a, b):
        try:
            return memory.physical, None
        except CommandError:
            raise
        except (CkptfsError, OSError) as error:
            problem = problem or words_of(error, "--map ")
    return None, problem


def _describe(difference: Difference, physical: PhysicalMemory | None) -> dict[str, Any]:
    runs = [
        {"offset": offset, "length": length, "address": address}
        for run in difference.pages.runs()
        for offset, length, address in _placed(difference, run, physical)
    ]
    return {
        "idstr": printable(difference.idstr),
        "page-size": difference.page_size,
        "page-count": difference.pages.page_count,
        "different-pages": difference.pages.count(),
        "lengths": list(difference.lengths),
        "runs": runs,
    }


def _placed(
    difference: Difference, run: Run, physical: PhysicalMemory | None
) -> Iterator[tuple[int, int, int | None]]:
    """A run in pieces that are each in one place: offset in the block, length, address or None."""
    start, stop = (page * difference.page_size for page in run)
    if physical is None:
        yield start, stop - start, None
        return
    yield from physical.places(difference.idstr, start, stop - start)


def format_difference(document: dict[str, Any]) -> str:
    """Write it for people."""
    lines = []
    for block in document["blocks"]:
        pages = f"{block['different-pages']} of {counted(block['page-count'], 'page')}"
        if block["runs"]:
            lines.append(f"{block['idstr']}: {pages} differ")
            lines += [f"  {'offset':>14}  {'length':>12}  address"]
            lines += [f"  {run['offset']:#14x}  {run['length']:#12x}  {_address(run)}" for run in block["runs"]]
        if block["lengths"][0] != block["lengths"][1]:
            lines.append(f"{block['idstr']}: has {block['lengths'][0]} bytes in A, and {block['lengths'][1]} in B")
    for side in ("a", "b"):
        lines += [f"{idstr}: only in {side.upper()}" for idstr in document[f"only-in-{side}"]]
    if document["equal"]:
        count = sum(block["page-count"] for block in document["blocks"])
        return f"equal: {counted(len(document['blocks']), 'block')}, {counted(count, 'page')}"
    if document["addresses"] != "known":
        lines.append(f"addresses are {document['addresses']}")
    return "\n".join(lines)


def _address(run: dict[str, Any]) -> str:
    return "-" if run["address"] is None else f"{run['address']:#x}"


def _display() -> Display:
    if not sys.stderr.isatty():
        return Nothing()
    from ckptfs.cli.terminal import Bar

    return Bar()
