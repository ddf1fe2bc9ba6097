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
    assert "in the file, 16384 of 65536 pages hold data" in printed


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
    before, running = map(int, re.findall(r"It had counted to (\d+)", printed))
    died = int(re.findall(r"The guest dies at (\d+)", printed)[0])
    pauses = list(map(float, re.findall(r"guest paused ([\d.]+) ms", printed)))
    read, there = map(int, re.findall(r"(\d+) of (\d+) MiB were read", printed)[0])
    assert "The secret of this guest: swordfish" in steps[1]
    assert len(pauses) == 2
    assert all(0 < pause < 1000 for pause in pauses)
    assert "captured by snapshot" in steps[5].replace("\n    ", "")
    assert before < counts[4][0] < died
    assert counts[4] == list(range(counts[4][0], counts[4][0] + 3))
    assert 0 < read < there
    assert running < counts[6][0]
    assert counts[6] == list(range(counts[6][0], counts[6][0] + 4))
    assert "    3 clones run: " in steps[6]
    others = re.findall(r"\tcount (\d+)$", steps[6], re.MULTILINE)
    assert others == [str(count) for count in counts[6] for _ in range(2)]
    assert "The checkpoint is as it was, byte for byte" in printed
