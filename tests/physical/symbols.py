"""Debuggers that need the kernel's symbols, on views/ of a Linux with KASLR: run by `make test-tools`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.examples.conftest import EXAMPLES, ROOT, Run, run
from tests.live.machines import Machine
from tests.mount.conftest import Mount
from tests.mount.harness import BIN
from tests.physical.conftest import SavedGuests
from tests.qemu.guest import CACHE, Guest

__all__ = ["run"]

SYMBOLS = CACHE / "vmlinux"

CLOCK = """
import sys
sys.path.insert(0, sys.argv[1])
from tasks import program

prog = program(sys.argv[2])
prog.load_debug_info([sys.argv[3]])
before = prog["jiffies"].value_()
while prog["jiffies"].value_() == before:
    pass
"""
"""Ends when the guest's clock has gone on, as drgn sees it."""


def output(*command: str | Path, said: str = "") -> str:
    done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done
    return done.stdout


def test_drgn_lists_tasks_and_reads_few_pages(saved: SavedGuests, mount: Mount) -> None:
    mounted = mount(saved.told().path)
    printed = output(sys.executable, EXAMPLES / "tasks.py", mounted.path / "views" / "vmcore", SYMBOLS)
    assert re.search(r"^1 +init", printed, re.MULTILINE)
    assert re.search(r"^2 +kthreadd", printed, re.MULTILINE)
    assert "#0 " in printed
    status = mounted.status()
    assert status["read-pages"] < status["page-count"] // 100
    without_a_mount = output(sys.executable, EXAMPLES / "tasks.py", saved.told().path, SYMBOLS)
    assert re.findall(r"^\d+ .*", without_a_mount, re.MULTILINE) == re.findall(r"^\d+ .*", printed, re.MULTILINE)


async def test_drgn_sees_a_guest_that_runs(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "ckpt", "ram=pc.ram:128M")
    machine = Machine("told", devices=("-device", "vmcoreinfo"))
    async with machine.on(mounted.ram, guest_files, append="vmcoreinfo=1") as vm:
        await vm.tick()
        await trio.to_thread.run_sync(mounted.ctl, f"qmp {vm.qmp_path}")
        await trio.to_thread.run_sync(mounted.ctl, "save")
        await vm.tick()
        mounted.expect_log("views/vmcore was refused to process")
        with pytest.raises(PermissionError):
            (mounted.path / "views" / "vmcore").open("rb")
        await trio.to_thread.run_sync(output, sys.executable, "-c", CLOCK, EXAMPLES, mounted.path, SYMBOLS)
        await vm.stop()  # a list that changes while it is read may be torn
        printed = await trio.to_thread.run_sync(
            output, sys.executable, EXAMPLES / "tasks.py", mounted.path, SYMBOLS
        )
        assert re.search(r"^1 +init", printed, re.MULTILINE)
        assert re.search(r"^2 +kthreadd", printed, re.MULTILINE)


def test_crash_reads_the_log(saved: SavedGuests, mount: Mount) -> None:
    mounted = mount(saved.told().path)
    command = ("crash", "--minimal", "-s", SYMBOLS, mounted.path / "views" / "vmcore")
    assert "Linux version" in output(*command, said="log\nquit\n")


def test_gdb_sees_memory_at_the_kernels_addresses(saved: SavedGuests, mount: Mount) -> None:
    views = mount(saved.told().path).path / "views"
    offset = re.search(r"^KERNELOFFSET=(\w+)$", (views / "map").read_text(), re.MULTILINE)
    assert offset is not None
    commands = [f"symbol-file {SYMBOLS} -o 0x{offset[1]}", f"core-file {views}/kcore", "bt", "print init_task.comm"]
    arguments = [argument for command in commands for argument in ("-ex", command)]
    printed = output("gdb", "-q", "-batch", *arguments)
    assert '= "swapper/0' in printed
    assert re.search(r"^#1 ", printed, re.MULTILINE)


def test_the_howto_with_symbols(run: Run, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "howto" / "memory.md").read_text()
    script = "".join(re.findall(r"^```(?:ba)?sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    (tmp_path / "work" / "vmlinux").symlink_to(SYMBOLS)
    for name in ("tasks.py", "symbols.py"):
        (tmp_path / "work" / name).symlink_to(EXAMPLES / name)
    printed = run("exec 2>errors\n" + script)
    assert printed.count('"swapper/0') == 1
    assert len(re.findall(r"^1 +init", printed, re.MULTILINE)) == 3


def test_volatility_lists_tasks(saved: SavedGuests, mount: Mount, tmp_path: Path) -> None:
    core = mount(saved.told().path).path / "views" / "vmcore"
    directories = [tmp_path / "symbols" / "linux", tmp_path / "cache"]
    for directory in directories:
        directory.mkdir(parents=True)
    output(sys.executable, EXAMPLES / "symbols.py", SYMBOLS, directories[0] / "vmlinux.json")
    places = ("--offline", "--cache-path", tmp_path / "cache", "-s", tmp_path / "symbols", "-f", core)
    assert "Linux version" in output(BIN / "vol", "-q", *places, "banners.Banners")
    tasks = output(BIN / "vol", "-q", *places, "linux.pslist.PsList")
    assert re.search(r"\t1\t1\t0\tinit\t", tasks)
    assert re.search(r"\t2\t2\t0\tkthreadd\t", tasks)
    assert "\tqemu_fw_cfg\t" in output(BIN / "vol", "-q", *places, "linux.lsmod.Lsmod")
