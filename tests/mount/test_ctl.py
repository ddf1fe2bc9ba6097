"""ctl, from a plain shell and from a program: no answer gets lost."""

import errno
import json
import mmap
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import DEADLINE, Mounted


def shell(mounted: Mounted, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in the mount's directory, as a user with a shell does (bash: dash names no errno)."""
    return subprocess.run(
        ["bash", "-c", script], cwd=mounted.path, capture_output=True, text=True, timeout=DEADLINE
    )


def test_the_answer_is_read_from_the_same_open_file(fresh: Mounted, tmp_path: Path) -> None:
    result = shell(fresh, "exec 3<>ctl; echo save >&3; cat <&3")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"ok saved {tmp_path / 'checkpoint'}: ")
    assert result.stdout.count("\n") == 1


def test_the_words_behind_an_error_are_read_from_the_same_open_file(fresh: Mounted) -> None:
    result = shell(fresh, "exec 3<>ctl; echo save /nowhere/file >&3; echo $?; cat <&3")
    code, words = result.stdout.splitlines()
    assert code != "0"
    assert "No such file or directory" in result.stderr
    assert words.startswith("error: /nowhere/file: ")


def test_a_fresh_cat_prints_the_last_outcome(fresh: Mounted) -> None:
    assert shell(fresh, "cat ctl").stdout == ""
    assert shell(fresh, "echo save > ctl").returncode == 0
    assert shell(fresh, "cat ctl").stdout.startswith("ok saved ")
    failed = shell(fresh, "echo nonsense > ctl")
    assert failed.returncode != 0
    assert "Invalid argument" in failed.stderr
    assert shell(fresh, "cat ctl; cat ctl").stdout.count("error: unknown command 'nonsense'") == 2


def test_several_commands_on_one_open_file(fresh: Mounted) -> None:
    script = (
        "exec 3<>ctl; for word in stop nonsense 'info migrate_parameters' cont; do echo $word >&3; cat <&3; done"
    )
    lines = shell(fresh, script).stdout.splitlines()
    assert lines[0].startswith("ok ")
    assert lines[1].startswith("error: unknown command 'nonsense'")
    assert any(line.startswith("multifd-channels: 4") for line in lines[2:-1])
    assert lines[-1].startswith("ok ")


def test_a_read_of_a_new_open_file_does_not_wait(fresh: Mounted) -> None:
    fd = os.open(fresh.path / "ctl", os.O_RDWR)
    assert os.read(fd, 100) == b""
    os.write(fd, b"save\n")
    assert os.read(fd, 3) == b"ok "
    assert os.read(fd, 5) == b"saved"
    os.read(fd, 4096)
    assert os.read(fd, 100) == b""
    os.close(fd)


REFUSED = [
    ("nonsense", errno.EINVAL),
    ("", errno.EINVAL),
    ("save one two", errno.EINVAL),
    ("save\nsave", errno.EINVAL),
    ("save /nowhere/at/all", errno.ENOENT),
    ("save file:/tmp/x,offset=0x20M", errno.EINVAL),
    ("migrate tcp:localhost:4444", errno.EINVAL),
    ("migrate -z file:/tmp/x", errno.EINVAL),
    ("migrate {", errno.EINVAL),
    ("cancel", errno.EINVAL),
    ("migrate_set_capability nosuch on", errno.EINVAL),
    ("migrate_set_capability multifd perhaps", errno.EINVAL),
    ("migrate_set_parameter multifd-channels 0", errno.EINVAL),
    ("info nothing", errno.EINVAL),
    ("prefetch nosuch", errno.ENOENT),
    ("prefetch pc.ram 17M 1M", errno.EINVAL),
    ("migrate_incoming file:/tmp/x", errno.EEXIST),
    ("qmp", errno.EINVAL),
    ("loglevel loud", errno.EINVAL),
    ("x" * 4097, errno.EINVAL),
]


def test_each_error_has_its_errno_and_one_line(fresh: Mounted) -> None:
    for command, error in REFUSED:
        with pytest.raises(OSError, match="error: ") as caught:
            fresh.ctl(command)
        assert caught.value.errno == error, command
        assert caught.value.strerror.startswith("error: ")
        assert "\n" not in caught.value.strerror


