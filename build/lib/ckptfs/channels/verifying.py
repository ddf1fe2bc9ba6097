"""Verifying a checkpoint in an open file: all that has a checksum is read, and compared.

Stock QEMU's rules are those of reading it (`open_file`). What has no checksum is not read: nothing could be told of
it. Threads read and compare; all of it blocks.
"""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptfs.channels.backing_file import FileSource
from ckptfs.channels.opened import Opened
from ckptfs.errors import CkptfsError
from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.mapped_ram.checksums import UNKNOWN, Checksums, checksums_in, wrong_parts
from ckptfs.mapped_ram.ramblock import RAMBlock
from ckptfs.migration.outgoing import coalesce

THREADS = 4
_PIECE_LENGTH = 1 << 20


class Finding(NamedTuple):
    """What is wrong: with pages [start, stop) of block ``idstr``, or, where that is None, bytes of the file."""

    idstr: str | None
    start: int
    stop: int
    problem: str


@dataclass
class Verified:
    """How it goes, in bytes of RAM, and what came of it: windows are counted where they hold data."""

    total: int = 0
    done: int = 0
    windows: int = 0
    unknown: int = 0
    """Windows without a checksum."""
    findings: list[Finding] = field(default_factory=list)


def verify(opened: Opened, verified: Verified) -> None:
    """Look at everything in ``opened``, and note it in ``verified``."""
    content = opened.content
    checkpoint = content.checkpoint
    end = checkpoint.end_offset
    if content.trailer_problem is not None:
        verified.findings.append(Finding(None, end, opened.length, f"the trailer: {content.trailer_problem}"))
    if checkpoint.vmdesc_cut:
        verified.findings.append(Finding(None, end, opened.length, "the file ends inside its vmdesc"))
    if content.stream is None:
        for part in wrong_parts(FileSource(opened.fd), checkpoint, content.trailer):
            verified.findings.append(Finding(None, part.start, part.stop, f"{part.name}: the checksum is wrong"))
    blocks = {block.idstr: block for block in checkpoint.blocks if block.idstr in content.file_bmaps}
    checksums = checksums_in(content.trailer, blocks.values())
    if checksums is not None:
        _verify_pages(opened, blocks, checksums, verified)
    verified.findings.sort(key=lambda finding: (finding.idstr or "", finding.start))


def _verify_pages(opened: Opened, blocks: Mapping[str, RAMBlock], checksums: Checksums, verified: Verified) -> None:
    runs: list[tuple[RAMBlock, Run]] = []
    for idstr, block in blocks.items():
        width, file_bmap = checksums.width(block.page_size), opened.content.file_bmaps[idstr]
        has_data = file_bmap.any_of_each(width)
        sums = checksums.windows.get(idstr)
        if sums is None:
            sums = np.zeros(has_data.size, np.uint32)
        verified.findings += _lost(block, file_bmap, checksums, sums, ~has_data)
        verified.windows += int(has_data.sum())
        verified.unknown += int((has_data & (sums == UNKNOWN)).sum())
        runs += ((block, run) for run in _pieces(has_data & (sums != UNKNOWN), width, file_bmap.page_count, block))
    verified.total = sum((run.stop - run.start) * block.page_size for block, run in runs)
    lock = threading.Lock()

    def look(piece: tuple[RAMBlock, Run]) -> None:
        block, run = piece
        found = list(_wrong(opened, block, checksums, run))
        with lock:
            verified.findings += found
            verified.done += (run.stop - run.start) * block.page_size

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(look, runs))


def _pieces(windows: npt.NDArray[np.bool_], width: int, page_count: int, block: RAMBlock) -> Iterator[Run]:
    """The pages of these windows, cut into pieces of whole windows."""
    step = max(1, _PIECE_LENGTH // (width * block.page_size))
    for first, last in coalesce(windows):
        for start in range(first, last, step):
            yield Run(start * width, min(min(start + step, last) * width, page_count))


def _wrong(opened: Opened, block: RAMBlock, checksums: Checksums, run: Run) -> Iterator[Finding]:
    """What is wrong with whole windows."""
    try:
        pages = opened.read_pages(block, *run)
    except (OSError, CkptfsError):
        width = checksums.width(block.page_size)
        if run.stop - run.start <= width:
            yield from _unreadable(opened, block, run)
            return
        for start in range(run.start, run.stop, width):
            yield from _wrong(opened, block, checksums, Run(start, min(start + width, run.stop)))
        return
    for window in checksums.wrong(block.idstr, run, pages.data, block.page_size):
        yield Finding(block.idstr, *window, "the checksum is wrong")


def _unreadable(opened: Opened, block: RAMBlock, run: Run) -> Iterator[Finding]:
    """Find out which pages are the bad ones (a loop over the pages of one window that can't be read)."""
    for page in range(*run):
        try:
            opened.read_pages(block, page, page + 1)
        except (OSError, CkptfsError) as error:
            problem = f"can't be read: {getattr(error, 'strerror', None) or error}"
            yield Finding(block.idstr, page, page + 1, problem)


def _lost(
    block: RAMBlock,
    file_bmap: PagesBitmap,
    checksums: Checksums,
    sums: npt.NDArray[np.uint32],
    empty: npt.NDArray[np.bool_],
) -> Iterator[Finding]:
    """Windows that have no data now, and had some when they were saved."""
    zeros = Checksums.of_zeros({block.idstr: block.used_length}, checksums.window_length).windows[block.idstr]
    width = checksums.width(block.page_size)
    for start, stop in coalesce(empty & (sums != zeros) & (sums != UNKNOWN)):
        pages = Run(start * width, min(stop * width, file_bmap.page_count))
        yield Finding(block.idstr, *pages, "hold no data, and held some when they were saved")
