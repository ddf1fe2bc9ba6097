"""A guest of 294 bytes that notices when its registers, its memory and its disk are not of one moment.

It is the machine's firmware: it makes its memory zeros, and then writes pass 1, 2, 3 ... into page after page of
its memory, for ever. Before it writes pass N into a page, every word of that page has to hold N - 1: where it
stands is in its registers, so device state that is older or newer than RAM, or one page that was lost, is found at
once.

If it has an IDE disk, which begins with zeros, then at the end of pass N the same goes for its first two sectors in
turn: N - 2 is read, and N written. A disk that is older or newer than RAM is found when both have been read.

On its serial line it prints ``.`` for each pass, ``:`` if it has a disk, and ``!`` before it stops when memory or
disk is wrong. Whoever looks at its memory sees one step, from N to N - 1, somewhere: `steps` tells.
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
    "2e 66 0f 01 16 18 01"  # lgdtl %cs:gdtr
    "0f 20 c0 0c 01 0f 22 c0"  # mov %cr0, %eax; or $1, %al; mov %eax, %cr0
    "66 ea 1e 00 0f 00 08 00"  # ljmpl $8, $code32
    # 32 bit, flat                               # code32:
    "66 b8 10 00 8e d8 8e c0 8e d0"  # mov $16, %ax; mov %ax, %ds, %es, %ss
    "bd 01 00 00 00"  # mov $1, %ebp           N
    "2e 8b 3d 1e 01 0f 00 2e 8b 0d 22 01 0f 00"  # mov base, %edi; mov end, %ecx
    "29 f9 c1 e9 02 31 c0 f3 ab"  # sub %edi, %ecx; shr $2, %ecx; xor %eax, %eax; rep stosl
    "2e 8b 3d 1e 01 0f 00"  # pass: mov base, %edi
    "89 fb 8d 45 ff b9 00 04 00 00"  # page: mov %edi, %ebx; lea -1(%ebp), %eax; mov $1024, %ecx
    "f3 af 0f 85 98 00 00 00"  # repe scasl; jne bad
    "89 df 89 e8 b9 00 04 00 00"  # mov %ebx, %edi; mov %ebp, %eax; mov $1024, %ecx
    "f3 ab"  # rep stosl
    "2e 3b 3d 22 01 0f 00 72 da"  # cmp end, %edi; jb page
    "b3 2e 66 ba f7 01 ec"  # mov $'.', %bl; mov $0x1f7, %dx; in %dx, %al
    "3c 50 75 6c b3 3a"  # cmp $0x50, %al; jne done; mov $':', %bl      a disk, and ready
    "b7 20"  # mov $0x20, %bh         READ SECTORS
    "66 ba f2 01 b0 01 ee"  # sector: mov $0x1f2, %dx; mov $1, %al; out %al, %dx      one
    "42 21 e8 ee"  # inc %edx; and %ebp, %eax; out %al, %dx    at N modulo 2
    "42 31 c0 ee 42 ee"  # inc %edx; xor %eax, %eax; out %al, %dx; inc %edx; out %al, %dx
    "42 b0 e0 ee"  # inc %edx; mov $0xe0, %al; out %al, %dx    of disk 0
    "42 88 f8 ee"  # inc %edx; mov %bh, %al; out %al, %dx
    "ec 24 88 3c 08 75 f9"  # busy: in %dx, %al; and $0x88, %al; cmp $8, %al; jne busy
    "66 ba f0 01 b9 80 00 00 00"  # mov $0x1f0, %dx; mov $128, %ecx
    "bf 00 10 00 00 89 fe"  # mov $0x1000, %edi; mov %edi, %esi
    "80 ff 20 75 1a f3 6d"  # cmp $0x20, %bh; jne write; rep insl
    "89 f7 b9 80 00 00 00 8d 45 fe"  # mov %esi, %edi; mov $128, %ecx; lea -2(%ebp), %eax
    "85 c0 79 02 31 c0"  # test %eax, %eax; jns compare; xor %eax, %eax
    "f3 af 75 2a"  # compare: repe scasl; jne bad
    "b7 30 eb b1"  # mov $0x30, %bh; jmp sector                 WRITE SECTORS
    "b9 80 00 00 00 89 e8 f3 ab"  # write: mov $128, %ecx; mov %ebp, %eax; rep stosl
    "b9 80 00 00 00 f3 6f"  # mov $128, %ecx; rep outsl
    "66 ba f7 01 ec a8 88 75 fb"  # mov $0x1f7, %dx; there: in %dx, %al; test $0x88, %al; jnz there
    "66 ba f8 03 88 d8 ee"  # done: mov $0x3f8, %dx; mov %bl, %al; out %al, %dx
    "45 e9 4f ff ff ff"  # inc %ebp; jmp pass
    "66 ba f8 03 b0 21 ee"  # bad: mov $0x3f8, %dx; mov $'!', %al; out %al, %dx
    "f4 eb fd 00"  # hlt; jmp there
    "00 00 00 00 00 00 00 00 ff ff 00 00 00 9b cf 00 ff ff 00 00 00 93 cf 00"  # gdt: none, code, data
    "17 00 00 01 0f 00"  # gdtr
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
