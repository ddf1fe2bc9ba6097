"""Plain streams: what QEMU could send, read back; what ckptfs writes, read back; broken ones refused."""

import contextlib
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.checkpoint import read_checkpoint, read_device_state, read_setup
from ckptfs.mapped_ram.precopy import MAX_INDEXED_LENGTH, read_precopy, vmstate_stream
from tests.doubles.migration_file import Block, BytesSource, Device, MigrationFile

PLAIN = MigrationFile(
    blocks=[Block("pc.ram", 70, {0: b"first", 1: b"second", 69: b"last"}), Block("vga.vram", 3, {1: b"x"})],
    capabilities=[],
    part_count=2,
)
PAGE, ZERO, CONTINUE, EOS = 0x08, 0x02, 0x20, 0x10


def content(number):
    """A page that tells its number."""
    return struct.pack(">Q", number) * 512


def named(idstr):
    return bytes([len(idstr)]) + idstr.encode()


def read(data, stream_offset=0):
    source = BytesSource(data)
    return read_precopy(source, stream_offset), source


def pages_of(stream, source, idstr):
    return stream.read_pages(source, idstr, 0, stream.page_offsets[idstr].size).tobytes()


def with_records(*parts, blocks=PLAIN.blocks):
    """PLAIN, with these bytes as the records of a PART each, the last of the END."""
    data, marks = replace(PLAIN, blocks=[replace(b, pages={}) for b in blocks], part_count=1).build()
    sections = b"".join(
        struct.pack(">BI", 3 if i == len(parts) - 1 else 2, 1) + part + struct.pack(">QBI", EOS, 0x7E, 1)
        for i, part in enumerate(parts)
    )
    return data[: marks["command"]] + sections + data[marks["device_state"] :]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stream_offset": 4097},
        {"footers": False},
        {"vmdesc": False},
        {"setup_devices": [Device("early", b"early")]},
        {"uuid": bytes(16)},
        {"capabilities": ["x-ignore-shared"]},
    ],
)
def test_every_kind_of_stream(changes):
    description = replace(PLAIN, **changes)
    data = description.data()
    stream, source = read(data, description.stream_offset)
    checkpoint = stream.checkpoint
    assert [section.idstr for section in checkpoint.sections] == ["timer", "globalstate"]
    assert checkpoint.run_state == "paused"
    assert checkpoint.end_offset == len(data)
    assert read_device_state(source, checkpoint) == data[checkpoint.device_state_offset :]
    assert list(stream.file_bmap("pc.ram").runs()) == [(0, 2), (69, 70)]
    expected = (
        b"first".ljust(4096, b"\0") + b"second".ljust(4096, b"\0") + bytes(67 * 4096) + b"last".ljust(4096, b"\0")
    )
    assert pages_of(stream, source, "pc.ram") == expected
    assert stream.read_pages(source, "vga.vram", 1, 2).tobytes() == b"x".ljust(4096, b"\0")
    assert stream.read_pages(source, "vga.vram", 1, 1).shape == (0, 4096)


def test_an_ignored_block_has_no_records():
    blocks = [Block("m0", 8, ignored=True), Block("vga.vram", 2)]
    stream, _ = read(replace(PLAIN, blocks=blocks, capabilities=["x-ignore-shared"]).data())
    assert stream.page_offsets.keys() == {"vga.vram"}
    assert [block.address for block in stream.checkpoint.blocks] == [0, 0]


def test_the_host_page_size_of_huge_pages_is_passed_over():
    blocks = [Block("pc.ram", 512, {511: b"x"}, host_page_size=2 << 20), Block("vga.vram", 1)]
    stream, _ = read(replace(PLAIN, blocks=blocks).data())
    assert list(stream.file_bmap("pc.ram").runs()) == [(511, 512)]
    stream, _ = read(replace(PLAIN, blocks=blocks[::-1]).data())
    assert list(stream.file_bmap("pc.ram").runs()) == [(511, 512)]


records = st.lists(
    st.tuples(
        st.sampled_from([("pc.ram", 70), ("vga.vram", 3)]),
        st.booleans(),  # of zeros
        st.integers(0, 69),  # first page
        st.integers(1, 40),  # how many
        st.sampled_from([1, -1, 0]),  # forwards, backwards, the same page again and again
        st.booleans(),  # the next section begins after it
    ),
    max_size=12,
)


