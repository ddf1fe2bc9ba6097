"""File names of RAM blocks: reversible, printable, inside their directory."""

from errno import ENAMETOOLONG

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import CommandError
from ckptfs.namespace.names import NAME_MAX, decode_name, encode_name


@pytest.mark.parametrize(
    ("idstr", "name"),
    [
        ("pc.ram", b"pc.ram"),
        ("/rom@etc/acpi/tables", b"%2From@etc%2Facpi%2Ftables"),
        ("0000:00:02.0/vga.vram", b"0000:00:02.0%2Fvga.vram"),
        (".", b"%2E"),
        ("..", b"%2E."),
        ("../../x", b"%2E.%2F..%2Fx"),
        (".hidden", b"%2Ehidden"),
        ("100%", b"100%25"),
        ("%2F", b"%252F"),
        ("a b", b"a b"),
        ("bücher", "bücher".encode()),
        ("a\0\n\x7f", b"a%00%0A%7F"),
        ("a\x85\u2028", b"a%C2%85%E2%80%A8"),
        ("a\udcff", b"a%FF"),
    ],
)
def test_a_name(idstr: str, name: bytes) -> None:
    assert encode_name(idstr) == name
    assert decode_name(name) == idstr


@given(st.binary(min_size=1, max_size=255))
def test_any_idstr_is_a_safe_name_and_read_back(data: bytes) -> None:
    idstr = data.decode("utf-8", "surrogateescape")
    try:
        name = encode_name(idstr)
    except CommandError as error:
        assert error.errno == ENAMETOOLONG  # noqa: PT017 either way is right
        return
    assert decode_name(name) == idstr
    assert len(name) <= NAME_MAX
    assert b"/" not in name
    assert not name.startswith(b".")
    assert name.decode().isprintable()


@given(st.binary(max_size=NAME_MAX))
def test_any_name_is_the_one_of_its_idstr_or_refused(name: bytes) -> None:
    try:
        idstr = decode_name(name)
    except CommandError:
        return
    assert encode_name(idstr) == name


@pytest.mark.parametrize("name", [b"", b".x", b"a%", b"a%2f", b"a%41", b"a%GG", b"a\xff", b"a\n", b"a/b"])
def test_a_name_that_no_idstr_has(name: bytes) -> None:
    with pytest.raises(CommandError):
        decode_name(name)


def test_too_long_a_name_says_so() -> None:
    assert len(encode_name("a" * NAME_MAX)) == NAME_MAX
    with pytest.raises(CommandError, match="258 bytes as a file name, more than 255") as caught:
        encode_name("/" * 86)
    assert caught.value.errno == ENAMETOOLONG


def test_an_empty_idstr_is_refused() -> None:
    with pytest.raises(CommandError):
        encode_name("")
