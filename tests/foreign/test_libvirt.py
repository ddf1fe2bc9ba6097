"""libvirt's header, byte for byte as it is in qemu_saveimage.h. The real thing is in tests/libvirt."""

import contextlib
import re
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import CheckpointError
from ckptfs.foreign.content import read_content
from ckptfs.foreign.libvirt import FORMATS, Domain, SaveImage, read_save_image
from ckptfs.mapped_ram.checkpoint import read_device_state
from ckptfs.mapped_ram.trailer import Depends, Entry, Trailer
from tests.doubles.migration_file import BytesSource, MigrationFile

XML, COOKIE = "<domain>\n  <name>vm ä</name>\n</domain>\n", "<cookie/>\n"
STREAMS = {"mapped-ram": MigrationFile(alignment=4096), "precopy": MigrationFile(capabilities=())}


def header(number: int = 0, *, order: str = "<", running: int = 1, cookie: bool = True) -> bytes:
    """All before the stream, as libvirt 11.3 writes it, with little padding."""
    texts = XML.encode() + b"\0"
    at = len(texts) if cookie else 0
    texts += COOKIE.encode() + b"\0" if cookie else b""
    data = texts + bytes(100)
    return b"LibvirtQemudSave" + struct.pack(f"{order}5I", 2, len(data), running, number, at) + bytes(56) + data


def image(kind: str, **how: int | str | bool) -> bytes:
    head = header(**how)  # type: ignore[arg-type]
    return head + replace(STREAMS[kind], stream_offset=len(head)).data()[len(head) :]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", STREAMS)
def test_what_is_there_counts_and_not_what_the_header_says(kind: str, order: str) -> None:
    for number, name in enumerate(FORMATS):
        content = read_content(BytesSource(image(kind, number=number, order=order)))
        assert content.kind == kind
        assert content.image == SaveImage(Domain(XML, COOKIE), True, name, len(header()))
        assert content.checkpoint.stream_offset == len(header())
        assert Domain.of(content.trailer) == Domain(XML, COOKIE)
        assert Domain(XML).name == "vm ä"


@pytest.mark.parametrize("kind", STREAMS)
def test_the_run_state_is_the_header_s(kind: str) -> None:
    states = {}
    for running, state in ((1, "running"), (0, "paused")):
        source = BytesSource(image(kind, running=running))
        checkpoint = read_content(source).checkpoint
        assert checkpoint.run_state == state
        states[state] = read_device_state(source, checkpoint)
    assert b"running\0" in states["running"]
    assert states["running"].replace(b"\0\0\0\x08running\0", b"\0\0\0\x07paused\0\0") == states["paused"]


def test_one_without_a_cookie() -> None:
    content = read_content(BytesSource(image("precopy", cookie=False)))
    assert Domain.of(content.trailer) == Domain(XML, None)


@pytest.mark.parametrize("domain", [Domain(XML), Domain(XML, COOKIE), Domain("no xml", "")], ids=repr)
@pytest.mark.parametrize("mapped", [True, False])
def test_a_head_of_ours_is_read_as_it_was_meant(domain: Domain, mapped: bool) -> None:
    head = domain.head(was_running=False, mapped_ram=mapped)
    found = read_save_image(BytesSource(head + b"QEVM"))
    assert found == SaveImage(domain, False, "sparse" if mapped else "raw", len(head))
    assert len(head) == len(domain.head(was_running=True, mapped_ram=not mapped))


def test_a_domain_on_a_mount() -> None:
    qemu = "http://libvirt.org/schemas/domain/qemu/1.0"
    arguments = "".join(f"<qemu:arg value='{word}'/>" for word in ("-S", "-incoming", "file:/x", "-qmp"))
    xml = f"<domain xmlns:qemu='{qemu}'><name>vm</name><qemu:commandline>{arguments}</qemu:commandline></domain>"
    found = Domain(xml, COOKIE).settled()
    assert found.cookie == COOKIE
    assert re.findall('value="([^"]*)"', found.xml) == ["-S", "-qmp"]
    assert Domain(XML).settled() == Domain(XML)
    moved = found.on_mount("/mnt/a&b")
    assert moved.on_mount("/mnt/a&b") == moved
    assert '<memoryBacking><source type="file" /><access mode="shared" /></memoryBacking>' in moved.xml
    assert '<ckptfs:mount path="/mnt/a&amp;b" />' in moved.xml
    assert (moved.name, Domain("no xml").on_mount("/mnt")) == ("vm", Domain("no xml"))


def test_a_trailer_remembers_the_domain() -> None:
    trailer = Trailer((Domain(XML, COOKIE).entry(),)).after(Depends.RAM | Depends.DEVICE_STATE)
    assert Domain.of(trailer) == Domain(XML, COOKIE)
    for payload in (b"", b"[]", b"{}", b'{"xml": 1, "cookie": null}', b'{"xml": "a\\u0000", "cookie": null}'):
        assert Domain.of(Trailer((Entry(Domain.ENTRY, payload),))) is None


@pytest.mark.parametrize(
    ("number", "command"),
    [(1, "gzip -dc"), (2, "bzip2 -dc"), (3, "xz -dc"), (4, "lzop -dc"), (5, "zstd -dc"), (77, None)],
)
def test_a_packed_one_is_refused_with_what_unpacks_it(number: int, command: str | None) -> None:
    head = header(number)
    with pytest.raises(CheckpointError, match="Not a migration stream: this is a save image of libvirt") as caught:
        read_content(BytesSource(head + b"\x1f\x8b" * 50))
    assert (f"(head -c {len(head)} FILE; tail -c +{len(head) + 1} FILE | {command})" in str(caught.value)) == bool(
        command
    )


def test_what_is_no_image_is_refused() -> None:
    whole = image("precopy")
    for data, words in (
        (b"LibvirtQemudPart" + whole[16:], "has not finished"),
        (whole[:90], "cut short"),
        (whole[:120], "cut short"),
        (header(), "holds something else"),
        (whole[:16] + b"\3" + whole[17:], "of version 3"),
        (whole[:20] + b"\xff" * 4 + whole[24:], "of XML"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_content(BytesSource(data))


@given(st.binary(max_size=200), st.integers(0, 150))
def test_nothing_but_our_own_errors(data: bytes, at: int) -> None:
    whole = bytearray(header())
    whole[at : at + len(data)] = data
    with contextlib.suppress(CheckpointError):
        read_save_image(BytesSource(bytes(whole)))
