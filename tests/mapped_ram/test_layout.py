"""What is laid out is read back the same, wherever it is put."""

import json
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.checkpoint import read_checkpoint, read_device_state, read_setup
from ckptfs.mapped_ram.layout import empty_image, frame, image_of, layout
from ckptfs.mapped_ram.precopy import read_precopy
from ckptfs.mapped_ram.vmdesc import with_configuration
from tests.doubles.migration_file import Block, BytesSource, Device, MigrationFile


def metadata(result):
    """A file of the layout's extents alone."""
    data = bytearray(result.end_offset)
    for file_offset, extent in result.extents:
        data[file_offset : file_offset + len(extent)] = extent
    return BytesSource(bytes(data))


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60)
blocks = st.lists(
    st.tuples(names, st.integers(0, 20).map(lambda count: count * 4096)), max_size=5, unique_by=lambda b: b[0]
)
files = st.builds(
    MigrationFile,
    blocks=blocks.map(lambda blocks: [Block(idstr, length // 4096) for idstr, length in blocks if length]),
    devices=st.lists(st.builds(Device, st.text("abc/", min_size=1), st.binary()), max_size=4),
    setup_devices=st.lists(st.builds(Device, st.text("def/", min_size=1), st.binary()), max_size=2),
    machine=names,
    uuid=st.none() | st.binary(min_size=16, max_size=16),
    target_page_bits=st.none() | st.just(12),
    footers=st.booleans(),
    alignment=st.sampled_from([4096, 1 << 20]),
    stream_offset=st.sampled_from([0, 1, 4097]),
    switchover_start=st.just(False),
    ram_section_id=st.sampled_from([1, 2, 99]),
)  # fmt: skip


@given(files)
def test_a_layout_of_what_was_read_has_the_same_bytes(description):
    data, _ = description.build()
    source = BytesSource(data)
    checkpoint, _ = read_checkpoint(source, description.stream_offset)
    image = image_of(checkpoint, read_setup(source, checkpoint), read_device_state(source, checkpoint))
    result = layout(image, description.stream_offset, description.alignment)
    assert metadata(result).pread(0, result.end_offset) == data
    assert result.blocks == checkpoint.blocks


@given(
    blocks, st.sampled_from([0, 1, 4096, 0x1001]), st.sampled_from([4096, 16384]), st.sampled_from([16384, 1 << 20])
)
def test_an_empty_image_is_a_checkpoint_of_ram_alone(blocks, stream_offset, page_size, alignment):
    blocks = [(idstr, length * page_size // 4096) for idstr, length in blocks if length]
    result = layout(empty_image(blocks, page_size), stream_offset, alignment)
    checkpoint, bitmaps = read_checkpoint(metadata(result), stream_offset)
    assert checkpoint.blocks == result.blocks
    assert [(block.idstr, block.used_length) for block in checkpoint.blocks] == blocks
    assert all(block.pages_offset % alignment == 0 for block in checkpoint.blocks)
    assert checkpoint.end_offset == result.end_offset
    assert not checkpoint.has_device_state
    assert checkpoint.vmdesc["devices"] == []
    assert checkpoint.page_size == page_size
    assert all(bitmap.count() == 0 for bitmap in bitmaps.values())


def test_pages_lie_where_qemu_puts_them():
    result = layout(empty_image([("pc.ram", 4096 * 3), ("vga.vram", 4096)]), 0x1001)
    assert [block.pages_offset for block in result.blocks] == [1 << 20, 2 << 20]


def test_the_header_is_the_first_extent():
    result = layout(empty_image([("pc.ram", 4096)]), 4096)
    file_offset, data = result.header
    assert file_offset == 4096
    assert data.startswith(b"QEVM")
    source = metadata(result)
    unfinished = source.pread(0, 4096) + bytes(len(data)) + source.pread(4096 + len(data), result.end_offset)
    with pytest.raises(CheckpointError, match="unfinished save"):
        read_checkpoint(BytesSource(unfinished), 4096)


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (("", 4096), "1 to 255 bytes"),
        (("x" * 256, 4096), "1 to 255 bytes"),
        (("a\0b", 4096), "NUL"),
        (("x", 1), "multiple"),
        (("x", 0), "no pages"),
    ],
)
def test_blocks_that_no_file_can_hold_are_refused(block, text):
    with pytest.raises(CheckpointError, match=text):
        empty_image([block])


def test_only_the_vmdesc_changes_when_capabilities_do():
    description = MigrationFile(capabilities=["x-ignore-shared", "mapped-ram"], switchover_start=False)
    source = BytesSource(description.data())
    checkpoint, _ = read_checkpoint(source)
    device_state = read_device_state(source, checkpoint)
    image = image_of(checkpoint, b"", device_state).configured(("mapped-ram",), checkpoint.uuid)
    sections = checkpoint.vmdesc_offset - checkpoint.device_state_offset
    assert image.device_state[:sections] == device_state[:sections]
    composed, _ = read_checkpoint(metadata(layout(image)))
    assert composed.capabilities == ("mapped-ram",)
    assert composed.vmdesc["devices"] == checkpoint.vmdesc["devices"]
    assert composed.vmdesc["configuration"]["subsections"][0]["vmsd_name"] == "configuration/capabilities"


SHARED = MigrationFile(
    blocks=[
        Block("m0", 16, address=0, ignored=True),
        Block("m1", 8, address=0x10000, ignored=True),
        Block("vga.vram", 4, address=0xFD000000),
    ],
    capabilities=["x-ignore-shared", "mapped-ram"],
    switchover_start=False,
)


def test_an_ignored_block_has_a_header_and_no_pages():
    """As the double writes it, which knows the form from QEMU's development tree."""
    data, marks = SHARED.build()
    source = BytesSource(data)
    checkpoint, bitmaps = read_checkpoint(source)
    assert bitmaps.keys() == {"vga.vram"}
    image = image_of(checkpoint, b"", read_device_state(source, checkpoint))
    result = layout(image)
    assert metadata(result).pread(0, result.end_offset) == data
    assert result.blocks == checkpoint.blocks
    complete = layout(image.configured(("mapped-ram",), None))
    assert not any(block.ignored or block.pages_offset is None for block in complete.blocks)
    assert marks["m1.pages_offset"] < 0x1000


def test_a_plain_stream_becomes_one_with_mapped_ram_and_back():
    plain = replace(SHARED, capabilities=["x-ignore-shared"], blocks=[replace(b, pages={}) for b in SHARED.blocks])
    source = BytesSource(plain.data())
    checkpoint = read_precopy(source).checkpoint
    image = image_of(checkpoint, b"", read_device_state(source, checkpoint))
    both = image.configured(("x-ignore-shared", "mapped-ram"), None, {"m0", "m1"})
    end = SHARED.build()[1]["part.0"]
    assert metadata(layout(both)).pread(0, end) == SHARED.data()[:end]
    again = both.configured(("x-ignore-shared",), None, {"m0", "m1"})
    assert frame(again)[0] == frame(image)[0]


@given(files)
def test_the_frame_of_a_plain_stream_is_what_surrounds_its_records(description):
    description = replace(description, capabilities=[])
    data, marks = description.build()
    source = BytesSource(data)
    stream = read_precopy(source, description.stream_offset)
    image = image_of(stream.checkpoint, read_setup(source, stream.checkpoint), b"the rest")
    before, after = frame(image)
    assert data[description.stream_offset :].startswith(before)
    assert data[marks["part.0.eos"] : marks["device_state"]] + b"the rest" == after


UUID_BYTES = bytes(range(16))


@pytest.mark.parametrize("before", [None, UUID_BYTES])
@pytest.mark.parametrize("after", [None, UUID_BYTES, bytes(16)])
def test_the_uuid_can_be_kept_dropped_and_changed(before, after):
    description = MigrationFile(uuid=before, target_page_bits=12, switchover_start=False)
    source = BytesSource(description.data())
    checkpoint, _ = read_checkpoint(source)
    assert checkpoint.uuid == (None if before is None else UUID(bytes=before))
    image = image_of(checkpoint, b"", read_device_state(source, checkpoint))
    image = image.configured(("mapped-ram",), None if after is None else UUID(bytes=after))
    result = layout(image)
    start = result.blocks[0].header_offset
    expected = replace(description, uuid=after).data()
    assert metadata(result).pread(0, start) == expected[:start]
    if before == after:
        assert image.device_state == read_device_state(source, checkpoint)


def test_other_subsections_keep_their_place_in_the_vmdesc():
    names = [f"configuration/{name}" for name in ("target-page-bits", "capabilities", "uuid", "else")]
    configuration = {"subsections": [1, *({"vmsd_name": name} for name in names)]}
    cases = [
        ((), False, names[:1]),
        ((), True, [names[0], names[2]]),
        (("mapped-ram",), False, names[:2]),
        (("mapped-ram",), True, names[:3]),
    ]
    for capabilities, has_uuid, expected in cases:
        description = {"configuration": configuration, "devices": []}
        section = with_configuration(description, "pc", capabilities, has_uuid=has_uuid)
        described = json.loads(section[5:])["configuration"]
        assert [subsection["vmsd_name"] for subsection in described["subsections"]] == expected


def test_a_vmdesc_without_configuration_is_only_copied():
    description = MigrationFile(capabilities=["x-ignore-shared", "mapped-ram"])
    data = description.data().replace(b'"configuration": {}', b'"configuratiom": {}')
    checkpoint, _ = read_checkpoint(BytesSource(data))
    device_state = read_device_state(BytesSource(data), checkpoint)
    image = image_of(checkpoint, b"", device_state).configured(("mapped-ram",), None)
    assert image.device_state == device_state


def test_a_huge_layout_costs_nothing():
    result = layout(empty_image([("pc.ram", 1 << 46)]))
    assert result.end_offset > 1 << 46
    assert sum(len(extent) for _, extent in result.extents) < 2000
    assert replace(result.blocks[0], used_length=0).page_count == 0
