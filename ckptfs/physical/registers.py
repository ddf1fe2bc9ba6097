"""An x86-64 vCPU's registers, out of its section ``cpu`` (target/i386/machine.c, 10.0)."""

import struct
from dataclasses import dataclass

from ckptfs.physical.devices import DeviceState

LMA = 1 << 10
"""EFER.LMA: the vCPU is in long mode."""

GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
"""The order of ``env.regs``."""

SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
"""The order of ``env.segs``."""

_TABLES = ("ldt", "tr", "gdt", "idt")


@dataclass(frozen=True)
class Segment:
    """A segment register, or a descriptor table."""

    selector: int
    base: int
    limit: int
    flags: int

    def note(self) -> bytes:
        """QEMUCPUSegment of target/i386/arch_dump.c."""
        return struct.pack("<4IQ", self.selector, self.limit, self.flags, 0, self.base)


@dataclass(frozen=True)
class Registers:
    """One vCPU. ``general`` and ``segments`` are by name; ``cr`` has the control registers 0 to 4, 1 being 0."""

    general: dict[str, int]
    rip: int
    rflags: int
    segments: dict[str, Segment]
    cr: tuple[int, ...]
    efer: int
    kernel_gs_base: int

    @classmethod
    def of(cls, cpu: DeviceState) -> "Registers":
        """Those of a section ``cpu``. Raises CheckpointError for a field that is not there, or of another kind."""
        segments = {name: _segment(cpu, f"env.segs[{index}]") for index, name in enumerate(SEGMENTS)}
        segments |= {name: _segment(cpu, f"env.{name}") for name in _TABLES}
        cr = tuple(0 if number == 1 else cpu.number(f"env.cr[{number}]") for number in range(5))
        return cls(
            general=dict(zip(GENERAL, cpu.numbers("env.regs", 16), strict=True)),
            rip=cpu.number("env.eip"),
            rflags=cpu.number("env.eflags"),
            segments=segments,
            cr=cr,
            efer=cpu.number("env.efer"),
            kernel_gs_base=cpu.number("env.kernelgsbase"),
        )

    @property
    def is_long(self) -> bool:
        """Whether the vCPU is in long mode: before, there is no kernel that any tool here knows."""
        return bool(self.efer & LMA)

    @property
    def is_user(self) -> bool:
        """Whether the vCPU runs a program, and not the kernel (the privilege level in cs)."""
        return self.segments["cs"].selector & 3 == 3

    def named(self) -> dict[str, int]:
        """All as a person asks for them."""
        values = {**self.general, "rip": self.rip, "rflags": self.rflags}
        for name, segment in self.segments.items():
            values |= {name: segment.selector, f"{name}_base": segment.base}
        values |= {f"cr{number}": value for number, value in enumerate(self.cr) if number != 1}
        return values | {"efer": self.efer, "kernel_gs_base": self.kernel_gs_base}


def _segment(cpu: DeviceState, name: str) -> Segment:
    return Segment(*(cpu.number(f"{name}.{part}") for part in ("selector", "base", "limit", "flags")))
