"""Whatever a file is, it is read, or refused with words; what stands behind the stream takes nothing from it."""

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfs.errors import CheckpointError
from ckptfs.foreign.content import Content, read_content
from ckptfs.mapped_ram.bitmap import PagesBitmap
from ckptfs.mapped_ram.checkpoint import read_device_state, read_setup
from ckptfs.mapped_ram.layout import frame, image_of, layout
from ckptfs.mapped_ram.trailer import NO_TRAILER, Depends, Entry, Trailer
from tests.doubles.migration_file import Block, BytesSource, Device, MigrationFile

TRAILER = Trailer((Entry("one", b"payload" * 10, Depends.RAM), Entry("two", b"", Depends.NOTHING)))
MAPPED = MigrationFile(blocks=[Block("pc.ram", 16, {0: b"first", 5: b"sixth"})], alignment=4096)
PLAIN = replace(MAPPED, capabilities=())
IGNORED = replace(PLAIN, blocks=[Block("m0", 16, ignored=True), Block("m1", 16)], capabilities=("x-ignore-shared",))

KINDS = pytest.mark.parametrize("file", [MAPPED, PLAIN], ids=["mapped-ram", "plain"])


def read(data: bytes, offset: int = 0) -> Content:
    return read_content(BytesSource(data), offset)


@KINDS
@pytest.mark.parametrize("changes", [{}, {"vmdesc": False}, {"footers": False}, {"stream_offset": 0x1001}], ids=str)
@pytest.mark.parametrize("behind", [b"", b"junk", bytes(5000)], ids=len)
def test_a_trailer_is_found_whatever_the_stream_is_like(
    file: MigrationFile, changes: dict[str, object], behind: bytes
) -> None:
    file = replace(file, **changes)  # type: ignore[arg-type]
    alone = read(file.data(), file.stream_offset)
    found = read(file.data() + TRAILER.encode() + behind, file.stream_offset)
    assert found.checkpoint == alone.checkpoint
    assert (alone.trailer, found.trailer, found.trailer_problem) == (NO_TRAILER, TRAILER, None)
    assert [section.idstr for section in found.checkpoint.sections] == ["timer", "globalstate"]


@KINDS
def test_a_bad_trailer_takes_nothing_from_the_checkpoint(file: MigrationFile) -> None:
    encoded = bytearray(TRAILER.encode())
    encoded[-1] ^= 1
    found = read(file.data() + encoded)
    assert found.checkpoint == read(file.data()).checkpoint
    assert found.trailer == NO_TRAILER
    assert str(found.trailer_problem).endswith("the trailer's entry 'one' is damaged")


def test_the_blocks_that_are_in_the_file() -> None:
    pages = PagesBitmap(16)
    for page in (0, 5):
        pages.set(page, page + 1)
    for file, kind in ((MAPPED, "mapped-ram"), (PLAIN, "precopy")):
        found = read(file.data())
        assert (found.kind, found.file_bmaps) == (kind, {"pc.ram": pages})
    assert read(IGNORED.data()).file_bmaps == {"m1": PagesBitmap(16)}
    # a block of zeros that nobody sent is zeros, unless somebody else has it
    silent = replace(PLAIN, blocks=[Block("pc.ram", 16, ignored=True)])
    assert read(silent.data()).file_bmaps == {"pc.ram": PagesBitmap(16)}


@KINDS
def test_what_is_written_has_the_trailer_behind_it(file: MigrationFile) -> None:
    source = BytesSource(file.data())
    checkpoint = read_content(source).checkpoint
    image = image_of(checkpoint, read_setup(source, checkpoint), read_device_state(source, checkpoint), TRAILER)
    assert layout(image).extents[-1][1].endswith(image.device_state + TRAILER.encode())
    assert frame(image)[1].endswith(image.device_state + TRAILER.encode())
    assert layout(image.configured(("mapped-ram",), None)).extents[-1][1].endswith(TRAILER.encode())


def test_there_is_none_behind_a_state_whose_end_nobody_can_tell() -> None:
    """It would be taken for device state, and there would be one more after each save."""
    odd = Device("odd", (b"\x7e\0\0\0\xc8\4\0\0\3\xe8\4fake" + bytes(8)) * 2 + bytes(300))
    file = replace(MAPPED, devices=[odd, *MAPPED.devices], vmdesc=False)
    source = BytesSource(file.data())
    checkpoint = read_content(source).checkpoint
    assert checkpoint.opaque
    image = image_of(checkpoint, read_setup(source, checkpoint), read_device_state(source, checkpoint), TRAILER)
    assert layout(image).extents[-1][1].endswith(image.device_state)
    assert frame(image)[1].endswith(image.device_state)


WHOLE = {file.capabilities: file.data() + TRAILER.encode() for file in (MAPPED, PLAIN)}


@KINDS
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_is_changed_it_is_read_or_refused(file: MigrationFile, data: st.DataObject) -> None:
    content = bytearray(WHOLE[file.capabilities])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    stop = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    with contextlib.suppress(CheckpointError):
        read(bytes(content[:stop]))
