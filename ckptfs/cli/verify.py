"""ckptfs verify: whether checkpoints are what was saved."""

import argparse
import json
import sys
import threading
from typing import Any

from ckptfs.channels.opened import Opened, open_file
from ckptfs.channels.verifying import Finding, Verified, verify
from ckptfs.cli.progress import Display, display_for
from ckptfs.errors import CkptfsError
from ckptfs.namespace.status import counted, printable

_INTERVAL = 0.2
"""Seconds between two looks at how far it has come."""


def run(arguments: argparse.Namespace) -> int:
    """Verify files; 1 if one of them is not what it should be."""
    documents, failed = [], False
    quiet = arguments.quiet or not sys.stderr.isatty()
    shown = argparse.Namespace(quiet=quiet, json=False)
    for path in arguments.paths:
        with display_for(shown) as display:
            document = _verify(path, arguments.offset, display)
        documents.append(document)
        failed |= not document["sound"]
        if not arguments.json:
            _print(document, quiet=arguments.quiet)
    if arguments.json:
        print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
    return int(failed)


def _verify(path: str, stream_offset: int, display: Display) -> dict[str, Any]:
    """Verify one file, and describe what came of it."""
    try:
        with open_file(path, stream_offset) as opened:
            verified = _watched(opened, display)
            left_out = [block.idstr for block in opened.checkpoint.blocks if block.idstr not in opened.file_bmaps]
    except (CkptfsError, OSError) as error:
        problem = str(error).removeprefix(f"{path}: ") if isinstance(error, CkptfsError) else error.strerror
        return {"file": path, "sound": False, "checksums": None, "problems": [{"problem": problem}]}
    return {
        "file": path,
        "sound": not verified.findings,
        "checksums": {"windows": verified.windows, "without": verified.unknown} if verified.total else None,
        "left-out": [printable(idstr) for idstr in left_out],
        "problems": [_describe(finding) for finding in verified.findings],
    }


def _watched(opened: Opened, display: Display) -> Verified:
    """Verify in a thread, and show how it goes."""
    verified = Verified()
    errors: list[BaseException] = []

    def look() -> None:
        try:
            verify(opened, verified)
        except BaseException as error:  # noqa: BLE001 - it is raised where the thread is waited for
            errors.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    while thread.is_alive():
        thread.join(_INTERVAL)
        ram = {"total": verified.total, "remaining": verified.total - verified.done}
        display.show({"state": "verifying", "migration": {"status": "active", "ram": ram}})
    if errors:
        raise errors[0]
    return verified


def _describe(finding: Finding) -> dict[str, Any]:
    """Pages are counted from 0, ``stop`` is the first one that is sound; so it is with bytes."""
    problem = printable(finding.problem)
    if finding.idstr is None:
        return {"bytes": [finding.start, finding.stop], "problem": problem}
    return {"block": printable(finding.idstr), "pages": [finding.start, finding.stop], "problem": problem}


def _print(document: dict[str, Any], *, quiet: bool) -> None:
    """Problems go to stderr, a line each; what is sound is said on stdout."""
    path = document["file"]
    for problem in document["problems"]:
        print(f"{path}: {_place(problem)}{problem['problem']}", file=sys.stderr)
    if document["problems"] or quiet:
        return
    checksums = document["checksums"]
    if checksums is None:
        words = "sound as far as can be told: it has no checksums, and QEMU's rules are kept"
    else:
        words = f"sound: {counted(checksums['windows'] - checksums['without'], 'checksum')} of RAM right"
        if checksums["without"]:
            words += f", {counted(checksums['without'], 'window')} without one"
    if document["left-out"]:
        words += f"; the RAM of {', '.join(document['left-out'])} is not in it"
    print(f"{path}: {words}")


def _place(problem: dict[str, Any]) -> str:
    if "block" in problem:
        start, stop = problem["pages"]
        pages = f"page {start}" if stop == start + 1 else f"pages {start} to {stop - 1}"
        return f"{problem['block']}: {pages}: "
    if "bytes" in problem:
        start, stop = problem["bytes"]
        return f"bytes {start:#x} to {stop:#x}: "
    return ""
