"""A checkpoint remembers the machine that was saved, in a trailer that stock QEMU does not see."""

import json
import os
import pwd
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest

from ckptfs.channels.identity import Identity
from ckptfs.channels.opened import open_file
from ckptfs.mapped_ram.trailer import Depends, Entry, SavedMachine, Trailer
from ckptfs.qemu.origin import saved_machine
from tests.cli.conftest import RunCkptfs
from tests.live.machines import SMALL, LiveCheckpoint, LiveCheckpoints
from tests.mount.conftest import Mount
from tests.qemu.guest import Guest


@pytest.fixture
def live(checkpoints: LiveCheckpoints) -> LiveCheckpoint:
    return checkpoints.live(SMALL)


def saved_in(path: Path) -> SavedMachine:
    with open_file(str(path)) as opened:
        assert opened.content.trailer_problem is None
        assert opened.trailer.machine is not None
        return opened.trailer.machine


def test_it_is_the_program_with_its_arguments(live: LiveCheckpoint, run_ckptfs: RunCkptfs) -> None:
    machine = saved_in(live.path)
    assert os.path.basename(machine.program) == "qemu-system-x86_64"
    assert ("-kernel", str(live.guest.kernel)) == machine.arguments[
        machine.arguments.index("-kernel") : machine.arguments.index("-kernel") + 2
    ]
    assert any(argument.startswith("memory-backend-file,") for argument in machine.arguments)
    version = subprocess.run([machine.program, "--version"], capture_output=True, text=True, check=True).stdout
    assert f"version {machine.qemu.split()[0]}" in version
    assert machine.directory == os.getcwd()
    assert machine.host == os.uname().nodename
    assert abs(machine.time - live.path.stat().st_mtime) < 60
    lines = run_ckptfs("info", live.path).stdout.splitlines()
    assert any(line.startswith("saved    20") and f"QEMU {machine.qemu}" in line for line in lines)
    assert any(line.startswith(f"command  {machine.program} ") for line in lines)
    told = json.loads(run_ckptfs("info", "--json", live.path).stdout)["trailer"]
    assert told["machine"]["arguments"] == list(machine.arguments)
    assert [entry["name"] for entry in told["entries"]] == ["machine", "checksums", "stream"]


@pytest.mark.parametrize("multifd", [0, 4])
async def test_stock_qemu_does_not_see_it(live: LiveCheckpoint, multifd: int) -> None:
    assert saved_in(live.path)
    async with SMALL.anonymous(live.guest) as vm:
        await vm.load(live.path, multifd=multifd, direct_io=multifd > 0)
        assert await vm.tick() > live.last_tick


async def test_nor_in_a_plain_stream(live: LiveCheckpoint, mount: Mount, tmp_path: Path) -> None:
    mounted = mount(live.path)
    mounted.ctl("migrate_set_capability multifd off")
    mounted.ctl("migrate_set_capability mapped-ram off")
    mounted.ctl(f"save {tmp_path}/plain")
    assert saved_in(tmp_path / "plain")
    async with SMALL.anonymous(live.guest) as vm:
        await vm.load(tmp_path / "plain", mapped_ram=False)
        assert await vm.tick() > live.last_tick


def test_saves_keep_what_still_holds(live: LiveCheckpoint, mount: Mount, tmp_path: Path) -> None:
    machine = saved_in(live.path)
    mounted = mount(live.path)
    mounted.ctl(f"save {tmp_path}/same")
    assert saved_in(tmp_path / "same") == machine
    mounted.ctl("migrate_set_capability multifd off")
    mounted.ctl("migrate_set_capability mapped-ram off")
    mounted.ctl(f"save {tmp_path}/plain")
    assert saved_in(tmp_path / "plain") == machine
    mounted.ctl("migrate_set_capability mapped-ram on")
    with (mounted.ram / "pc.ram").open("r+b") as ram:
        ram.write(b"patched")
    mounted.ctl(f"save {tmp_path}/patched")
    assert saved_in(tmp_path / "patched") == machine
    mounted.ctl(f"save {tmp_path}/ram ram-only")
    with open_file(f"{tmp_path}/ram") as opened:
        assert [entry.name for entry in opened.trailer.entries] == ["checksums", "stream"]
    mounted.umount()
    again = mount(tmp_path / "plain")
    again.ctl(f"save {tmp_path}/mapped")
    assert saved_in(tmp_path / "mapped") == machine