@given(records)
def test_the_newest_record_of_a_page_counts(stretches):
    parts, part = [], b""
    expected: dict[str, dict[int, bytes]] = {}
    number, previous = 0, None
    for (idstr, page_count), is_zero, first, count, step, is_last in stretches:
        for i in range(count):
            page = (first + i * step) % page_count
            number += 1
            flags = CONTINUE if previous == idstr else 0
            name = b"" if previous == idstr else named(idstr)
            previous = idstr
            if is_zero:
                part += struct.pack(">Q", page * 4096 | ZERO | flags) + name + b"\0"
                expected.setdefault(idstr, {})[page] = bytes(4096)
            else:
                part += struct.pack(">Q", page * 4096 | PAGE | flags) + name + content(number)
                expected.setdefault(idstr, {})[page] = content(number)
        if is_last:
            parts.append(part)
            part = b""
    stream, source = read(with_records(*parts, part))
    assert stream.page_offsets.keys() == expected.keys()
    for idstr, pages in expected.items():
        page_count = {"pc.ram": 70, "vga.vram": 3}[idstr]
        whole = b"".join(pages.get(page, bytes(4096)) for page in range(page_count))
        assert pages_of(stream, source, idstr) == whole
        assert stream.file_bmap(idstr).count() == sum(any(page) for page in pages.values())


def test_long_stretches_of_pages_and_zeros():
    page_count = 20_000
    numbers = np.arange(page_count, dtype=">u8")
    words = numbers << 12 | PAGE | CONTINUE
    record = np.zeros((page_count, 4104), np.uint8)
    record[:, :8] = words.astype(">u8").view(np.uint8).reshape(-1, 8)
    record[:, 8:16] = numbers.view(np.uint8).reshape(-1, 8)
    zeros = np.zeros((page_count, 9), np.uint8)
    zeros[:, :8] = (words ^ PAGE ^ ZERO).astype(">u8").view(np.uint8).reshape(-1, 8)
    named_first = struct.pack(">Q", 5 << 12 | ZERO) + named("pc.ram") + b"\0"
    data = with_records(
        named_first + zeros.tobytes() + record.tobytes(),
        zeros[100:200].tobytes(),
        blocks=[Block("pc.ram", page_count)],
    )
    stream, source = read(data)
    assert list(stream.file_bmap("pc.ram").runs()) == [(0, 100), (200, page_count)]
    pages = stream.read_pages(source, "pc.ram", 0, page_count)
    expected = numbers.astype(np.uint64)
    expected[100:200] = 0
    assert (pages[:, :8].copy().view(">u8")[:, 0] == expected).all()
    assert not pages[:, 8:].any()


WORD = struct.Struct(">Q").pack


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (WORD(PAGE | CONTINUE) + bytes(4096), "names no block"),
        (WORD(ZERO) + named("nosuch") + b"\0", "'nosuch', which is not in the list"),
        (WORD(70 * 4096 | ZERO) + named("pc.ram") + b"\0", "outside of RAM block 'pc.ram'"),
        (WORD((1 << 64) - 4096 | ZERO) + named("pc.ram") + b"\0", "outside of RAM block 'pc.ram'"),
        (WORD(ZERO) + named("pc.ram") + b"\0" + (WORD(70 * 4096 | ZERO | CONTINUE) + b"\0") * 20, "outside of"),
        (WORD(ZERO) + named("pc.ram") + b"\1", "page of zeros"),
        (WORD(ZERO) + named("pc.ram") + b"\0" + WORD(ZERO | CONTINUE) + b"\1", "page of zeros"),
        (WORD(0x40) + named("pc.ram"), "Unexpected RAM flags 0x40"),
        (WORD(0x200), "Unexpected RAM flags 0x200"),
        (WORD(4096 | EOS), "Unexpected RAM flags 0x10"),
        (WORD(0), "Unexpected RAM flags 0x0"),
    ],
)
def test_broken_records_are_refused(part, text):
    with pytest.raises(CheckpointError, match=text) as caught:
        read(with_records(part))
    assert caught.value.file_offset is not None


