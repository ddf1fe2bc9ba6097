"""The pause of a guest that dirties its RAM as fast as it can: RAM of its own, RAM on a mount, stock QEMU's save.

The guest writes pass N into page after page and checks what it finds: each checkpoint is seen to be of one moment.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import trio

from tests.benchmarks.machines import idle_pauses
from tests.benchmarks.rows import MiB, Row, Samples
from tests.benchmarks.setting import Mount, Setting, settle
from tests.mount.decode import decode
from tests.qemu.machine import Qemu
from tests.qemu.stepper import Stepper, build_stepper, steps

CHANNELS = 4
STOCK_SAVE = "stock QEMU, stop to completed, multifd 4, direct-io"
PROGRAM = Path(sys.executable).parent / "ckptfs"


def busy(setting: Setting) -> Iterator[Row]:
    """Saves of a busy guest in three ways, in turn."""
    quick = setting.rounds < Setting.rounds
    dirty = (64 if quick else 400) * MiB
    idle = trio.run(idle_pauses, setting, dirty + 112 * MiB)
    stepper = build_stepper(setting.directory, dirty)
    yield from trio.run(_busy, setting, stepper, setting.rounds if quick else 20, idle)


async def _busy(setting: Setting, guest: Stepper, rounds: int, idle: Samples) -> list[Row]:
    memory = guest.length + 16 * MiB
    size = f"{memory // MiB}M"
    snapshot: Samples = []
    mounted: Samples = []
    stock: Samples = []
    seconds: Samples = []
    file, stock_file = setting.directory / "own", setting.directory / "stock"

    def machine(kind: str) -> Qemu:
        backend = ("-object", f"{kind},id=pc.ram,size={memory}")
        return Qemu(guest, *backend, machine="pc,memory-backend=pc.ram", memory=size)

    with Mount(setting, f"ram=pc.ram:{memory}") as mount:
        mem_path = f"memory-backend-file,mem-path={mount.ram},share=on"
        async with machine("memory-backend-ram") as own, machine(mem_path) as on_mount:
            mount.ctl(f"qmp {on_mount.qmp_path}")
            await on_mount.wait_serial("[.]")
            await own.wait_serial("[.]")

            async def by_snapshot() -> None:
                command = [PROGRAM, "save", "--quiet", "--qmp", own.qmp_path, file]
                started = time.perf_counter()
                snapshot.append(await _pause_at(own, lambda: subprocess.run(command, check=True)))
                seconds.append(time.perf_counter() - started)
                steps(decode(file).blocks["pc.ram"], guest.length)

            async def on_its_mount() -> None:
                mounted.append(await _pause_at(on_mount, lambda: mount.ctl("save")))
                steps(decode(setting.checkpoint).blocks["pc.ram"], guest.length)

            async def by_stock_qemu() -> None:
                stock_file.unlink(missing_ok=True)
                started = time.perf_counter()
                await own.stop()
                await own.migrate_to(stock_file, multifd=CHANNELS, direct_io=True)
                stock.append((time.perf_counter() - started) * 1000)

            await on_mount.stop()
            for _ in range(rounds):  # one of the two stands still: neither takes the other's processor time
                settle(setting.directory)
                await by_snapshot()
                await by_stock_qemu()
                await on_mount.cont()
                settle(setting.directory)
                await on_its_mount()
                await on_mount.stop()
                await own.cont()
            assert "!" not in own.serial + on_mount.serial, "the guest's RAM is wrong"
    what = f"guest dirties {guest.length // MiB} MiB for ever"
    return [
        Row(f"{what}: pause, RAM of its own, snapshot", "ms", snapshot, stock, STOCK_SAVE),
        Row(f"{what}: pause, RAM on a mount", "ms", mounted, stock, STOCK_SAVE),
        Row(f"{what}: pause, RAM on a mount", "ms", mounted, idle, "the same with an idle guest", "<= 5.0"),
        Row(f"{what}: whole save, RAM of its own", "ms", [1000 * x for x in seconds], stock, STOCK_SAVE),
    ]


async def _pause_at(vm: Qemu, save: Callable[[], object]) -> float:
    """Milliseconds from the STOP to the RESUME that ``save`` brings, by QEMU's clock."""
    await vm.run_state()
    vm.forget_events("STOP")
    vm.forget_events("RESUME")
    await trio.to_thread.run_sync(save)
    stopped, resumed = await vm.event_time("STOP"), await vm.event_time("RESUME")
    return (resumed - stopped) * 1000
