"""What a save charges to max-bandwidth: the bytes that it writes, and nothing for pages of zeros."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptfs.channels.backing_file import DirectIO, OpenedFile
from ckptfs.channels.lane import Lane
from ckptfs.guest.guest import Guest
from ckptfs.guest.outgoing import Progress, SaveOptions, write_checkpoint
from ckptfs.guest.plain import write_stream
from ckptfs.mapped_ram.layout import empty_image
from ckptfs.migration.parameters import ZeroPageDetection

PAGE = 4096
PAGE_COUNT = 600
RECORD_LENGTH = 8
"""Bytes that a page takes in a plain stream beside its content; the first of a block has the block's name too."""


@pytest.mark.parametrize("detection", ZeroPageDetection)
@pytest.mark.parametrize("write", [write_checkpoint, write_stream])
async def test_zero_pages_cost_no_bandwidth(
    write: Callable[..., Any], detection: ZeroPageDetection, tmp_path: Path, nothing_stays_open: None
) -> None:
    charged = 0

    def charge(length: int) -> None:
        nonlocal charged
        charged += length

    async def wait_for_bandwidth(length: int) -> None:
        charge(length)

    guest = Guest.fresh([("pc.ram", PAGE_COUNT * PAGE)])
    await guest.write(guest.blocks["pc.ram"], 0, bytes(300 * PAGE))
    await guest.write(guest.blocks["pc.ram"], 100 * PAGE, os.urandom(PAGE) * 50)
    file = OpenedFile(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC), os.O_WRONLY)
    image = empty_image([("pc.ram", PAGE_COUNT * PAGE)])
    options = SaveOptions(2, DirectIO(False), detection, wait_for_bandwidth, charge)
    progress = Progress()
    await write(Lane(), file, 0, image, guest.freeze(guest.blocks), options, progress)
    file.close()
    guest.close()
    page_count = 50 if detection is not ZeroPageDetection.NONE else 300
    assert progress.normal_pages == page_count
    if write is write_checkpoint:
        assert charged == progress.transferred == page_count * PAGE
    else:
        assert charged == progress.transferred
        assert page_count * PAGE < charged < page_count * PAGE + PAGE_COUNT * (RECORD_LENGTH + 1) + PAGE
