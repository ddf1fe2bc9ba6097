"""Somebody else commands the machine while it is saved, at any moment: stop, cont, cancel, migrate.

The machine has its RAM on a mount, or its own (by snapshot, by precopy). Its guest stops where its registers and
its memory are not of one moment: here, and in each checkpoint, when stock QEMU goes on from it.
"""

import errno
import traceback
from pathlib import Path

import trio

from tests.doubles.checkpoints import verified
from tests.mount.decode import decode
from tests.mount.harness import Mounted, unmount_by_force
from tests.qemu.machine import Qemu
from tests.qemu.qmp import QmpError
from tests.qemu.stepper import Stepper, build_stepper, steps
from tests.torture.frame import Round

LENGTH = 8 << 20
HANG = 90.0
"""Seconds within which a round ends, besides its own length."""

REFUSALS = (errno.EBUSY, errno.EIO)
"""How a save may fail for what the other one does: QEMU refused something, or stood where it could not be saved."""

QEMU_BREAKS = (
    "Assertion `new_state < RUN_STATE__MAX' failed",
    "migration_iteration_finish: Unknown ending state",
)
"""What QEMU 10.0 says when somebody's `migrate` comes as another migration ends: it aborts or gets stuck."""

COMMANDS = (
    *("cont", "cont", "cont", "stop", "stop", "migrate_cancel", "HMP migrate_continue", "HMP system_wakeup"),
    *("HMP balloon 8", "HMP info status", "HMP migrate -d exec:cat>/dev/null", "HMP nmi", "query-migrate"),
)


def torture(this: Round) -> None:
    """One round."""
    this.within(this.ends_in() + HANG, "a round", lambda: trio.run(_torture, this))


async def _torture(this: Round) -> None:
    guest = build_stepper(this.directory, LENGTH)
    way = this.random.choice(("mounted", "snapshot", "precopy"))
    options = ["ram=pc.ram:16M"] if way == "mounted" else [f"capture={way}"]
    target = this.directory / "vm"
    sockets = Qemu(guest, *_backend(way, this.directory), machine="pc,memory-backend=pc.ram", memory="16M")
    unexpected: list[str] = []
    mounted = Mounted(
        target, this.directory / "mnt", this.directory / "log", *options, f"qmp={sockets.qmp_path}", deadline=600
    )
    try:
        async with sockets as vm:
            await vm.wait_serial("[.]")
            over = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_command, this, vm, over)
                while this.goes_on():
                    if await _saved(this, mounted, way, unexpected):
                        await _judge(this, target, guest)
                over.set()
            await vm.migration_ended()
            await vm.qmp("cont")
            vm.forget_serial()
            await vm.wait_serial("[.]|!")
            if "!" in vm.serial:
                this.count("wrong bytes", f"{way}: the guest itself")
    except Exception:  # noqa: BLE001 - counted, unless QEMU is to blame
        unexpected.append(traceback.format_exc())
    finally:
        if any(words in sockets.last_words for words in QEMU_BREAKS):
            this.count("QEMU broke")
        else:
            for error in unexpected:
                this.count("surprises", f"{way}: {error}")
        mounted.break_off()
        this.look_into_log(mounted.log)
        unmount_by_force(mounted.path)


def _backend(way: str, directory: Path) -> tuple[str, str]:
    kind = f"memory-backend-file,mem-path={directory}/mnt/ram/pc.ram,share=on"
    return "-object", f"{kind if way == 'mounted' else 'memory-backend-ram'},id=pc.ram,size=16M"


async def _command(this: Round, vm: Qemu, over: trio.Event) -> None:
    """Say something every now and then."""
    while not over.is_set():
        line = this.random.choice(COMMANDS)
        this.count("commands of others")
        try:
            if line.startswith("HMP "):
                await vm.hmp(line.removeprefix("HMP "))
            else:
                await vm.qmp(line)
        except QmpError:
            this.count("refused by QEMU")
        with trio.move_on_after(this.random.expovariate(1 / 0.02)):
            await over.wait()


async def _saved(this: Round, mounted: Mounted, way: str, unexpected: list[str]) -> bool:
    try:
        await trio.to_thread.run_sync(mounted.ctl, "save")
    except OSError as error:
        if error.errno not in REFUSALS:
            unexpected.append(str(error))
        this.count(f"{way}: refused")
        return False
    this.count(f"{way}: saved")
    return True


async def _judge(this: Round, target: Path, guest: Stepper) -> None:
    """See that the checkpoint is of one moment."""
    try:
        steps(decode(target).blocks["pc.ram"], LENGTH)
    except AssertionError as error:
        this.count("wrong bytes", str(error))
    if (found := verified(target)).findings or found.unknown:
        this.count("wrong bytes", f"it is not verified: {found}")
    backend = ("-object", "memory-backend-ram,id=pc.ram,size=16M")
    async with Qemu(guest, *backend, machine="pc,memory-backend=pc.ram", memory="16M", incoming="defer") as vm:
        await vm.load(target)
        await vm.cont()
        await vm.wait_serial("[.]{2}|!")
        if "!" in vm.serial:
            this.count("wrong bytes", "RAM and device state are of two moments")
