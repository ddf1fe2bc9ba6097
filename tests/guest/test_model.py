"""A guest against a model: bytes in memory.

Every run begins with a golden checkpoint, with holes, stale bytes under clear bits and zero pages with set bits,
or with nothing; operations follow one another, also in the middle of saves that succeed or fail. After each of
them RAM is the model's, and so is what was saved; a former checkpoint, and the golden one, never change.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptfs.errors import StorageError
from ckptfs.guest.block import GuestBlock, PageState
from ckptfs.guest.guest import Guest
from ckptfs.migration.parameters import ZeroPageDetection
from tests.doubles.checkpoints import fill, open_base, ram_in, ram_of, save_request, unsummed
from tests.doubles.held_save import held_save
from tests.doubles.migration_file import Block, MigrationFile
from tests.doubles.storage import open_descriptors

PAGE_COUNTS = {"pc.ram": 600, "vga.vram": 3, "/rom@etc/acpi/tables": 1}
"""More than two windows of 1 MiB, a few pages, and one."""


# --- operations -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    idstr: str
    block_offset: int
    length: int


@dataclass(frozen=True)
class Write:
    idstr: str
    block_offset: int
    length: int
    seed: int
    """0 writes zeros."""

    @property
    def data(self) -> bytes:
        return Random(self.seed).randbytes(self.length) if self.seed else bytes(self.length)


@dataclass(frozen=True)
class Save:
    """A save to file number ``file``; ``meanwhile`` happens between its epoch and its first write."""

    file: int
    meanwhile: tuple[Read | Write, ...]
    fails: bool


@dataclass(frozen=True)
class Restore:
    pass


@dataclass(frozen=True)
class Reset:
    pass


Operation = Read | Write | Save | Restore | Reset


def accesses(page_size: int) -> st.SearchStrategy[Read | Write]:
    """Reads and writes: many begin or end at a page, some are long, some reach beyond the end."""

    @st.composite
    def access(draw: st.DrawFn) -> Read | Write:
        idstr = draw(st.sampled_from(list(PAGE_COUNTS)))
        page = draw(st.integers(0, PAGE_COUNTS[idstr] - 1))
        inside = draw(st.sampled_from([0, 0, 1, 100, page_size - 1]))
        length = draw(st.sampled_from([1, 100, page_size, page_size + 1, 3 * page_size, 70 * page_size, 1 << 20]))
        if draw(st.booleans()):
            return Read(idstr, page * page_size + inside, length)
        return Write(idstr, page * page_size + inside, length, draw(st.integers(0, 3)))

    return access()


def operations(page_size: int) -> st.SearchStrategy[list[Operation]]:
    access = accesses(page_size)
    fails = st.sampled_from([False, False, False, True])
    save = st.builds(Save, st.integers(0, 1), st.lists(access, max_size=4).map(tuple), fails)
    operation = st.one_of(access, access, access, save, save, st.just(Restore()), st.just(Reset()))
    return st.lists(operation, min_size=3, max_size=14)


# --- the model --------------------------------------------------------------------------------------------


@dataclass
class Model:
    """What RAM holds, what the base holds, and which pages were written since."""

    page_size: int
    ram: dict[str, bytearray]
    base: dict[str, bytes]
    written: dict[str, set[int]] = field(default_factory=lambda: {idstr: set() for idstr in PAGE_COUNTS})

    def write(self, idstr: str, block_offset: int, data: bytes) -> int:
        length = min(len(data), len(self.ram[idstr]) - block_offset)
        self.ram[idstr][block_offset : block_offset + length] = data[:length]
        end = block_offset + length
        self.written[idstr].update(range(block_offset // self.page_size, -(-end // self.page_size)))
        return length

    def contents(self) -> dict[str, bytes]:
        return {idstr: bytes(content) for idstr, content in self.ram.items()}

    def rebase(self, base: dict[str, bytes], written: dict[str, set[int]]) -> None:
        self.base, self.written = base, written

    def reset(self) -> None:
        self.ram = {idstr: bytearray(content) for idstr, content in self.base.items()}
        self.written = {idstr: set() for idstr in PAGE_COUNTS}


class Run:
    """One sequence of operations on a guest and on its model."""

    def __init__(self, guest: Guest, model: Model, directory: Path) -> None:
        self.guest = guest
        self.model = model
        self.files = [directory / "first", directory / "second"]
        self.saved: dict[Path, dict[str, bytes]] = {}

    async def perform(self, operation: Operation) -> None:
        match operation:
            case Read() | Write():
                await self.access(operation)
            case Save():
                await self.save(operation)
            case Restore():
                await self.guest.restore()
            case Reset():
                await self.guest.reset()
                self.model.reset()

    async def access(self, operation: Read | Write) -> None:
        block = self.guest.blocks[operation.idstr]
        if isinstance(operation, Read):
            data = await self.guest.read(block, operation.block_offset, operation.length)
            content = self.model.ram[operation.idstr]
            assert data == content[operation.block_offset : operation.block_offset + operation.length]
        else:
            length = await self.guest.write(block, operation.block_offset, operation.data)
            assert length == self.model.write(operation.idstr, operation.block_offset, operation.data)

    async def save(self, operation: Save) -> None:
        path = self.files[operation.file]
        at_the_moment = self.model.contents()
        written_before = self.model.written
        self.model.written = {idstr: set() for idstr in PAGE_COUNTS}
        async with held_save(self.guest, save_request(path)) as save:
            for access in operation.meanwhile:
                await self.access(access)
            save.fails = operation.fails
        if operation.fails:
            assert isinstance(save.error, StorageError)
            for idstr, pages in written_before.items():
                self.model.written[idstr] |= pages
        else:
            assert save.error is None
            self.model.base = self.saved[path] = at_the_moment
        for file, content in self.saved.items():
            assert ram_in(file) == content
        assert operation.fails or unsummed(path) == 0

    async def check(self) -> None:
        """All of RAM, and what is said of each page."""
        assert await ram_of(self.guest) == self.model.contents()
        for block in self.guest.blocks.values():
            self.check_states(block)

    def check_states(self, block: GuestBlock) -> None:
        states = block.page_states(0, block.page_count).tolist()
        assert {
            page for page, state in enumerate(states) if state == PageState.WRITTEN.value
        } == self.model.written[block.idstr]
        assert {state: states.count(state.value) for state in PageState} == block.page_counts()
        assert block.stored_pages() == block.stack.with_data().count()
        if self.guest.restored:
            assert PageState.IN_CHECKPOINT.value not in states
        for page, state in enumerate(states):
            if state == PageState.ZERO.value:
                start = page * block.page_size
                assert not any(self.model.ram[block.idstr][start : start + block.page_size])


# --- runs -------------------------------------------------------------------------------------------------


def golden_file(page_size: int = 4096) -> tuple[MigrationFile, dict[str, bytes]]:
    """Runs and single pages, a zero page whose bit is set, and bytes under clear bits; and what RAM that is."""
    random = Random(1)
    ram = {page: random.randbytes(page_size) for page in [0, 1, 2, 5, *range(250, 262), 300, 511, 512, 599]}
    ram[3] = bytes(page_size)
    stale = {page: random.randbytes(page_size) for page in (4, 6, 255, 598) if page not in ram}
    blocks = [
        Block("pc.ram", PAGE_COUNTS["pc.ram"], ram, stale),
        Block("vga.vram", PAGE_COUNTS["vga.vram"], {}, {1: b"stale"}),
        Block("/rom@etc/acpi/tables", PAGE_COUNTS["/rom@etc/acpi/tables"], {0: b"RSD PTR "}),
    ]
    bits = page_size.bit_length() - 1
    file = MigrationFile(blocks=blocks, target_page_bits=None if page_size == 4096 else bits)
    return file, {block.idstr: fill(block.page_count, block.pages, page_size) for block in blocks}


@contextmanager
def nothing_left_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


OPTIONS = st.fixed_dictionaries(
    {
        "multifd_channels": st.integers(1, 3),
        "direct_io": st.booleans(),
        "zero_page_detection": st.sampled_from(ZeroPageDetection),
    }
)

several = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


async def run_on_golden(
    directory: Path, page_size: int, sequence: list[Operation], options: dict[str, Any], multifd: bool
) -> None:
    golden, contents = golden_file(page_size)
    path = directory / "golden"
    golden.write(path)
    before = hashlib.sha256(path.read_bytes()).digest()
    base = open_base(path, channel_count=options["multifd_channels"], direct_io=options["direct_io"])
    model = Model(page_size, {idstr: bytearray(content) for idstr, content in contents.items()}, contents)
    await run(Guest.incoming(base), model, directory, sequence, options, multifd)
    assert hashlib.sha256(path.read_bytes()).digest() == before


async def run(
    guest: Guest, model: Model, directory: Path, sequence: list[Operation], options: dict[str, Any], multifd: bool
) -> None:
    for name, value in options.items():
        guest.settings.set_parameter(name.replace("_", "-"), value)
    guest.settings.set_capability("multifd", multifd)
    performed = Run(guest, model, directory)
    await performed.check()
    for operation in sequence:
        await performed.perform(operation)
    await performed.check()
    guest.close()


@several
@given(operations(4096), OPTIONS, st.booleans())
async def test_a_guest_that_comes_from_a_golden_checkpoint(
    sequence: list[Operation], options: dict[str, Any], multifd: bool
) -> None:
    with tempfile.TemporaryDirectory() as name, nothing_left_open():
        await run_on_golden(Path(name), 4096, sequence, options, multifd)


@several
@given(operations(4096), OPTIONS, st.booleans())
async def test_a_guest_that_comes_from_nothing(
    sequence: list[Operation], options: dict[str, Any], multifd: bool
) -> None:
    lengths = {idstr: page_count * 4096 for idstr, page_count in PAGE_COUNTS.items()}
    with tempfile.TemporaryDirectory() as name, nothing_left_open():
        zeros = {idstr: bytes(length) for idstr, length in lengths.items()}
        model = Model(4096, {idstr: bytearray(length) for idstr, length in lengths.items()}, zeros)
        await run(Guest.fresh(list(lengths.items())), model, Path(name), sequence, options, multifd)


@pytest.mark.parametrize("page_size", [1024, 8192, 65536])
async def test_a_guest_with_pages_of_another_size(tmp_path: Path, page_size: int) -> None:
    sequence = [
        Write("pc.ram", 3 * page_size + 5, 4 * page_size, 1),
        Write("vga.vram", 100, 1000, 2),
        Read("pc.ram", 255 * page_size - 1, 1 << 20),
        Save(0, (Write("pc.ram", 250 * page_size + 100, 10 * page_size, 3),), fails=False),
        Write("pc.ram", 599 * page_size + 1, page_size, 1),
        Save(1, (Write("pc.ram", 599 * page_size, 10, 2),), fails=True),
        Restore(),
        Save(1, (), fails=False),
        Reset(),
    ]
    direct_io = page_size % 4096 == 0  # a disk may want it aligned to that
    options = {"multifd_channels": 2, "direct_io": direct_io, "zero_page_detection": ZeroPageDetection.MULTIFD}
    await run_on_golden(tmp_path, page_size, sequence, options, multifd=True)
