"""The machines that these tests run, with their RAM on a mount or anonymous, and checkpoints of them."""

import tempfile
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trio

from ckptfs.namespace.names import encode_name
from tests.mount.decode import decode
from tests.mount.harness import Mounted
from tests.qemu.guest import Guest
from tests.qemu.machine import VGA_AND_RNG, Qemu
from tests.qemu.stepper import Stepper

MANY_DEVICES = (
    *VGA_AND_RNG,
    *("-blockdev", "null-co,node-name=disk,size=16777216,read-zeroes=on", "-device", "virtio-blk-pci,drive=disk"),
    *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"),
    *("-device", "virtio-balloon-pci"),
    *("-device", "virtio-serial-pci", "-chardev", "null,id=console", "-device", "virtconsole,chardev=console"),
    *("-device", "qemu-xhci", "-device", "usb-tablet"),
)


@dataclass(frozen=True)
class Machine:
    """A machine of stock QEMU: one backend is all of its RAM, several are NUMA nodes. Sizes in MiB."""

    name: str
    type: str = "pc"
    backends: tuple[tuple[str, int], ...] = (("pc.ram", 128),)
    devices: tuple[str, ...] = VGA_AND_RNG

    def __str__(self) -> str:
        return self.name

    @property
    def ram_option(self) -> str:
        """What a mount needs to be told for a fresh guest."""
        return "ram=" + ",ram=".join(f"{name}:{size}M" for name, size in self.backends)

    @property
    def memory(self) -> str:
        """The argument of -m."""
        return f"{sum(size for _, size in self.backends)}M"

    def on(self, ram: Path, guest: Guest | Stepper, *arguments: str, share: str = "share=on", **how: Any) -> Qemu:
        """This machine with its RAM in the files of `ram`; `arguments` and `how` go to Qemu."""
        kinds = {name: f"memory-backend-file,mem-path={ram / name},{share}" for name, _ in self.backends}
        return self._with(kinds, guest, *arguments, **how)

    def anonymous(
        self, guest: Guest | Stepper, *arguments: str, incoming: str | None = "defer", **how: Any
    ) -> Qemu:
        """This machine as anybody has it, its RAM on no mount."""
        how["incoming"] = incoming
        if len(self.backends) == 1:
            return Qemu(guest, *self.devices, *arguments, machine=self.type, memory=self.memory, **how)
        return self._with({name: "memory-backend-ram" for name, _ in self.backends}, guest, *arguments, **how)

    def _with(self, kinds: dict[str, str], guest: Guest | Stepper, *arguments: str, **how: Any) -> Qemu:
        objects = []
        for name, size in self.backends:
            objects += ["-object", f"{kinds[name]},id={name},size={size}M"]
        machine = self.type
        if len(self.backends) == 1:
            machine += f",memory-backend={self.backends[0][0]}"
        else:
            for name, _ in self.backends:
                objects += ["-numa", f"node,memdev={name}"]
        return Qemu(guest, *objects, *self.devices, *arguments, machine=machine, memory=self.memory, **how)


SMALL = Machine("small")
PC = Machine("pc", devices=("-smp", "4", *MANY_DEVICES))
Q35 = Machine("q35", "q35", devices=MANY_DEVICES)
NUMA = Machine("numa", "q35", (("m0", 96), ("m1", 64)), ("-smp", "4", *VGA_AND_RNG))


@dataclass(frozen=True)
class LiveCheckpoint:
    """A checkpoint of a running `machine`; `last_tick` is the last number that it had printed before."""

    path: Path
    machine: Machine
    guest: Guest
    last_tick: int


class LiveCheckpoints:
    """Checkpoints of one guest in `directory`, each made once."""

    def __init__(self, guest: Guest, directory: Path) -> None:
        self._guest = guest
        self._directory = directory
        self._live: dict[Machine, LiveCheckpoint] = {}
        self._stock: dict[tuple[Machine, bool], LiveCheckpoint] = {}

    def live(self, machine: Machine) -> LiveCheckpoint:
        """The checkpoint that `save` wrote of a running guest on a fresh mount, which went on running."""
        if machine not in self._live:
            self._live[machine] = _in_thread(self._save_live, machine)
        return self._live[machine]

    def stock(self, machine: Machine, *, stopped: bool = True) -> LiveCheckpoint:
        """One that QEMU wrote by itself, from anonymous RAM; a guest that was stopped has to be told to go on."""
        key = machine, stopped
        if key not in self._stock:
            self._stock[key] = _in_thread(self._save_stock, self.live(machine), stopped)
        return self._stock[key]

    async def _save_live(self, machine: Machine) -> LiveCheckpoint:
        directory = Path(tempfile.mkdtemp(dir=self._directory))
        mounted = Mounted(directory / "migfile", directory / "mnt", directory / "log", machine.ram_option)
        try:
            async with machine.on(mounted.ram, self._guest) as vm:
                last_tick = await vm.tick()
                mounted.ctl(f"qmp {vm.qmp_path}")
                mounted.ctl("save")
                await goes_on(vm)
        finally:
            mounted.clean_up()
        return LiveCheckpoint(directory / "migfile", machine, self._guest, last_tick)

    async def _save_stock(self, live: LiveCheckpoint, stopped: bool) -> LiveCheckpoint:
        path = self._directory / f"stock-{len(self._stock)}"
        async with live.machine.anonymous(self._guest) as vm:
            await vm.load(live.path)
            last_tick = await vm.tick()
            if stopped:
                await vm.stop()
            await vm.migrate_to(path, multifd=2, direct_io=True)
        return LiveCheckpoint(path, live.machine, self._guest, last_tick)


def _in_thread(make: Callable[..., Awaitable[LiveCheckpoint]], *arguments: Any) -> LiveCheckpoint:
    """Tests that are inside trio.run can't run another one in their thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(trio.run, make, *arguments).result()


def assert_holds(ram: Path, checkpoint: Path) -> None:
    """See that the files in `ram` have the content of a checkpoint, decoded by nothing that is tested here."""
    for idstr, content in decode(checkpoint).blocks.items():
        file = ram / encode_name(idstr).decode()
        assert np.array_equal(np.fromfile(file, np.uint8), content), idstr


async def was_stopped(vm: Qemu) -> bool:
    """Whether the guest has stood still; asked once, it forgets."""
    await vm.run_state()  # its answer comes after all events before it
    with trio.move_on_after(0):
        await vm.event("STOP")
        return True
    return False


async def goes_on(vm: Qemu) -> int:
    """Wait for a tick that the guest has not printed by now, and return its number."""
    if not vm.ticks():
        return await vm.tick()
    await vm.wait_serial(rf"^tick {vm.ticks()[-1] + 1} MD5(OK|BAD)\s")
    return vm.ticks()[-1]
