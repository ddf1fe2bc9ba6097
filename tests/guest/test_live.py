"""A live checkpoint put together of the mount's RAM and QEMU's stream, which leaves out what is in shared files."""

import errno
from collections.abc import AsyncIterator

import pytest

from ckptfs.errors import QemuError
from ckptfs.guest.guest import Guest
from ckptfs.guest.live import compose
from ckptfs.guest.outgoing import Epoch
from ckptfs.qemu.capture.mounted import Capture
from tests.doubles.migration_file import Block, MigrationFile, globalstate

PAGE = 4096
ON_THE_MOUNT = Block("pc.ram", 16, ignored=True)
IN_THE_STREAM = Block("vga.vram", 4, {2: b"vga".ljust(PAGE, b"\0")})


@pytest.fixture
async def guest(nothing_stays_open: None) -> AsyncIterator[Guest]:
    guest = Guest.fresh([("pc.ram", 16 * PAGE)])
    await guest.write(guest.blocks["pc.ram"], 0, b"guest")
    yield guest
    guest.close()


def captured(guest: Guest, *blocks: Block, run_state: str = "running") -> Capture[Epoch]:
    stream = MigrationFile(blocks=blocks, capabilities=("x-ignore-shared",))
    return Capture(guest.freeze(guest.blocks), stream.data(), run_state, 0.01)


async def test_ram_of_the_mount_and_small_blocks_of_the_stream(guest: Guest) -> None:
    epoch, image = compose(captured(guest, ON_THE_MOUNT, IN_THE_STREAM), guest.blocks)
    assert epoch.carried == {"vga.vram"}
    assert list(epoch.stacks) == ["pc.ram", "vga.vram"]
    (frozen,), (carried,) = epoch.stacks["pc.ram"].written, epoch.stacks["vga.vram"].written
    assert frozen.view(0, 1)[:5] == b"guest"
    assert list(carried.present.runs()) == [(2, 3)]
    assert carried.view(2, 3)[:4] == b"vga\0"
    assert [(block.idstr, block.used_length) for block in image.blocks] == [
        ("pc.ram", 16 * PAGE),
        ("vga.vram", 4 * PAGE),
    ]
    carried.close()


@pytest.mark.parametrize("run_state", ["running", "paused"])
async def test_the_guest_will_be_as_its_owners_want_it(guest: Guest, run_state: str) -> None:
    _, image = compose(captured(guest, ON_THE_MOUNT, run_state=run_state), guest.blocks)
    assert globalstate(run_state) in image.device_state


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (
            [ON_THE_MOUNT, Block("dimm0", 8, ignored=True)],
            "RAM 'dimm0' lies in a shared file",
        ),
        ([IN_THE_STREAM], "the block 'pc.ram' of this mount is no RAM of this QEMU"),
        ([Block("pc.ram", 17, ignored=True)], "RAM 'pc.ram' has 69632 bytes, the mount's block 65536"),
    ],
    ids=["left out", "missing", "size"],
)
async def test_blocks_that_do_not_fit_together(guest: Guest, blocks: list[Block], words: str) -> None:
    with pytest.raises(QemuError, match=words) as caught:
        compose(captured(guest, *blocks), guest.blocks)
    assert caught.value.errno == errno.EINVAL
