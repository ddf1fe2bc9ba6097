"""SIZE as QEMU reads it: ``512M``, ``1.5k``, ``0x1000`` (qemu_strtosz in util/cutils.c, 10.0).

Decimal with at most one suffix of ``bBkKmMgGtTpPeE`` (powers of 1024), or hexadecimal without one. A fraction
needs a suffix larger than B. Leading zeros stay decimal. The two ways to fail are QEMU's as well.
"""

import re

from ckptfs.errors import CommandError

KiB = 1 << 10
MiB = 1 << 20
SIZE_MAX = (1 << 64) - 1

INVALID = "Invalid argument"
OUT_OF_RANGE = "Numerical result out of range"

SIZE_RULE = "expects bytes (4096, 0x1000), or a suffix k, M, G, T, P or E (512M, 1.5G)"

_UNITS = {"b": 1, "k": KiB, "m": MiB, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_SPACE = r"[ \t\n\v\f\r]*"
_HEX = re.compile(rf"{_SPACE}\+?0[xX](?P<digits>[0-9a-fA-F]+)")
_DECIMAL = re.compile(
    rf"{_SPACE}\+?(?=\.?[0-9])(?P<digits>[0-9]*)(?P<fraction>\.[0-9]*)?(?P<suffix>[bkmgtpe]?)", re.IGNORECASE
)
_NEGATIVE = re.compile(rf"{_SPACE}-\.?[0-9]+")


def parse_size(text: str, default_unit: int = 1) -> int:
    """Return the bytes that ``text`` means: 0 to 2**64 - 1; ``default_unit`` counts where no suffix is given.

    Raises CommandError, its text being QEMU's strerror alone: "Invalid argument" or "Numerical result out of
    range"; the caller knows what the size was for and says so in front.
    """
    if match := _HEX.fullmatch(text):
        return _in_range(int(match["digits"], 16) * default_unit)
    if match := _DECIMAL.fullmatch(text):
        digits, fraction, suffix = match["digits"].lstrip("0"), match["fraction"] or "", match["suffix"]
        if len(digits) > 20 or int(digits or "0") > SIZE_MAX:
            # strtoull stops at the overflow; what follows then counts as junk.
            raise CommandError(INVALID if fraction or suffix else OUT_OF_RANGE)
        unit = _UNITS[suffix.lower()] if suffix else default_unit
        return _scaled(int(digits or "0"), fraction, unit)
    raise CommandError(OUT_OF_RANGE if _NEGATIVE.fullmatch(text) else INVALID)


def parse_size_of(what: str, text: str) -> int:
    """As `parse_size`, for what is no word of QEMU's: the error names ``what`` and ``text``, and the rule."""
    try:
        return parse_size(text)
    except CommandError as error:
        rule = SIZE_RULE if str(error) == INVALID else "has to be from 0 to less than 16E"
        raise CommandError(f"bad {what} {text!r}: {rule}") from None


def _scaled(whole: int, fraction: str, unit: int) -> int:
    """Whole and fraction (``.5``) times unit, rounded half up from QEMU's 64 fractional bits."""
    parts = 0  # of 2**64
    if fraction.strip(".0"):
        # A double, as strtod gives; a fraction that underflows still is one.
        parts = int(float(fraction) * 2.0**64) or 1
    whole, parts = whole + (parts >> 64), parts & SIZE_MAX
    if unit == 1 and parts:
        raise CommandError(INVALID)
    scaled = parts * unit
    return _in_range(whole * unit + (scaled >> 64) + (scaled >> 63 & 1))


def _in_range(size: int) -> int:
    if size > SIZE_MAX:
        raise CommandError(OUT_OF_RANGE)
    return size


def format_size(length: int) -> str:
    """Return a size for people: in the largest unit that it has one of, exactly where that is a whole number."""
    for unit, value in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", MiB), ("KiB", KiB)):
        if length >= value:
            return f"{length / value:.4g} {unit}" if length % value else f"{length // value} {unit}"
    return f"{length} B"