def test_qemus_own_words_work_line_by_line(fresh: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "migfile"
    for line in (
        "stop",
        "migrate_set_capability multifd on",
        "migrate_set_capability mapped-ram on",
        "migrate_set_parameter max-bandwidth 0",
        "migrate_set_parameter multifd-channels 8",
        f"migrate file:{path}",
    ):
        fresh.ctl(line)
    assert len(decode(path).blocks["pc.ram"]) == 16 << 20
    assert "Migration status: completed" in fresh.ctl("info migrate")
    assert fresh.status()["writers"] == "stopped"


def test_migrate_in_json(fresh: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "migfile"
    address = {"transport": "file", "filename": str(path), "offset": 0x1000}
    fresh.ctl("migrate " + json.dumps({"channels": [{"channel-type": "main", "addr": address}]}))
    assert len(decode(path, 0x1000).blocks["pc.ram"]) == 16 << 20


def test_stop_holds_writers_back_until_cont(fresh: Mounted) -> None:
    fresh.ctl("stop")
    assert fresh.status()["writers"] == "stopped"
    path = fresh.ram / "pc.ram"
    with (
        path.open("r+b", buffering=0) as writer,
        path.open("rb", buffering=0) as reader,
        ThreadPoolExecutor() as threads,
    ):
        written = threads.submit(os.pwrite, writer.fileno(), b"written", 0)
        try:
            assert os.pread(reader.fileno(), 7, 4096) == bytes(7)  # readers go on
            with pytest.raises(TimeoutError):
                written.result(0.2)
        finally:
            fresh.ctl("cont")
        assert written.result(DEADLINE) == 7
        assert os.pread(reader.fileno(), 7, 0) == b"written"


def test_an_empty_mount_is_filled(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", 16, {3: b"third"})]).write(path)
    mounted = mount("none")
    assert list(mounted.ram.iterdir()) == []
    with pytest.raises(OSError, match="say where to save"):
        mounted.ctl("save")
    with pytest.raises(OSError, match="No such file") as caught:
        mounted.ctl(f"migrate_incoming file:{tmp_path}/nowhere")
    assert caught.value.errno == errno.ENOENT
    mounted.ctl(f"migrate_incoming file:{path}")
    assert (mounted.ram / "pc.ram").read_bytes()[3 * 4096 :].startswith(b"third")
    with pytest.raises(OSError, match="already has RAM"):
        mounted.ctl(f"migrate_incoming file:{path}")
    mounted.ctl(f"save {tmp_path}/again")


def test_restore_makes_the_file_unneeded(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", 1024, {page: b"page %d" % page for page in range(0, 1024, 3)})]).write(
        path
    )
    ram = decode(path).blocks["pc.ram"].tobytes()
    mounted = mount(path)
    mounted.ctl("restore")
    assert mounted.status()["restored"] is True
    path.write_bytes(b"")
    assert (mounted.ram / "pc.ram").read_bytes() == ram
    assert mounted.status()["checkpoint-pages"] == 0
    # One read of restored, written and zero pages, past the kernel's cache.
    fd = os.open(mounted.ram / "pc.ram", os.O_RDWR | os.O_DIRECT)
    page, whole = mmap.mmap(-1, 4096), mmap.mmap(-1, len(ram))
    page[:7] = b"written"
    os.pwritev(fd, [page], 8 * 4096)
    assert os.preadv(fd, [memoryview(whole)[: 1 << 20]], 0) == 1 << 20
    os.close(fd)
    assert whole[: 1 << 20] == ram[: 8 * 4096] + page[:] + ram[9 * 4096 : 1 << 20]


def test_prefetch_warms_what_it_is_told_to(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    blocks = [
        Block("pc.ram", 4096, dict.fromkeys(range(4096), b"x")),
        Block("/rom@etc/acpi", 2, {0: b"y", 1: b"y"}),
    ]
    MigrationFile(blocks=blocks).write(path)
    mounted = mount(path)
    assert mounted.ctl("prefetch %2From@etc%2Facpi") == "ok 8192 bytes are in the page cache"
    assert mounted.status()["read-pages"] == 2
    assert mounted.ctl("prefetch pc.ram 0 1M").startswith("ok ")
    read = mounted.status()["read-pages"]
    assert 258 <= read < 4098
    mounted.ctl("prefetch")
    assert mounted.status()["read-pages"] == 4098


def test_what_was_read_is_read_first_the_next_time(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", 4096, dict.fromkeys(range(4096), b"x"))]).write(path)
    mounted = mount(path)
    with open(mounted.ram / "pc.ram", "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 4096, 9 << 20)
    read = mounted.status()["read-pages"]
    assert 0 < read < 2048
    assert mounted.ctl("record").startswith("ok ")
    mounted.umount()
    mounted = mount(path, "prefetch=recorded")
    assert wait_for(lambda: mounted.status()["read-pages"] >= read)
    with open(mounted.path / "pages" / "pc.ram", "rb") as file:
        assert file.read()[9 << 8] == 2
    assert mounted.status()["read-pages"] < 4096
    fresh = mount(tmp_path / "new", "ram=pc.ram:1M")
    with pytest.raises(OSError, match="mount has no checkpoint, and"):
        fresh.ctl("record")


def wait_for(condition: Callable[[], bool]) -> bool:
    """Ask again and again: what goes on in the background tells nobody."""
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("access", [os.O_WRONLY, os.O_RDWR], ids=["O_WRONLY", "O_RDWR"])
def test_reset_drops_what_was_written(access: int, mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", 16, {0: b"golden"})]).write(path)
    mounted = mount(path)
    with open(os.open(mounted.ram / "pc.ram", access), "wb", buffering=0) as file:
        file.write(b"written" + bytes(8185))  # whole pages, which the kernel keeps
        with pytest.raises(OSError, match="open for writing") as caught:
            mounted.ctl("reset")
        assert caught.value.errno == errno.EBUSY
    mounted.ctl("reset")
    assert (mounted.ram / "pc.ram").read_bytes().startswith(b"golden\0")
    assert mounted.status()["written-pages"] == 0
