"""A guest of 174 bytes that notices when its registers and its memory are not of one moment.

It is the machine's firmware: it makes its memory zeros, and then writes pass 1, 2, 3 ... into page after page of
its memory, for ever. Before it writes pass N into a page, every word of that page has to hold N - 1: where it
stands is in its registers, so device state that is older or newer than RAM, or one page that was lost, is found at
once.

On its serial line it prints ``.`` for each pass, and ``!`` before it stops when memory is wrong. Whoever looks at
its memory sees one step, from N to N - 1, somewhere: `steps` tells.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

BASE = 1 << 20
"""Where in its memory it begins to write."""

_PAGE = 4096
_ROM_LENGTH = 64 << 10
_CODE = bytes.fromhex(
    # 16 bit, at f000:0000                       # start:
    "fa e4 92 0c 02 e6 92"  # cli; A20 on
    "2e 66 0f 01 16 a0 00"  # lgdtl %cs:gdtr
    "0f 20 c0 0c 01 0f 22 c0"  # mov %cr0, %eax; or $1, %al; mov %eax, %cr0
    "66 ea 1e 00 0f 00 08 00"  # ljmpl $8, $code32
    # 32 bit, flat                               # code32:
    "66 b8 10 00 8e d8 8e c0 8e d0"  # mov $16, %ax; mov %ax, %ds, %es, %ss
    "bd 01 00 00 00"  # mov $1, %ebp           N
    "2e 8b 3d a6 00 0f 00 2e 8b 0d aa 00 0f 00"  # mov base, %edi; mov end, %ecx
    "29 f9 c1 e9 02 31 c0 f3 ab"  # sub %edi, %ecx; shr $2, %ecx; xor %eax, %eax; rep stosl
    "2e 8b 3d a6 00 0f 00"  # pass: mov base, %edi
    "89 fb 8d 45 ff b9 00 04 00 00"  # page: mov %edi, %ebx; lea -1(%ebp), %eax; mov $1024, %ecx
    "f3 af 75 1e"  # repe scasl; jne bad
    "89 df 89 e8 b9 00 04 00 00"  # mov %ebx, %edi; mov %ebp, %eax; mov $1024, %ecx
    "f3 ab"  # rep stosl
    "2e 3b 3d aa 00 0f 00 72 de"  # cmp end, %edi; jb page
    "66 ba f8 03 b0 2e ee"  # mov $0x3f8, %dx; mov $'.', %al; out %al, %dx
    "45 eb cd"  # inc %ebp; jmp pass
    "66 ba f8 03 b0 21 ee"  # bad: mov $0x3f8, %dx; mov $'!', %al; out %al, %dx
    "f4 eb fd 8d b4 26 00 00 00 00"  # hlt; jmp there
    "00 00 00 00 00 00 00 00 ff ff 00 00 00 9b cf 00 ff ff 00 00 00 93 cf 00"  # gdt: none, code, data
    "17 00 88 00 0f 00"  # gdtr
    "00 00 10 00"  # base
)
_RESET = bytes.fromhex("ea 00 00 00 f0")  # ljmp $0xf000, $0


@dataclass(frozen=True)
class Stepper:
    """A machine's firmware; it writes ``length`` bytes from `BASE` on."""

    rom: Path
    length: int

    def boot(self, append: str) -> list[str]:
        """QEMU's arguments."""
        return ["-bios", str(self.rom)]


def build_stepper(directory: Path, length: int) -> Stepper:
    """Write the firmware into `directory`; the machine needs at least `BASE` + `length` bytes of RAM."""
    code = _CODE + (BASE + length).to_bytes(4, "little")  # end
    rom = bytearray(_ROM_LENGTH)
    rom[: len(code)] = code
    rom[-16 : -16 + len(_RESET)] = _RESET
    path = directory / f"stepper-{length}"
    path.write_bytes(rom)
    return Stepper(path, length)


def steps(ram: npt.NDArray[np.uint8], length: int) -> tuple[int, int]:
    """The pass that is being written into `ram`, main memory at one moment, and how many words of it are written.

    AssertionError if that is no moment of this guest.
    """
    words = ram[BASE : BASE + length].view("<u4").astype(np.int64)
    changes = np.flatnonzero(np.diff(words))
    assert changes.size <= 1, f"{changes.size} steps, at words {changes[:8]}"
    if not changes.size:
        return int(words[0]), words.size
    at = int(changes[0]) + 1
    assert words[0] == words[-1] + 1, f"from {words[0]} to {words[-1]} at word {at}"
    return int(words[0]), at
