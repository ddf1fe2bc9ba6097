"""What a guest's RAM is after it was filled, saved and reset, whoever looks at it meanwhile."""

import errno
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from ckptfs.errors import StateError
from ckptfs.guest.guest import Guest
from ckptfs.guest.page_cache import NoPageCache
from ckptfs.guest.saving import save
from tests.doubles.checkpoints import fill, open_base, ram_in, ram_of, save_request
from tests.doubles.migration_file import Block, MigrationFile

PAGE = 4096
PAGE_COUNT = 64
PAGES = {page: bytes([page + 1]) * PAGE for page in range(0, 64, 3)}
GOLDEN = fill(PAGE_COUNT, PAGES)


@pytest.fixture
def guest(golden: Path, nothing_stays_open: None) -> Iterator[Guest]:
    guest = Guest.incoming(open_base(golden))
    yield guest
    guest.close()


def patched(ram: bytes, block_offset: int, data: bytes) -> bytes:
    return ram[:block_offset] + data + ram[block_offset + len(data) :]


async def test_a_guest_is_filled_once(guest: Guest, golden: Path) -> None:
    """Two commands may have opened their checkpoints before either of them fills the guest."""
    await guest.write(guest.blocks["pc.ram"], 5, b"mine")
    second = open_base(golden)
    with pytest.raises(StateError, match="already has RAM") as caught:
        guest.fill(second)
    assert caught.value.errno == errno.EEXIST
    assert (await ram_of(guest))["pc.ram"] == patched(GOLDEN, 5, b"mine")


async def test_what_is_written_after_a_look_at_the_pages_with_data_is_saved(guest: Guest, tmp_path: Path) -> None:
    """stat(2) counts them in the same stack that is then written to, and frozen."""
    block = guest.blocks["pc.ram"]
    for page in (1, 2):
        assert not block.stack.with_data().test(page)
        await guest.write(block, page * PAGE, b"w" * PAGE)
        assert block.stack.with_data().test(page)
        await save(guest, save_request(tmp_path / "checkpoint"))
        assert ram_in(tmp_path / "checkpoint") == await ram_of(guest)


class ReadAtOnce(NoPageCache):
    """A kernel that somebody has read RAM once more the moment it has forgotten it, and that keeps what it read."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self.pages: dict[str, bytes] = {}

    async def forget(self, idstrs: Iterable[str]) -> None:
        for idstr in list(idstrs):
            block = self._guest.blocks[idstr]
            self.pages[idstr] = bytes(await self._guest.read(block, 0, block.used_length))


async def test_who_reads_during_a_reset_reads_the_checkpoint(guest: Guest) -> None:
    kernel = ReadAtOnce(guest)
    guest.mounted(kernel)
    await guest.write(guest.blocks["pc.ram"], 5 * PAGE + 7, b"dropped" * PAGE)
    await guest.reset()
    assert kernel.pages == {"pc.ram": GOLDEN}


async def test_a_reset_undoes_that_a_machine_has_run(guest: Guest, tmp_path: Path) -> None:
    block = guest.blocks["pc.ram"]
    guest.machines.note_run()
    await guest.write(block, 0, b"by the machine")
    with pytest.raises(StateError, match="a machine has run on this RAM") as caught:
        await save(guest, save_request(tmp_path / "checkpoint"))
    assert caught.value.errno == errno.EPERM
    await guest.reset()
    await guest.write(block, 9, b"a patch by hand")
    await save(guest, save_request(tmp_path / "checkpoint"))
    assert ram_in(tmp_path / "checkpoint")["pc.ram"] == patched(GOLDEN, 9, b"a patch by hand")


async def test_ram_that_a_machine_has_run_on_is_saved_alone_only_on_purpose(guest: Guest, tmp_path: Path) -> None:
    machine, ram_only, next_one = (tmp_path / name for name in ("machine", "ram-only", "next"))
    await save(guest, save_request(machine))
    saved = machine.read_bytes()
    guest.machines.note_run()
    await save(guest, save_request(ram_only, ram_only=True))
    with pytest.raises(
        StateError, match="a machine has run on this RAM, and its device state is not known"
    ) as caught:
        await save(guest, save_request(machine))
    assert caught.value.errno == errno.EPERM
    assert machine.read_bytes() == saved
    await save(guest, save_request(next_one, ram_only=True))
    assert ram_in(next_one) == ram_in(machine)


@pytest.mark.parametrize("over", ["save", "reset"])
async def test_a_refusal_of_vmstate_is_over_with_its_reason(over: str, guest: Guest, tmp_path: Path) -> None:
    guest.machines.note_vmstate("pages have been written since the checkpoint")
    await (guest.reset() if over == "reset" else save(guest, save_request(tmp_path / "checkpoint")))
    assert guest.machines.refusal is None


async def test_pages_that_hold_what_the_checkpoint_holds_are_not_written(guest: Guest) -> None:
    block = guest.blocks["pc.ram"]
    for start, stop in ((0, 20), (30, 64)):
        await guest.write(block, start * PAGE, GOLDEN[start * PAGE : stop * PAGE])
    await guest.write(block, 33 * PAGE + 100, b"new")
    await guest.write(block, 40 * PAGE, bytes(2 * PAGE))
    await guest.drop_unchanged()
    assert list(block.written.runs()) == [(33, 34)]
    assert (await ram_of(guest))["pc.ram"] == patched(GOLDEN, 33 * PAGE + 100, b"new")
    await guest.reset()
    await guest.restore()
    await guest.write(block, 0, GOLDEN[: 10 * PAGE])
    await guest.drop_unchanged()
    assert not guest.has_written


async def test_a_block_that_the_next_checkpoint_has_no_more(tmp_path: Path) -> None:
    both, one = tmp_path / "both", tmp_path / "one"
    blocks = [Block("a", 4, {1: b"a"}), Block("b", 4, {2: b"b"})]
    MigrationFile(blocks=blocks).write(both)
    MigrationFile(blocks=blocks[:1]).write(one)
    guest = Guest.incoming(open_base(both))
    await guest.rebase(guest.freeze(["a"]), {}, open_base(one))
    assert (await ram_of(guest))["b"] == bytes(4 * PAGE)
    assert (await ram_of(guest))["a"][PAGE : PAGE + 1] == b"a"
    guest.close()
