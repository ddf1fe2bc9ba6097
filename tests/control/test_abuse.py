"""What nobody should write to ctl: the daemon says no, in one line, and goes on; its log stays clean."""

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs.migration.capabilities import CAPABILITIES
from ckptfs.migration.parameters import PARAMETERS
from ckptfs.namespace.ctl import COMMANDS
from tests.control.footprint import footprint, memory_length
from tests.mount.conftest import Mount
from tests.mount.harness import DEADLINE, Mounted

MiB = 1 << 20


def write(mounted: Mounted, data: bytes) -> tuple[int | None, str]:
    """Write to a new open file of ctl, in one write(2); its errno, or 0, and the answer."""
    fd = os.open(mounted.path / "ctl", os.O_RDWR)
    try:
        error: int | None = 0
        try:
            os.write(fd, data)
        except OSError as refusal:
            error = refusal.errno
        answer = b""
        while part := os.read(fd, 1 << 16):
            answer += part
        return error, answer.decode("utf-8", "surrogateescape")
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\n", "an empty command"),
        (b"  \t \r\n", "an empty command"),
        (b"x" * 4097, "a command is at most 4096 bytes, not 4097"),
        (b"save " + b"x" * (64 << 10), "a command is at most 4096 bytes"),
        (b"save " * (200 << 10), "a command is at most 4096 bytes"),
        (b"sa\0ve", "a command can't contain a NUL byte"),
        (b"\0" * 4096, "a command can't contain a NUL byte"),
        (b"save /tmp/\xff\xfe", "a command has to be UTF-8 text: byte 10 is not"),
        (b"\xed\xa0\x80", "a command has to be UTF-8 text: byte 0 is not"),
        (b"save\nsave\n", "one command per write: this has several lines"),
        (b"stop\ncont", "one command per write"),
        (b'save "/tmp/x', "No closing quotation"),
        (b"save 'x", "No closing quotation"),
        (b"save /tmp/x\\", "No escaped character"),
        (b"migrate {" + b"[" * 4000, "JSON parse error"),
        (b'migrate {"uri": "\\ud800"}', "unknown migration protocol"),
        (b'migrate {"uri": "bad\\nuri"}', "unknown migration protocol: bad\\nuri"),
        (b'migrate {"bad\\u001b[31mname": 1}', "Parameter 'bad\\x1b[31mname' is unexpected"),
        (b'migrate {"uri": "file:\\u0000"}', "holds a character that no file name can have"),
        (b'migrate {"uri": 1e999}', "Invalid parameter type for 'uri', expected: string"),
        (b"migrate_set_parameter multifd-channels " + b"9" * 4000, "expects uint64"),
        (b"migrate_set_parameter max-bandwidth " + b"9" * 4000, "Invalid size 9"),
        (b"prefetch pc.ram 0 " + b"9" * 4000, "bad LENGTH"),
        (b"SAVE", "unknown command 'SAVE'"),
        ("s\u0430ve".encode(), "unknown command"),  # a Cyrillic letter
        (b"help " + b"x" * 4000, "unknown command"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_one_bad_command(data: bytes, text: str, standing: Mounted) -> None:
    error, answer = write(standing, data)
    assert error == errno.EINVAL
    assert answer.startswith("error: ")
    assert text in answer
    assert answer.endswith("\n")
    assert answer.count("\n") == 1
    assert len(answer) < 5000


def test_the_own_mount_is_no_place_for_anything(standing: Mounted, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(standing.path)
    for path in (
        standing.ram / "new",
        standing.ram / "pc.ram",
        standing.path / "ctl",
        tmp_path / "link" / "ram" / "new",
    ):
        assert write(standing, f"save {path}".encode())[0] == errno.EINVAL
    assert write(standing, f"save {standing.path}/ram/..".encode())[0] == errno.EISDIR
    fd = os.open(standing.ram, os.O_RDONLY)
    assert write(standing, f"save /proc/{os.getpid()}/fd/{fd}/new".encode())[0] == errno.EINVAL
    os.close(fd)
    assert write(standing, f"qmp {standing.path}/ctl".encode())[0] == 0
    error, answer = write(standing, b"stop")
    assert error
    assert f"QMP socket {standing.path}/ctl: " in answer
    standing.ctl("qmp none")


def test_an_empty_mount_can_not_be_filled_from_itself(mount: Mount) -> None:
    mounted = mount("none")
    for name in ("ctl", "status", "events", "parameters/direct-io"):
        error, answer = write(mounted, f"migrate_incoming file:{mounted.path}/{name}".encode())
        assert error == errno.EINVAL
        assert answer == f"error: {mounted.path}/{name}: lies on this mount\n"


def test_a_mount_without_ram_has_nothing_to_save(mount: Mount, tmp_path: Path) -> None:
    mounted = mount("none")
    error, answer = write(mounted, f"save {tmp_path}/file".encode())
    assert error == errno.EINVAL
    assert answer.startswith("error: there is no RAM to save")
    assert not (tmp_path / "file").exists()
    (mounted.ram / "pc.ram").touch()
    error, answer = write(mounted, f"save {tmp_path}/file".encode())
    assert error == errno.EINVAL
    assert "has no pages: give it a size" in answer
    os.truncate(mounted.ram / "pc.ram", MiB)
    assert write(mounted, f"save {tmp_path}/file".encode())[0] == 0


def test_bytes_one_by_one_are_as_many_commands(standing: Mounted) -> None:
    result = subprocess.run(
        ["dd", f"of={standing.path}/ctl", "bs=1", "conv=notrunc"],
        input=b"save",
        capture_output=True,
        timeout=DEADLINE,
    )
    assert result.returncode != 0
    assert b"Invalid argument" in result.stderr


def test_a_position_does_not_matter(standing: Mounted) -> None:
    fd = os.open(standing.path / "ctl", os.O_RDWR | os.O_APPEND)
    assert os.pwrite(fd, b"info migrate_capabilities", 1 << 40) == 25
    assert os.read(fd, 6) == b"xbzrle"
    os.close(fd)


# --- many at once -----------------------------------------------------------------------------------------

WRITER = """
import os, sys
path, number, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for count in range(rounds):
    fd = os.open(path, os.O_RDWR)
    channels = (number * rounds + count) % 255 + 1
    for command, right in (
        (f"migrate_set_parameter multifd-channels {channels}", [f"ok multifd-channels {channels}"]),
        (f"nonsense-{number}-{count}", [f"error: unknown command 'nonsense-{number}-{count}'"]),
        (f"save ./{number}", [f"ok saved {os.getcwd()}/./{number}: ", "error: a save is running"]),
        (f"migrate_set_parameter multifd-channels {channels}", [f"ok multifd-channels {channels}"]),
    ):
        try:
            os.write(fd, command.encode())
        except OSError:
            pass
        answer = os.read(fd, 1 << 16).decode()
        assert any(answer.startswith(text) for text in right), (command, answer)
    os.close(fd)
"""


def test_everybody_gets_his_own_answer(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:1M")
    mounted.ctl("save")
    (tmp_path / "saves").mkdir()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(mounted.path / "ctl"), str(number), "15"],
            cwd=tmp_path / "saves",
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    ends = [(writer.communicate(timeout=DEADLINE)[1], writer.returncode) for writer in writers]
    assert ends == [("", 0)] * len(writers)
    assert {path.name for path in (tmp_path / "saves").iterdir()} <= set("01234567")
    mounted.ctl("migrate_set_parameter multifd-channels 2")
    mounted.ctl("save")


# --- chance -----------------------------------------------------------------------------------------------

WORDS = [
    *COMMANDS, *CAPABILITIES, *PARAMETERS, "on", "off", "none", "legacy", "0", "1", "4k", "0x1000", "-1", "1e3",
    "255", "256", "ram-only", "./target", "file:target", "file:target,offset=4k", "fd:x", "tcp:h:1", "exec:true",
    "pc.ram", "migrate_parameters", "{", "}", '{"uri": "file:target"}', "[", "'", '"', "\\", ",", "=", "\t", "  ",
    "\n", "\0", "é",
]  # fmt: skip


def fuzzed(chance: random.Random) -> bytes:
    """Words of the grammar in any order, and a few bytes changed; no path leads out of the writer's directory."""
    words = [chance.choice(WORDS) for _ in range(chance.randint(1, 5))]
    if words[0] in ("stop", "qmp", "loglevel"):
        words[0] = "save"
    text = bytearray(chance.choice(["", " ", " "]).join(words).encode())
    for _ in range(chance.choice([0, 0, 0, 1, 3])):
        text[chance.randrange(len(text))] = chance.randrange(256)
    return bytes(text).replace(b"/", b"./") if text.count(b"/") == text.count(b"./") else b"help"


@pytest.fixture
def in_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / "writer"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


def test_fuzzed_commands(mount: Mount, tmp_path: Path, in_directory: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:1M")
    mounted.ctl("save")
    chance = random.Random(1)
    for _ in range(200):
        write(mounted, fuzzed(chance))
    mounted.ctl("migrate_set_parameter multifd-channels 4")
    mounted.ctl("restore")
    before, memory = footprint(mounted.pid), memory_length(mounted.pid)
    until = time.monotonic() + 3
    errors: set[int | None] = set()
    while time.monotonic() < until:
        error, answer = write(mounted, fuzzed(chance))
        assert answer.startswith("error: ") == bool(error)
        errors.add(error)
    assert {0, errno.EINVAL} < errors
    assert errno.EIO not in errors
    mounted.ctl("cont")
    after = footprint(mounted.pid)
    assert after.layers == before.layers
    assert sum(after.descriptors.values()) <= sum(before.descriptors.values()) + 255
    assert memory_length(mounted.pid) < memory + 8 * MiB
    assert "Traceback" not in mounted.log.read_text()


def test_fuzzed_settings(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:1M")
    chance = random.Random(2)
    errors: set[int | None] = set()
    files = [*(mounted.path / "parameters").iterdir(), *(mounted.path / "capabilities").iterdir()]
    for _ in range(1500):
        path = chance.choice(files)
        before = path.read_bytes()
        data = fuzzed(chance) if chance.random() < 0.5 else chance.choice(WORDS).encode()
        try:
            path.write_bytes(data)
        except OSError as refusal:
            errors.add(refusal.errno)
            assert path.read_bytes() == before
        else:
            path.write_bytes(path.read_bytes())  # what is shown can be written
    assert errors == {errno.EINVAL}