def test_sections_of_another_id_are_refused():
    data, marks = PLAIN.build()
    for mark, text in [("part.0", "section id 9 was not started"), ("part.0.footer", "another section id")]:
        broken = data[: marks[mark] + 1] + struct.pack(">I", 9) + data[marks[mark] + 5 :]
        with pytest.raises(CheckpointError, match=text):
            read(broken)


def test_only_the_ram_section_may_go_on():
    data, marks = PLAIN.build()
    with pytest.raises(CheckpointError, match="'timer' is not supported"):
        read(data[: marks["part.0"]] + b"\1" + data[marks["timer"] + 1 :])


def test_a_mapped_ram_stream_is_refused():
    with pytest.raises(CheckpointError, match="mapped-ram stream, not a plain one"):
        read(MigrationFile().data())


def test_a_block_too_large_for_an_index_is_refused():
    data, marks = replace(PLAIN, blocks=[Block("pc.ram", 1)]).build()
    length = MAX_INDEXED_LENGTH + 4096
    data = bytearray(data)
    data[marks["total"] : marks["total"] + 8] = struct.pack(">Q", length | 4)
    data[marks["pc.ram.used_length"] : marks["pc.ram.used_length"] + 8] = struct.pack(">Q", length)
    with pytest.raises(CheckpointError, match="too many for a plain stream"):
        read(bytes(data))


def test_a_stream_cut_short_is_refused():
    data, marks = replace(PLAIN, setup_devices=[Device("early", b"early")]).build()
    pages = [marks["pc.ram.record.0"], marks["pc.ram.record.1"], marks["pc.ram.record.2"]]
    stops = [*range(pages[0] + 30), *range(pages[1], pages[1] + 20), *range(pages[2], pages[2] + 100)]
    for stop in [
        *stops,
        *range(stops[-1], marks["device_state"], 511),
        *range(marks["device_state"], marks["eof"] + 1),
    ]:
        with pytest.raises(CheckpointError):
            read(data[:stop])


def test_trailing_data_is_no_part_of_the_stream():
    data = PLAIN.data()
    stream, _ = read(data + b"garbage")
    assert stream.checkpoint.end_offset == len(data)


def test_pages_of_a_file_that_has_shrunk_are_refused():
    data, marks = PLAIN.build()
    stream, _ = read(data)
    with pytest.raises(CheckpointError, match="cut short"):
        stream.read_pages(BytesSource(data[: marks["pc.ram.page.1"] + 9]), "pc.ram", 0, 2)


@pytest.mark.parametrize(
    ("vmdesc", "behind"),
    [(True, bytes(9 << 20)), (True, PLAIN.data()), (False, bytes(9 << 20))],
    ids=["zeros", "a stream", "no vmdesc"],
)
def test_early_sections_whatever_follows_the_stream(vmdesc, behind):
    """Their ends are told from the front: by the first footer, and then by the vmdesc behind RAM."""
    looks_like_more = b"\x7e" + (100).to_bytes(4) + b"\2\0\0\0\1"
    file = replace(
        PLAIN,
        setup_devices=[Device("early", b"early"), Device("other", b"\x7e\0\0\0\x65 and more")],
        blocks=[Block("pc.ram", 16, {0: looks_like_more * 100})],
        vmdesc=vmdesc,
    )
    data = file.data()
    checkpoint = read_precopy(BytesSource(data + behind)).checkpoint
    assert [section.idstr for section in checkpoint.setup_sections] == ["early", "other"]
    assert checkpoint.end_offset == len(data)


FUZZED, MARKS = replace(PLAIN, setup_devices=[Device("early", b"early")]).build()
PAGES = [
    range(offset, offset + 4096) for name, offset in MARKS.items() if name in ("pc.ram.page.1", "vga.vram.page.1")
]
METADATA = [i for i in range(MARKS["pc.ram.page.0"] + 4096, len(FUZZED)) if not any(i in page for page in PAGES)]
METADATA += range(MARKS["pc.ram.page.0"])


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(METADATA), st.integers(0, 255)), min_size=1, max_size=6),
    st.sampled_from([None, *METADATA]),
)
def test_a_mutated_stream_is_read_or_refused(changes, stop):
    data = bytearray(FUZZED)
    for file_offset, value in changes:
        data[file_offset] = value
    with contextlib.suppress(CheckpointError):
        stream, source = read(bytes(data[:stop]))
        for idstr in stream.page_offsets:
            pages_of(stream, source, idstr)


