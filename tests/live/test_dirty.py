"""A guest that rewrites 64 MiB again and again is checkpointed five times in a row."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import trio

from tests.live.machines import Machine, goes_on
from tests.mount.conftest import Mount
from tests.qemu.guest import Guest
from tests.qemu.qmp import Qmp

MACHINE = Machine("dirty", backends=(("pc.ram", 192),))
SLACK = timedelta(milliseconds=1)  # status rounds


def second_monitor(path: Path) -> list[str]:
    return ["-qmp", f"unix:{path},server=on,wait=off"]


def moment(event: dict[str, Any]) -> timedelta:
    stamp = event["timestamp"]
    return timedelta(seconds=stamp["seconds"], microseconds=stamp["microseconds"])


def pauses(qmp: Qmp) -> list[timedelta]:
    """How long the guest stood still each time, by QEMU's own clock: from STOP to RESUME."""
    stops = [moment(event) for event in qmp.events if event["event"] == "STOP"]
    resumes = [moment(event) for event in qmp.events if event["event"] == "RESUME"]
    return [resume - stop for stop, resume in zip(stops, resumes, strict=True)]


async def test_five_live_checkpoints_in_a_row(guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "vm", MACHINE.ram_option)
    files = [tmp_path / f"checkpoint{n}" for n in range(5)]
    ticks = []
    reported = []
    async with (
        MACHINE.on(mounted.ram, guest_files, *second_monitor(tmp_path / "qmp"), append="dirty=64") as vm,
        await trio.open_unix_socket(str(tmp_path / "qmp")) as stream,
    ):
        observer = Qmp(stream)
        await observer.greet()
        mounted.ctl(f"qmp {vm.qmp_path}")
        await vm.wait_serial(r"^dirty 1 OK\s")
        await vm.tick()
        for file in files:
            ticks.append(vm.ticks()[-1])
            mounted.ctl(f"save {file}")
            reported.append(timedelta(milliseconds=mounted.status()["migration"]["downtime"]))
        await goes_on(vm)
        await observer.execute("query-status")  # its answer comes after all events before it
    mounted.umount()
    assert [pause <= report + SLACK for pause, report in zip(pauses(observer), reported, strict=True)] == [True] * 5
    for file, tick, load in zip(files, ticks, [{}, {"multifd": 4, "direct_io": True}] * 3, strict=False):
        async with MACHINE.anonymous(guest_files) as vm:
            await vm.load(file, **load)
            assert (await vm.wait_serial(r"^dirty \d+ (OK|BAD)\s"))[1] == "OK"
            assert vm.ticks()[0] > tick
        file.unlink()
