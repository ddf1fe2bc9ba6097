"""Names of RAM blocks as file names, and back.

An idstr may hold anything: slashes (``/rom@etc/acpi/tables``), dots, bytes that are no text at all. As a file
name, ``/``, ``%``, a leading ``.`` and whatever cannot be printed are percent-encoded, byte by byte, with
upper-case digits; all else stays as it is. Different idstrs have different names, and no name leaves its
directory.
"""

import re
from errno import EINVAL, ENAMETOOLONG

from ckptfs.errors import CommandError

NAME_MAX = 255
"""Longest file name in bytes (NAME_MAX of limits.h)."""


def encode_name(idstr: str) -> bytes:
    """The file name of a block; ``idstr`` is text with surrogateescape for bytes that are none.

    Raises CommandError for an empty idstr, and for one whose name would be longer than `NAME_MAX`.
    """
    if not idstr:
        raise CommandError("a RAM block without a name cannot be a file")
    start = 1 if idstr.startswith(".") else 0
    plain = re.sub(r"[%/]|[^\x20-\x7e]", _encoded_unless_printable, idstr[start:])
    name = b"%2E" * start + plain.encode("utf-8", "surrogateescape")
    if len(name) > NAME_MAX:
        raise CommandError(
            f"RAM block name {idstr!r} is {len(name)} bytes as a file name, more than {NAME_MAX}", ENAMETOOLONG
        )
    return name


def decode_name(name: bytes) -> str:
    """The idstr of a file name; raises CommandError unless `encode_name` gives exactly this name for it."""
    data = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), name)
    idstr = data.decode("utf-8", "surrogateescape")
    if encode_name(idstr) != name:
        raise CommandError(f"{name!r} is not how a RAM block's name is encoded: {encode_name(idstr)!r} is", EINVAL)
    return idstr


def _encoded_unless_printable(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable() and character not in "%/":
        return character
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
