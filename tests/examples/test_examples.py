import re
import sys

from tests.examples.conftest import EXAMPLES, Run


def test_the_walk(run: Run) -> None:
    printed = run([EXAMPLES / "walk.sh"])
    assert re.search(r"^ok saved .*/vm1\.ckpt: 1 page, 16383 zero", printed, re.MULTILINE)
    assert "1048576:hello, RAM\n" in printed
    assert "\nread-pages 1\n" in printed


def test_ram_without_a_guest(run: Run) -> None:
    printed = run([sys.executable, EXAMPLES / "guestless.py"])
    assert "the checkpoint is 257 MiB long and takes 64 MiB of disk" in printed
    assert "one page of zeros was read: 0 pages came from the checkpoint" in printed
    assert "all of it was read, and is as it was saved: 16384" in printed


def test_looking_into_checkpoints_of_qemu(run: Run) -> None:
    printed = run([EXAMPLES / "inspect.sh"])
    assert re.search(r"^\d+:The secret of this guest: swordfish$", printed, re.MULTILINE)
    zero, pages, different = map(int, re.findall(r"^(\d+)$", printed, re.MULTILINE))
    assert pages == 128 << 8
    assert 1000 < zero < pages // 2
    assert 0 < different < 1000


def test_the_demo(run: Run) -> None:
    printed = run([EXAMPLES / "demo"])
    steps = re.split(r"^\d\. ", printed, flags=re.MULTILINE)
    counts = [[int(count) for count in re.findall(r"^    count (\d+)", step, re.MULTILINE)] for step in steps]
    before = int(re.findall(r"It had counted to (\d+)", printed)[0])
    died = int(re.findall(r"The guest dies at (\d+)", printed)[0])
    pause = float(re.findall(r"guest paused ([\d.]+) ms", printed)[0])
    read, there = map(int, re.findall(r"(\d+) of (\d+) MiB were read", printed)[0])
    assert "The secret of this guest: swordfish" in steps[1]
    assert 0 < pause < 1000
    assert before < counts[4][0] < died
    assert counts[4] == list(range(counts[4][0], counts[4][0] + 3))
    assert 0 < read < there
    assert counts[5] == list(range(counts[4][0], counts[4][0] + 4))
    assert re.findall(r"\tcount (\d+)$", steps[5], re.MULTILINE) == [str(count) for count in counts[5]]
    assert "The checkpoint is as it was, byte for byte" in printed
