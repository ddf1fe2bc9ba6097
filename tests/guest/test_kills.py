"""The daemon is killed before each call of a save that changes something: the former checkpoint or the new one.

Nothing else is there then but a leftover, which the next save removes. In processes of their own, forked off one
that has imported all this.
"""

import multiprocessing
import os
import signal
from itertools import count
from pathlib import Path
from typing import Any

import trio

from ckptfs.guest.guest import Guest
from ckptfs.guest.saving import save
from tests.doubles.checkpoints import open_base, ram_in, save_request
from tests.doubles.migration_file import Block, MigrationFile

PAGE = 4096
PAGE_COUNT = 600  # three payloads
CALLS = ("open", "pwrite", "pwritev", "ftruncate", "fdatasync", "rename", "fsync", "unlink")


def killed_save(path: Path, number: int) -> None:
    """Write the first page, save over `path`; die before call `number`, if it comes so far."""
    left = number

    def counting(call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    async def save_until_killed() -> None:
        guest = Guest.incoming(open_base(path))
        guest.settings.set_capability("multifd", True)
        await guest.write(guest.blocks["pc.ram"], 0, bytes([number]) * PAGE)
        for name in CALLS:
            setattr(os, name, counting(getattr(os, name)))
        await save(guest, save_request(path))

    trio.run(save_until_killed)


def test_a_save_that_is_killed_before_each_of_its_calls(directory: Path) -> None:
    path = directory / "checkpoint"
    pages = {page: bytes([page % 251 + 1]) * PAGE for page in range(100, PAGE_COUNT, 100)}
    MigrationFile(blocks=[Block("pc.ram", PAGE_COUNT, pages)]).write(path)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pytest", "ckptfs.guest.saving"])
    changed = 0
    for number in count(1):
        former = path.read_bytes()
        expected = bytearray(ram_in(path)["pc.ram"])
        expected[:PAGE] = bytes([number]) * PAGE
        process = processes.Process(target=killed_save, args=(path, number))
        process.start()
        process.join()
        if path.read_bytes() != former:
            assert ram_in(path)["pc.ram"] == expected
            changed += 1
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert len(os.listdir(directory)) <= 2
    assert number > 15
    assert changed > 1
    assert os.listdir(directory) == ["checkpoint"]
