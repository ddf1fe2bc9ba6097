"""A checkpoint is RAM as it was at one moment, however hard it is written meanwhile.

A writer numbers its steps and writes each step's number into its own slot of a page; the pages' order is random
but known. So the highest number in a slot tells which step was the last before the moment, and with it what every
page has to hold in that slot.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.mount.conftest import Mount
from tests.mount.decode import PAGE, decode
from tests.mount.harness import Mounted

LENGTH = 8 << 20
PAGE_COUNT = LENGTH // PAGE
SAVES = 5
ORDER_LENGTH = 1 << 18  # steps until a writer begins its order again

# Runs until its stdin is closed, and then says how many steps it has done. {step} writes `number` into `page`.
WRITER = f"""
import mmap, os, select, struct, sys, threading
import numpy as np

path, slot = sys.argv[1], int(sys.argv[2])
order = np.random.default_rng(slot).integers(0, {PAGE_COUNT}, {ORDER_LENGTH}).tolist()
fd = os.open(path, os.O_RDWR)
memory = mmap.mmap(fd, {LENGTH})
number = 0

def by_write(page, data):
    os.pwrite(fd, data, page * {PAGE} + 8 * slot)

def by_mmap(page, data):
    at = page * {PAGE} + 8 * slot
    memory[at : at + 8] = data

def step(store):
    global number
    number += 1
    store(order[(number - 1) % {ORDER_LENGTH}], struct.pack("<Q", number))

def go_on():
    return not select.select([0], [], [], 0)[0]
"""
ONE_THREAD = """
step({store})
print("ready", flush=True)
while go_on():
    for _ in range(100):
        step({store})
print(number)
"""
# One sequence of numbers through all threads: each step is seen by the next one, whichever thread does it.
THREADS = """
lock = threading.Lock()
ended = threading.Event()

def run(store):
    while not ended.is_set():
        with lock:
            step(store)

threads = [threading.Thread(target=run, args=[store]) for store in (by_write, by_mmap, by_write, by_mmap)]
for thread in threads:
    thread.start()
print("ready", flush=True)
select.select([0], [], [])
ended.set()
for thread in threads:
    thread.join()
print(number)
"""
PROGRAMS = {
    "write": WRITER + ONE_THREAD.format(store="by_write"),
    "mmap": WRITER + ONE_THREAD.format(store="by_mmap"),
    "threads": WRITER + THREADS,
}


@contextmanager
def writer(program: str, path: Path, slot: int) -> Iterator[Callable[[], int]]:
    """A process that writes until the function is called; that returns how many steps it did."""
    command = [sys.executable, "-c", PROGRAMS[program], str(path), str(slot)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

            def end() -> int:
                output, _ = process.communicate()
                assert process.returncode == 0
                return int(output)

            yield end
        finally:
            process.kill()


def assert_one_moment(ram: npt.NDArray[np.uint8], slot: int) -> int:
    """See that a slot holds what it held after some step of its writer; return that step's number."""
    numbers = ram.view("<u8").reshape(-1, PAGE // 8)[:, slot]
    last = int(numbers.max())
    order = np.random.default_rng(slot).integers(0, PAGE_COUNT, ORDER_LENGTH)
    steps = np.arange(max(1, last - ORDER_LENGTH + 1), last + 1)  # older ones than that are overwritten for sure
    expected = np.zeros(PAGE_COUNT, np.uint64)
    expected[order[(steps - 1) % ORDER_LENGTH]] = steps  # of a page that is written twice the last one stays
    wrong = np.flatnonzero(expected != numbers)
    assert not wrong.size, (
        f"slot {slot} after step {last}: {wrong.size} pages are wrong, page {wrong[0]} has "
        f"{numbers[wrong[0]]}, not {expected[wrong[0]]}"
    )
    return last


@pytest.mark.parametrize(
    "programs",
    [("write", "write"), ("mmap",), ("mmap", "mmap", "write"), ("threads",)],
    ids=lambda programs: "+".join(programs),
)
def test_a_checkpoint_of_ram_that_is_written_meanwhile(
    programs: tuple[str, ...], mount: Mount, tmp_path: Path
) -> None:
    mounted = mount(tmp_path / "checkpoint", f"ram=pc.ram:{LENGTH}")
    path = mounted.ram / "pc.ram"
    with ExitStack() as stack:
        ends = [stack.enter_context(writer(program, path, slot)) for slot, program in enumerate(programs)]
        moments = [_save_and_look(mounted, target, len(ends)) for target in _targets(tmp_path)]
        steps = [end() for end in ends]
    for before, after in pairwise(moments):
        assert all(step <= later for step, later in zip(before, after, strict=True))
    assert sum(moments[-1]) > sum(moments[0]), "nobody wrote while it was saved"
    # What went on above the epochs is all there, too.
    ram = np.frombuffer(path.read_bytes(), np.uint8)
    assert [assert_one_moment(ram, slot) for slot in range(len(ends))] == steps
    assert _save_and_look(mounted, tmp_path / "checkpoint", len(ends)) == steps


# Writes 1000 bytes at a time from the beginning to the end, again and again, until its stdin is closed.
WRITER_OF_PARTS = f"""
import itertools, os, select, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print("ready", flush=True)
for step in itertools.count():
    os.pwrite(fd, bytes([step % 251]) * 1000, step * 1000 % ({LENGTH} - 1000))
    if select.select([0], [], [], 0)[0]:
        break
"""


def test_saves_end_while_parts_of_pages_are_written(mount: Mount, tmp_path: Path) -> None:
    """A page of which a part is being written is locked as a whole: eviction waits for it."""
    mounted = mount(tmp_path / "checkpoint", f"ram=pc.ram:{LENGTH}")
    command = [sys.executable, "-c", WRITER_OF_PARTS, str(mounted.ram / "pc.ram")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            for _ in range(30):
                mounted.ctl("save")
            process.communicate()
            assert process.returncode == 0
        finally:
            process.kill()


def _targets(directory: Path) -> list[Path]:
    """The mounted file and others in turn: saves over the base and beside it."""
    return [directory / ("checkpoint" if number % 2 else f"checkpoint{number}") for number in range(SAVES)]


def _save_and_look(mounted: Mounted, target: Path, slot_count: int) -> list[int]:
    mounted.ctl(f"save {target}")
    ram = decode(target).blocks["pc.ram"]
    return [assert_one_moment(ram, slot) for slot in range(slot_count)]
