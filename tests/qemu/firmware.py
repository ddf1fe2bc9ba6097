"""A guest without an operating system: a ROM of our own that fills memory, verifies it, and says so.

Pass N fills 128 KiB from 64 KiB on with the 16-bit number N, reads them back, and prints "." on the serial line, or
"X" if a word is wrong. It runs in real mode, without interrupts, and needs nothing but RAM and a port: so it runs
wherever KVM or TCG run at all.
"""

import struct
from pathlib import Path

import numpy as np

START, LENGTH = 0x10000, 0x20000
"""The memory that it fills."""


def write_rom(path: Path) -> Path:
    """Write the ROM to `path`; it goes to QEMU as -bios."""
    code = _assembled()
    rom = bytearray(b"\xf4" * 0x10000)  # hlt
    rom[: len(code)] = code
    rom[0xFFF0:0xFFF5] = bytes.fromhex("ea000000f0")  # the first instruction: ljmp 0xf000:0
    path.write_bytes(rom)
    return path


def assert_one_step(ram: bytes) -> None:
    """See that its memory is of one moment: pass N up to some word, and the pass before from there on."""
    words = np.frombuffer(ram[START : START + LENGTH], "<u2")
    step = int((words != words[0]).argmax()) or words.size
    assert (words[:step] == words[0]).all()
    assert (words[step:] == words[0] - 1).all(), (words[0], step)


def _assembled() -> bytes:
    """Labels and jumps are put in here, everything else is as the processor has it."""
    program: list[str | tuple[int, str]] = [
        "31c0 8ed0 bc0010 fc",  # xor ax,ax; mov ss,ax; mov sp,0x1000; cld
        "bb0100",  # mov bx,1
        "pass:",
        "ba0010",  # mov dx,0x1000
        "fill:",
        "8ec2 31ff b90080 89d8 f3ab",  # mov es,dx; xor di,di; mov cx,0x8000; mov ax,bx; rep stosw
        "81c20010 81fa0030",  # add dx,0x1000; cmp dx,0x3000
        (0x75, "fill"),  # jne
        "ba0010",
        "verify:",
        "8ec2 31ff b90080 89d8 f3af",  # ...; repe scasw
        (0x75, "bad"),
        "81c20010 81fa0030",
        (0x75, "verify"),
        "b02e baf803 ee",  # mov al,'.'; mov dx,0x3f8; out dx,al
        "43",  # inc bx
        (0xEB, "pass"),  # jmp
        "bad:",
        "b058 baf803 ee f4",  # mov al,'X'; ...; hlt
    ]
    code = bytearray()
    labels: dict[str, int] = {}
    jumps = []
    for part in program:
        if isinstance(part, tuple):
            code += bytes([part[0], 0])
            jumps.append((len(code), part[1]))
        elif part.endswith(":"):
            labels[part[:-1]] = len(code)
        else:
            code += bytes.fromhex(part)
    for behind, label in jumps:
        code[behind - 1 : behind] = struct.pack("<b", labels[label] - behind)
    return bytes(code)