def test_entries_of_later_versions_are_kept_for_as_long_as_they_hold(
    live: LiveCheckpoint, mount: Mount, tmp_path: Path
) -> None:
    path = tmp_path / "vm"
    with open_file(str(live.path)) as opened:
        trailer, end = opened.trailer, opened.checkpoint.end_offset
    for name, depends in (("of-nothing", 0), ("of-ram", 1), ("of-devices", 2), ("of-something-later", 8)):
        trailer = trailer.with_entry(Entry(name, name.encode() * 100, Depends(depends)))
    path.write_bytes(live.path.read_bytes()[:end] + trailer.encode())
    mounted = mount(path)
    with (mounted.ram / "pc.ram").open("r+b") as ram:
        for command, expected in (
            ("save {}/one", ["machine", "of-nothing", "of-ram", "of-devices", "checksums", "stream"]),
            ("save {}/two", ["machine", "of-nothing", "of-devices", "checksums", "stream"]),
            ("save {}/three ram-only", ["of-nothing", "checksums", "stream"]),
        ):
            mounted.ctl(command.format(tmp_path))
            with open_file(f"{tmp_path}/{command.split()[1][3:]}") as opened:
                assert [entry.name for entry in opened.trailer.entries] == expected
                assert opened.trailer.get("of-nothing") == b"of-nothing" * 100
            ram.seek(0)
            ram.write(os.urandom(16))
            ram.flush()


def test_a_damaged_one_is_none(live: LiveCheckpoint, mount: Mount, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    path = tmp_path / "vm"
    data = bytearray(live.path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    lines = run_ckptfs("info", path).stdout.splitlines()
    assert lines[0] == f"{path}: mapped-ram checkpoint, complete"
    [line] = [line for line in lines if line.startswith("trailer")]
    assert line.startswith("trailer  can't be read, as if there were none: at byte 0x")
    assert line.endswith("the trailer's entry 'stream' is damaged")
    told = json.loads(run_ckptfs("info", "--json", path).stdout)["trailer"]
    assert told["machine"] is None
    assert told["problem"].endswith("is damaged")
    mounted = mount(path)
    mounted.expect_log("what it says of its machine can't be read")
    mounted.ctl(f"save {tmp_path}/other")
    with open_file(f"{tmp_path}/other") as opened:
        assert [entry.name for entry in opened.trailer.entries] == ["checksums", "stream"]
        assert opened.content.trailer_problem is None


def test_whom_a_command_is_taken_from(tmp_path: Path, live: LiveCheckpoint) -> None:
    path = tmp_path / "vm"
    path.write_bytes(live.path.read_bytes())
    for mode, owner, problem in (
        (0o600, 0, None),
        (0o644, 0, None),
        (0o664, 0, "others may write it (mode 0o664)"),
        (0o602, 0, "others may write it"),
        (0o600, 12345, "belongs to user 12345"),
    ):
        path.chmod(mode)
        os.chown(path, owner, 0)
        with open_file(str(path)) as opened:
            found = opened.distrust()
            assert (found is None) if problem is None else (problem in str(found))


def test_a_command_of_somebody_elses_machine_is_not_trusted(tmp_path: Path, live: LiveCheckpoint) -> None:
    """A process can have itself look like any program, and a root's daemon saves machines of other users."""
    with open_file(str(live.path)) as opened:
        end, machine = opened.checkpoint.end_offset, opened.trailer.machine
        assert machine is not None
        assert machine.uid == os.geteuid()
    path = tmp_path / "vm"
    path.touch(mode=0o600)
    path.write_bytes(live.path.read_bytes()[:end] + Trailer((replace(machine, uid=12345).entry(),)).encode())
    with open_file(str(path)) as opened:
        assert "its machine ran as user 12345" in str(opened.distrust())


async def test_whose_machines_are_remembered(guest_files: Guest) -> None:
    root = Identity.of_daemon()
    assert saved_machine(os.getpid(), "10.0.2", root) is None
    assert saved_machine(0, "10.0.2", root) is None
    async with SMALL.anonymous(guest_files, "-run-with", "user=nobody") as vm:
        found = saved_machine(vm.pid, "10.0.2", root)
        assert found is not None
        assert found.uid == pwd.getpwnam("nobody").pw_uid
        assert saved_machine(vm.pid, "10.0.2", Identity(found.uid, 0, (), "/")) == replace(found, time=ANY)
        assert saved_machine(vm.pid, "10.0.2", Identity(12345, 0, (), "/")) is None
