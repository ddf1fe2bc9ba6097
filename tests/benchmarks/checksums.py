"""What checksums cost: a save with and without them, reads that are verified, and `ckptfs verify`."""

import os
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import trio

from ckptfs.guest.checksums import Summing
from ckptfs.guest.guest import Guest
from ckptfs.guest.saving import save
from tests.benchmarks.fio import fio
from tests.benchmarks.rows import MiB, Row, in_turn
from tests.benchmarks.setting import Mount, Setting, make_cold, settle
from tests.doubles.checkpoints import save_request
from tests.mount.harness import BIN

PAGE = 4096


def checksums(setting: Setting) -> Iterator[Row]:
    """Saves in this process, as no option leaves checksums out; reads on a mount."""
    pairs = [(_save(setting), _unsummed(setting)) for _ in range(setting.rounds)]
    for index, what in enumerate(("save", "processor time of a save")):
        samples = [ours[index] for ours, _ in pairs], [theirs[index] for _, theirs in pairs]
        yield Row(f"{what}, with checksums", "s", *samples, "the same without")
    setting.make_checkpoint()
    for what, block in (("read", MiB), ("randread", PAGE)):
        samples = in_turn(
            setting.rounds, partial(_cold, setting, what, block, "on"), partial(_cold, setting, what, block, "off")
        )
        name = "cold read" if what == "read" else "cold random reads of 4 KiB"
        yield Row(f"{name}, verify=on, 4 readers", "1/s", *samples, "verify=off")
    samples = in_turn(setting.rounds, partial(_restore, setting, "on"), partial(_restore, setting, "off"))
    yield Row("restore, verify=on", "s", *samples, "verify=off")
    samples = in_turn(setting.rounds, partial(_verify, setting), partial(_read, setting))
    yield Row("ckptfs verify", "s", *samples, "cat, cold")


def _save(setting: Setting) -> tuple[float, float]:
    """Seconds, and those of processors."""
    seconds = trio.run(_save_fresh, setting.checkpoint, setting.size)
    setting.checkpoint.unlink()
    return seconds


def _unsummed(setting: Setting) -> tuple[float, float]:
    with patch.object(Summing, "note", lambda *_: None):
        return _save(setting)


async def _save_fresh(path: Path, size: int) -> tuple[float, float]:
    """Save RAM that was just written; no page of it is zero."""
    guest = Guest.fresh([("pc.ram", size)])
    data = os.urandom(16 * MiB)
    for block_offset in range(0, size, len(data)):
        await guest.write(guest.blocks["pc.ram"], block_offset, data[: size - block_offset])
    settle(path.parent)
    started, began = time.perf_counter(), time.process_time()
    await save(guest, save_request(path))
    seconds = time.perf_counter() - started, time.process_time() - began
    guest.close()
    return seconds


def _cold(setting: Setting, what: str, block: int, verify: str) -> float:
    make_cold(setting.checkpoint)
    with Mount(setting, f"verify={verify}") as mount:
        return fio(mount.ram, what, size=setting.size, block=block, jobs=4, direct=False) / block


def _restore(setting: Setting, verify: str) -> float:
    make_cold(setting.checkpoint)
    with Mount(setting, f"verify={verify}") as mount:
        return mount.ctl("restore")


def _verify(setting: Setting) -> float:
    return _timed(setting, BIN / "ckptfs", "verify", setting.checkpoint)


def _read(setting: Setting) -> float:
    return _timed(setting, "cat", setting.checkpoint)


def _timed(setting: Setting, *command: str | Path) -> float:
    make_cold(setting.checkpoint)
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started
