"""Pages that arrive again and again end up as they came last, though channels are quick and slow by turns."""

import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import pytest

from ckptfs.channels.backing_file import DirectIO, OpenedFile
from ckptfs.channels.channels import Channel
from ckptfs.channels.lane import Lane
from ckptfs.channels.nursery import leading_error
from ckptfs.errors import CheckpointError, StateError
from ckptfs.guest import arriving
from ckptfs.guest.arriving import write_arriving
from ckptfs.guest.outgoing import Progress, SaveOptions
from ckptfs.mapped_ram.layout import Image
from ckptfs.migration.capture import Way
from ckptfs.migration.parameters import ZeroPageDetection
from ckptfs.qemu.capture import arriving as qemu_arriving
from tests.doubles.checkpoints import verified
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.decode import decode

PAGE = 4096
PAGE_COUNT = 600
PLAIN = MigrationFile(blocks=[Block("pc.ram", PAGE_COUNT)], capabilities=[], part_count=1)


class Arriving:
    """A stream that comes in pieces, as `qemu.capture.arriving.Arriving` has it."""

    way = Way.PRECOPY
    run_state: str | None = "running"

    def __init__(self, stream: bytes, random: Random) -> None:
        self._stream = stream
        self._random = random
        self.finished: list[str | None] = []

    @property
    def ended(self) -> bool:
        return not self._stream

    async def receive(self) -> bytes:
        length = self._random.choice([1, 100, 5000, 200_000])
        part, self._stream = self._stream[:length], self._stream[length:]
        return part

    async def finish(self, run_state: str | None) -> None:
        self.finished.append(run_state)


@contextmanager
def raises(kind: type[Exception]) -> Iterator[None]:
    """The error that leads in whatever group it comes."""
    with pytest.raises((kind, BaseExceptionGroup)) as caught:
        yield
    assert isinstance(leading_error(caught.value), kind)


def stream_of(rounds: list[list[tuple[int, bytes]]]) -> bytes:
    """A stream with a PART for each round of (page, content); empty content is a page of zeros."""
    data, marks = PLAIN.build()
    sections = b""
    for pages in rounds:
        sections += struct.pack(">BI", 2, 1)
        name = b"\6pc.ram"
        for page, content in pages:
            flags = (0x08 if content else 0x02) | (0 if name else 0x20)
            sections += struct.pack(">Q", page * PAGE | flags) + name + (content or b"\0")
            name = b""
        sections += struct.pack(">QBI", 0x10, 0x7E, 1)
    return data[: marks["command"]] + sections + data[marks["device_state"] :]


async def write(path: Path, stream: Arriving, accept: Callable[[Any], None] = lambda head: None) -> Progress:
    async def no_limit(length: int) -> None:
        pass

    def configure(image: Image) -> Image:
        return image.configured(("mapped-ram",), None)

    options = SaveOptions(4, DirectIO(False), ZeroPageDetection.MULTIFD, no_limit, lambda length: None)
    progress = Progress()
    file = OpenedFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC), os.O_RDWR)
    try:
        source = cast(qemu_arriving.Arriving, stream)
        written, _, page_size = await write_arriving(Lane(), file, 0, source, accept, configure, options, progress)
    finally:
        file.close()
    assert page_size == PAGE
    with path.open("r+b") as header:
        header.seek(written.header[0])
        header.write(written.header[1])
    return progress


@pytest.mark.parametrize("seed", range(4))
async def test_the_last_content_of_a_page_counts(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(seed)
    pwritev_all = Channel.pwritev_all
    wait = threading.Event().wait

    def uneven(self: Channel, views: list[memoryview], file_offset: int) -> None:
        wait(random.choice([0, 0, 0.002]))
        pwritev_all(self, views, file_offset)

    monkeypatch.setattr(Channel, "pwritev_all", uneven)
    monkeypatch.setattr("ckptfs.mapped_ram.page_stream.BATCH_LENGTH", 8 * PAGE)
    rounds, expected = [], [b""] * PAGE_COUNT
    for number in range(1, 40):
        first, count = random.randrange(PAGE_COUNT - 50), random.randint(1, 50)
        zeros = random.random() < 0.3
        pages = [(page, b"" if zeros else bytes([number]) * PAGE) for page in range(first, first + count)]
        rounds.append(pages)
        for page, content in pages:
            expected[page] = content
    stream = Arriving(stream_of(rounds), random)
    progress = await write(tmp_path / "file", stream)
    decoded = decode(tmp_path / "file").blocks["pc.ram"]
    assert decoded.tobytes() == b"".join(content or bytes(PAGE) for content in expected)
    assert progress.normal_pages == sum(map(bool, expected))
    assert (progress.total_pages, progress.remaining_pages) == (PAGE_COUNT, 0)
    assert stream.finished == ["paused"]
    found = verified(tmp_path / "file")
    assert (found.findings, found.unknown) == ([], 0)
    whole = (tmp_path / "file").read_bytes()
    for page, content in enumerate(expected):
        if not content:  # what a clear bit hides reads as zeros too: the file can be mapped
            assert not any(whole[0x100000 + page * PAGE :][:PAGE]), page


async def test_a_stream_that_is_cut(tmp_path: Path) -> None:
    whole = stream_of([[(1, b"x" * PAGE)]])
    for length in (20, len(whole) // 2, len(whole) - 300):
        stream = Arriving(whole[:length], Random(1))

        async def finish(run_state: str | None) -> None:
            raise StateError("somebody else cancelled")

        stream.finish = finish  # type: ignore[method-assign]
        with raises(StateError):
            await write(tmp_path / "file", stream)


async def test_blocks_that_are_not_accepted(tmp_path: Path) -> None:
    def refuse(head: object) -> None:
        raise StateError("other blocks")

    with pytest.raises(StateError, match="other blocks"):
        await write(tmp_path / "file", Arriving(stream_of([]), Random(1)), refuse)


async def test_a_stream_that_cannot_be_read(tmp_path: Path) -> None:
    broken = stream_of([[(PAGE_COUNT + 5, b"x" * PAGE)]])
    with raises(CheckpointError):
        await write(tmp_path / "file", Arriving(broken, Random(1)))


def test_runs() -> None:
    pages = np.array([4, 5, 6, 9, 10, 3], np.int64)
    everything = np.ones(6, np.bool_)
    assert arriving._runs(pages, everything) == [(0, 3), (3, 5), (5, 6)]
    everything[1] = False
    assert arriving._runs(pages, everything) == [(0, 1), (2, 3), (3, 5), (5, 6)]
    assert arriving._runs(pages, ~np.ones(6, np.bool_)) == []
