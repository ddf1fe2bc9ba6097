#!/usr/bin/env python3
"""symbols.py VMLINUX OUT.json: the symbols of a kernel for volatility3, out of its DWARF, by drgn.

Types are no more than are reached from those to which volatility3 gives classes, which is enough for its plugins
that list tasks, files and modules; dwarf2json writes all of them. The form is volatility3's schema 6.2.0.
"""

import base64
import hashlib
import json
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drgn import Architecture, Platform, Program, Type, TypeKind, sizeof

ROOTS = (
    "task_struct", "file", "hlist_head", "mm_struct", "super_block", "vm_area_struct", "qstr", "dentry",
    "fs_struct", "files_struct", "kobject", "cred", "inode", "idr", "address_space", "page", "module", "vfsmount",
    "mount", "mnt_namespace", "net", "socket", "sock", "inet_sock", "unix_sock", "maple_tree", "kernel_symbol",
)  # fmt: skip
"""Structs to which volatility3 gives classes (framework/symbols/linux/__init__.py, 2.28)."""

VARIABLES = ("init_task", "init_mm", "init_files", "modules", "taint_flags")
"""Those whose type it asks for."""

_BANNER = b"Linux version "

Json = dict[str, Any]


def write_symbols(vmlinux: Path, out: Path) -> None:
    """Write the symbols of a kernel with DWARF."""
    program = Program(Platform(Architecture.X86_64))
    program.extra_module("vmlinux", create=True).try_file(vmlinux, force=True)
    types = _Types(program)
    for name in ROOTS:
        types.need(program.type(f"struct {name}"))
    symbols: dict[str, Json] = {one.name: {"address": one.address} for one in program.symbols() if one.name}
    for name in VARIABLES:
        symbols[name]["type"] = types.describe(program[name].type_)
    banner = _banner(vmlinux)
    character = {"kind": "base", "name": "char"}
    symbols["linux_banner"]["type"] = {"kind": "array", "count": len(banner), "subtype": character}
    symbols["linux_banner"]["constant_data"] = base64.b64encode(banner).decode()
    types.all()
    producer = {"name": "ckptfs examples/symbols.py", "version": "1"}
    document = {
        "metadata": {"format": "6.2.0", "producer": producer, "linux": {"symbols": [], "types": []}},
        "base_types": types.base,
        "user_types": types.user,
        "enums": types.enums,
        "symbols": symbols,
    }
    out.write_text(json.dumps(document))


def _banner(vmlinux: Path) -> bytes:
    """What linux_banner holds, with its end."""
    with vmlinux.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(_BANNER)
        while data[start + len(_BANNER)] == ord("%"):  # the format of another one
            start = data.find(_BANNER, start + 1)
        return data[start : data.find(b"\0", start) + 1]


class _Types:
    """Types by name, as they are needed."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._todo: list[Type] = []
        self.base: dict[str, Json] = {
            "pointer": {"size": 8, "signed": False, "kind": "int", "endian": "little"},
            "void": {"size": 0, "signed": False, "kind": "void", "endian": "little"},
        }
        self.user: dict[str, Json] = {}
        self.enums: dict[str, Json] = {}

    def need(self, kind: Type) -> None:
        """Have a struct or a union described."""
        self._todo.append(kind)

    def all(self) -> None:
        """Describe what is needed, and all that it is made of."""
        while self._todo:
            one = self._todo.pop()
            name = _name(one)
            if name in self.user:
                continue
            if not one.is_complete() and one.tag is not None:
                word = "struct" if one.kind == TypeKind.STRUCT else "union"
                try:
                    one = self._program.type(f"{word} {one.tag}")
                except LookupError:
                    continue
            fields = dict(self._fields(one)) if one.is_complete() else {}
            self.user[name] = {"kind": _kind(one), "size": one.size or 0, "fields": fields}

    def _fields(self, one: Type) -> Iterator[tuple[str, Json]]:
        for index, member in enumerate(one.members or ()):
            described = self.describe(member.type)
            if member.bit_field_size is not None:
                offset = member.bit_offset // (8 * sizeof(member.type)) * sizeof(member.type)
                described = {
                    "kind": "bitfield",
                    "bit_position": member.bit_offset - 8 * offset,
                    "bit_length": member.bit_field_size,
                    "type": described,
                }
            else:
                offset = member.offset
            anonymous = {} if member.name else {"anonymous": True}
            yield member.name or f"unnamed_field_{index}", {"type": described, "offset": offset, **anonymous}

    def describe(self, kind: Type) -> Json:
        """How a field or a variable has it."""
        match kind.kind:
            case TypeKind.TYPEDEF:
                return self.describe(kind.type)
            case TypeKind.POINTER:
                return {"kind": "pointer", "subtype": self.describe(kind.type)}
            case TypeKind.ARRAY:
                return {"kind": "array", "count": kind.length or 0, "subtype": self.describe(kind.type)}
            case TypeKind.FUNCTION:
                return {"kind": "function"}
            case TypeKind.STRUCT | TypeKind.UNION | TypeKind.CLASS:
                self.need(kind)
                return {"kind": _kind(kind), "name": _name(kind)}
            case TypeKind.ENUM if kind.is_complete():
                constants = {one.name: one.value for one in kind.enumerators}
                base = self.describe(kind.type)["name"]
                self.enums[_name(kind)] = {"size": sizeof(kind), "base": base, "constants": constants}
                return {"kind": "enum", "name": _name(kind)}
            case TypeKind.INT | TypeKind.BOOL | TypeKind.FLOAT:
                word = {TypeKind.INT: "int", TypeKind.BOOL: "bool", TypeKind.FLOAT: "float"}[kind.kind]
                signed = kind.kind == TypeKind.INT and kind.is_signed
                self.base[kind.name] = {"size": kind.size, "signed": signed, "kind": word, "endian": "little"}
                return {"kind": "base", "name": kind.name}
        return {"kind": "base", "name": "void"}


def _kind(one: Type) -> str:
    return "union" if one.kind == TypeKind.UNION else "struct"


def _name(one: Type) -> str:
    """Its tag; one without has a name made of what it is."""
    return one.tag or f"unnamed_{hashlib.md5(str(one).encode()).hexdigest()}"


if __name__ == "__main__":
    write_symbols(Path(sys.argv[1]), Path(sys.argv[2]))