# --- writing ----------------------------------------------------------------------------------------------

MAPPED = replace(PLAIN, capabilities=["mapped-ram"], setup_devices=[Device("early", b"early")])


def vmstate_of(description, left_out, pages):
    source = BytesSource(description.data())
    checkpoint, _ = read_checkpoint(source)
    setup, device_state = read_setup(source, checkpoint), read_device_state(source, checkpoint)
    return checkpoint, device_state, vmstate_stream(checkpoint, left_out, pages, setup, device_state)


@given(
    st.lists(st.tuples(st.integers(0, 69), st.integers(1, 30)), max_size=5), st.sampled_from([set(), {"vga.vram"}])
)
def test_a_vmstate_stream_holds_what_was_put_in(runs, left_out):
    ram = bytearray(70 * 4096)
    pages = []
    for start, count in runs:
        stop = min(start + count, 70)
        data = b"".join(content(1 + page) for page in range(start, stop))
        pages.append(("pc.ram", start, data))
        ram[start * 4096 : stop * 4096] = data
    checkpoint, device_state, data = vmstate_of(MAPPED, left_out, pages)
    stream, source = read(data)
    assert stream.page_offsets.keys() == {"pc.ram", "vga.vram"} - left_out
    assert pages_of(stream, source, "pc.ram") == ram
    written = stream.checkpoint
    assert (written.machine, written.capabilities, written.subsections) == (
        checkpoint.machine,
        (),
        checkpoint.subsections,
    )
    assert [(b.idstr, b.used_length) for b in written.blocks] == [
        (b.idstr, b.used_length) for b in checkpoint.blocks
    ]
    assert [section.idstr for section in written.setup_sections] == ["early"]
    sections = checkpoint.vmdesc_offset - checkpoint.device_state_offset
    assert read_device_state(source, written)[:sections] == device_state[:sections]
    assert written.vmdesc["devices"] == checkpoint.vmdesc["devices"]


def test_a_block_sent_whole_needs_no_zeros():
    _, _, data = vmstate_of(MAPPED, {"pc.ram"}, [("vga.vram", 0, content(1) + content(2) + content(3))])
    stream, source = read(data)
    assert pages_of(stream, source, "vga.vram") == content(1) + content(2) + content(3)


def test_every_page_of_a_block_that_travels_inside_has_a_record():
    _, _, data = vmstate_of(MAPPED, {"pc.ram"}, [("vga.vram", 1, content(7))])
    expected = struct.pack(">Q", 0x1000 | PAGE) + named("vga.vram") + content(7)
    expected += struct.pack(">Q", ZERO) + named("vga.vram") + b"\0"
    expected += struct.pack(">Q", 0x2000 | ZERO | CONTINUE) + b"\0" + struct.pack(">Q", EOS)
    assert expected in data


def test_a_stream_with_nothing_left_out_is_the_one_that_was_read():
    pages = [("pc.ram", 0, content(1)), ("pc.ram", 69, content(2)), ("vga.vram", 0, bytes(4096))]
    _, _, data = vmstate_of(MAPPED, set(), pages)
    stream, source = read(data)
    everything = [
        (idstr, run.start, stream.read_pages(source, idstr, *run).tobytes())
        for idstr in stream.page_offsets
        for run in stream.file_bmap(idstr).runs()
    ]
    setup, device_state = read_setup(source, stream.checkpoint), read_device_state(source, stream.checkpoint)
    again, again_source = read(vmstate_stream(stream.checkpoint, set(), everything, setup, device_state))
    for idstr in stream.page_offsets:
        assert pages_of(again, again_source, idstr) == pages_of(stream, source, idstr)
    assert read_device_state(again_source, again.checkpoint) == device_state


@pytest.mark.parametrize(
    "run",
    [
        ("pc.ram", 70, content(0)),
        ("pc.ram", -1, content(0)),
        ("pc.ram", 0, b"x"),
        ("vga.vram", 0, content(0)),
        ("no", 0, b""),
    ],
)
def test_runs_that_do_not_belong_are_refused(run):
    with pytest.raises(CheckpointError, match="has no pages"):
        vmstate_of(MAPPED, {"vga.vram"}, [run])
