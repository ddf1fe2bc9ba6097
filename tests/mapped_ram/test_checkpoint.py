"""Reading mapped-ram files: sound ones of every kind; broken ones give CheckpointError and nothing else."""

import contextlib
import random
import struct
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram import checkpoint as checkpoint_module
from ckptfs.mapped_ram import sections
from ckptfs.mapped_ram.bitmap import PagesBitmap, Run
from ckptfs.mapped_ram.checkpoint import read_checkpoint, read_device_state, read_setup, with_run_state
from tests.doubles.migration_file import Block, BytesSource, Device, MigrationFile, be32, be64, globalstate

SMALL = MigrationFile(
    blocks=[Block("pc.ram", 70, {0: b"first", 1: b"second", 69: b"last"}, stale={2: b"old"}), Block("vga.vram", 1)],
    alignment=4096,
    part_count=2,
)
EARLY = Device("0000:00:02.0/virtio-mem-device-early", b"early" * 3)


def read(description, **changes):
    description = replace(description, **changes)
    return read_checkpoint(BytesSource(description.data()), description.stream_offset)


def set_pages(bitmap):
    return [page for run in bitmap.runs() for page in range(*run)]


def test_a_small_file():
    data, marks = SMALL.build()
    checkpoint, bitmaps = read_checkpoint(BytesSource(data))
    assert checkpoint.machine == "pc-i440fx-10.0"
    assert checkpoint.capabilities == ("mapped-ram",)
    assert [(b.idstr, b.page_count, b.page_size) for b in checkpoint.blocks] == [
        ("pc.ram", 70, 4096),
        ("vga.vram", 1, 4096),
    ]
    assert checkpoint.blocks[0].header_offset == marks["pc.ram.version"]
    assert checkpoint.blocks[0].bitmap_offset == marks["pc.ram.bitmap"]
    assert checkpoint.blocks[0].pages_offset == marks["pc.ram.page.0"]
    assert set_pages(bitmaps["pc.ram"]) == [0, 1, 69]
    assert list(bitmaps["pc.ram"].runs()) == [Run(0, 2), Run(69, 70)]
    assert bitmaps["vga.vram"] == PagesBitmap(1)
    assert [section.idstr for section in checkpoint.sections] == ["timer", "globalstate"]
    timer = checkpoint.sections[0]
    assert (timer.version_id, timer.instance_id, timer.section_id) == (2, 0, 200)
    assert (timer.file_offset, timer.payload_offset) == (marks["timer"], marks["timer.payload"])
    assert (timer.payload_length, timer.length) == (24, marks["globalstate"] - marks["timer"])
    assert checkpoint.device_state_offset == marks["device_state"]
    assert checkpoint.end_offset == len(data)
    assert checkpoint.has_device_state
    assert not checkpoint.opaque
    assert checkpoint.run_state == "paused"
    assert checkpoint.vmdesc_offset == marks["vmdesc"]


@pytest.mark.parametrize(
    "changes",
    [
        {"stream_offset": 0x1001},
        {"alignment": 1 << 20},
        {"part_count": 5000},
        {"part_count": 1},
        {"switchover_start": False},
        {"footers": False},
        {"vmdesc": False},
        {"setup_devices": [EARLY]},
        {"setup_devices": [EARLY, replace(EARLY, instance_id=1)], "vmdesc": False},
        {"setup_devices": [EARLY], "footers": False},
        {"uuid": bytes(range(16))},
        {"ram_section_id": 7},
        {"devices": []},
        {"devices": [], "vmdesc": False},
        {"machine": "x" * 300},
        {"target_page_bits": 14, "alignment": 1 << 14},
        {"capabilities": ["x-ignore-shared", "mapped-ram"]},
        {"machine": "s390-ccw-virtio-10.0", "byteorder": "big"},
    ],
)
def test_every_kind_of_file(changes):
    checkpoint, bitmaps = read(SMALL, **changes)
    assert set_pages(bitmaps["pc.ram"]) == [0, 1, 69]
    assert not checkpoint.opaque
    expected = changes.get("devices", SMALL.devices)
    assert [section.idstr for section in checkpoint.sections] == [device.idstr for device in expected]
    assert len(checkpoint.setup_sections) == len(changes.get("setup_devices", []))
    assert checkpoint.has_device_state == bool(expected)
    assert checkpoint.run_state == ("paused" if expected else None)


def test_setup_and_device_state_are_verbatim():
    description = replace(SMALL, setup_devices=[EARLY, replace(EARLY, instance_id=1)])
    data, marks = description.build()
    source = BytesSource(data)
    checkpoint, _ = read_checkpoint(source)
    setup = read_setup(source, checkpoint)
    assert setup.count(EARLY.payload) == 2
    assert data.endswith(setup + data[marks["part.0"] :])
    assert read_device_state(source, checkpoint) == data[marks["device_state"] :]
    assert read_setup(source, read(SMALL)[0]) == b""


def test_a_device_state_is_read_whole_or_not_at_all(monkeypatch):
    data = SMALL.data()
    checkpoint, _ = read_checkpoint(BytesSource(data))
    with pytest.raises(CheckpointError, match="cut short since it was opened"):
        read_device_state(BytesSource(data[:-1]), checkpoint)
    monkeypatch.setattr(checkpoint_module, "MAX_DEVICE_STATE_LENGTH", 100)
    with pytest.raises(CheckpointError, match="more than 100"):
        read_device_state(BytesSource(data), checkpoint)


def test_with_run_state_changes_only_the_run_state():
    data, marks = SMALL.build()
    checkpoint, _ = read_checkpoint(BytesSource(data))
    device_state = read_device_state(BytesSource(data), checkpoint)
    changed = data[: marks["device_state"]] + with_run_state(device_state, checkpoint, "running")
    assert read_checkpoint(BytesSource(changed))[0].run_state == "running"
    running = [*SMALL.devices[:-1], Device("globalstate", globalstate("running"))]
    assert changed == replace(SMALL, devices=running).data()
    with pytest.raises(CheckpointError, match="no section globalstate"):
        with_run_state(b"\0", read(SMALL, devices=[])[0], "running")


def test_an_ignored_block_has_no_region_and_no_bitmap():
    blocks = [Block("m0", 16, address=0, ignored=True), Block("m1", 16, {3: b"x"}, address=0x10000)]
    checkpoint, bitmaps = read(SMALL, blocks=blocks, capabilities=["x-ignore-shared", "mapped-ram"])
    assert [(b.ignored, b.address, b.pages_offset is None) for b in checkpoint.blocks] == [
        (True, 0, True),
        (False, 0x10000, False),
    ]
    assert bitmaps.keys() == {"m1"}


def test_zero_offsets_without_x_ignore_shared_are_refused():
    with pytest.raises(CheckpointError, match="bitmap_offset"):
        read(SMALL, blocks=[Block("m0", 16, ignored=True)])


@pytest.mark.parametrize("host_page_size", [1 << 16, 2 << 20, 1 << 30])
def test_the_host_page_size_of_huge_pages_is_passed_over(host_page_size):
    blocks = [Block("pc.ram", 512, {511: b"x"}, host_page_size=host_page_size), Block("vga.vram", 1)]
    _, bitmaps = read(SMALL, blocks=blocks)
    assert set_pages(bitmaps["pc.ram"]) == [511]


def test_no_blocks_and_empty_blocks():
    assert read(SMALL, blocks=[])[1] == {}
    checkpoint, bitmaps = read(SMALL, blocks=[Block("empty", 0), Block("pc.ram", 1)])
    assert [block.used_length for block in checkpoint.blocks] == [0, 4096]
    assert set_pages(bitmaps["empty"]) == []


def test_names_keep_their_bytes():
    idstr = b"\xff\xfe/\xc3\xa4 ../..".decode("utf-8", "surrogateescape")
    checkpoint, _ = read(SMALL, blocks=[Block(idstr, 1)])
    assert checkpoint.blocks[0].idstr == idstr


class Padded(BytesSource):
    """A file with zeros behind its end, as many as one likes."""

    def __init__(self, data, padding):
        super().__init__(data)
        self._padding = padding

    @property
    def length(self):
        return len(self._data) + self._padding

    def pread(self, file_offset, length):
        return self._data[file_offset : file_offset + length].ljust(min(length, self.length - file_offset), b"\0")


@pytest.mark.parametrize("garbage", [bytes(1), bytes(4096), b"garbage", b"\0\6\0\0\0\2{}", b"}" * 100])
@pytest.mark.parametrize("vmdesc", [True, False])
def test_trailing_data_is_no_part_of_the_stream(vmdesc, garbage):
    data = replace(SMALL, vmdesc=vmdesc).data()
    checkpoint, bitmaps = read_checkpoint(BytesSource(data + garbage))
    assert set_pages(bitmaps["pc.ram"]) == [0, 1, 69]
    assert checkpoint.end_offset == len(data)
    assert [section.idstr for section in checkpoint.sections] == ["timer", "globalstate"]


@pytest.mark.parametrize("padding", [1 << 20, 64 << 20, 400 << 20, 2 << 30])
def test_as_much_as_there_may_be_behind_the_end(padding):
    data = SMALL.data()
    assert read_checkpoint(Padded(data, padding))[0] == read(SMALL)[0]


def test_another_stream_behind_the_end():
    data = SMALL.data()
    assert read_checkpoint(BytesSource(data + data))[0] == read(SMALL)[0]


def test_a_vmdesc_that_a_guest_has_forged_is_passed_over():
    forged = b"\0\6" + be32(len(FORGED)) + FORGED
    devices = [Device("odd", forged), *SMALL.devices]
    checkpoint, _ = read(SMALL, devices=devices)
    assert [section.idstr for section in checkpoint.sections] == ["odd", "timer", "globalstate"]


FORGED = b'{"devices": []}'


def test_a_vmdesc_cut_short_is_minded_as_little_as_by_qemu():
    data, marks = SMALL.build()
    for stop in (*range(marks["vmdesc"] + 1, len(data), 7), len(data) - 1):
        checkpoint, _ = read_checkpoint(BytesSource(data[:stop]))
        assert [section.idstr for section in checkpoint.sections] == ["timer", "globalstate"]
        assert checkpoint.end_offset == marks["vmdesc"]
        assert checkpoint.vmdesc is None
        assert checkpoint.vmdesc_cut
    assert not read(SMALL)[0].vmdesc_cut
    assert not read(SMALL, vmdesc=False)[0].vmdesc_cut


def test_lengths_that_the_vmdesc_has_wrong_are_found_by_their_footers():
    # An array whose elements differ in size, of which the vmdesc describes only the first.
    payload = b"\x7e\0\0\0\xc9\4" * 3 + b"\x7e\0\0\0\xc8\4" + bytes(3000)
    devices = [Device("odd", payload, described_length=17), *SMALL.devices]
    checkpoint, _ = read(SMALL, devices=devices)
    assert [section.payload_length for section in checkpoint.sections] == [len(payload), 24, 104]


FOOTER = b"\x7e" + struct.pack(">I", 200)  # of the first device
FAKE_HEADER = b"\4" + struct.pack(">IB", 1000, 4) + b"fake" + struct.pack(">II", 0, 1)
OWN_HEADER = b"\4" + struct.pack(">IB", 200, 3) + b"odd" + struct.pack(">II", 0, 1)


@pytest.mark.parametrize(
    "decoy", [FAKE_HEADER, OWN_HEADER, b"\0\6", b"\2\0\0\0\1", b"\x08\0\x0b\0\0", b"\0\0", b"\4"]
)
def test_a_decoy_footer_does_not_end_a_section(decoy):
    # The payload holds its own footer, and what could follow it: but not what the vmdesc has next.
    payload = FOOTER + decoy + bytes(300)
    devices = [Device("odd", payload, described_length=1), *SMALL.devices]
    if decoy[0] in (2, 8):  # Taken for the next part of the RAM section, or a command: neither is in the vmdesc.
        with pytest.raises(CheckpointError):
            read(SMALL, devices=devices)
    else:
        checkpoint, _ = read(SMALL, devices=devices)
        assert [section.payload_length for section in checkpoint.sections] == [len(payload), 24, 104]


@pytest.mark.parametrize("decoy", [OWN_HEADER, b"\0\0", b"\4"])
def test_without_a_vmdesc_the_only_place_that_could_be_is_it(decoy):
    payload = FOOTER + decoy + bytes(300)
    checkpoint, _ = read(SMALL, devices=[Device("odd", payload), *SMALL.devices], vmdesc=False)
    assert [section.payload_length for section in checkpoint.sections] == [len(payload), 24, 104]


@pytest.mark.parametrize("count", [1, 30])
def test_without_a_vmdesc_two_places_that_could_be_leave_it_opaque(count):
    devices = [Device("odd", (FOOTER + FAKE_HEADER) * count + bytes(300)), *SMALL.devices]
    checkpoint, bitmaps = read(SMALL, devices=devices, vmdesc=False)
    assert checkpoint.opaque
    assert checkpoint.has_device_state
    assert checkpoint.sections == ()
    assert checkpoint.end_offset == len(replace(SMALL, devices=devices, vmdesc=False).data())
    assert set_pages(bitmaps["pc.ram"]) == [0, 1, 69]


def test_a_device_state_too_long_to_search_is_opaque(monkeypatch):
    monkeypatch.setattr(sections, "MAX_SCAN_LENGTH", 100)
    assert read(SMALL, vmdesc=False)[0].opaque
    odd = [Device("odd", bytes(200), described_length=1), *SMALL.devices]
    with pytest.raises(CheckpointError, match="not as long as the vmdesc says"):
        read(SMALL, devices=odd)


def test_a_file_without_footers_and_vmdesc_is_opaque():
    checkpoint, bitmaps = read(SMALL, footers=False, vmdesc=False)
    assert checkpoint.opaque
    assert checkpoint.run_state is None
    assert set_pages(bitmaps["pc.ram"]) == [0, 1, 69]


def test_early_sections_without_footers_and_vmdesc_are_refused():
    with pytest.raises(CheckpointError, match="early section"):
        read(SMALL, footers=False, vmdesc=False, setup_devices=[EARLY])


def test_a_bitmap_in_many_pieces_is_checked_to_its_end(monkeypatch):
    """As that of a block of more than 32 GiB is read."""
    monkeypatch.setattr(checkpoint_module, "_BITMAP_CHUNK_LENGTH", 16)
    pages = dict.fromkeys((0, 127, 128, 300, 349), b"x")
    description = replace(SMALL, blocks=[Block("pc.ram", 350, pages)])
    _, bitmaps = read(description)
    assert set_pages(bitmaps["pc.ram"]) == sorted(pages)
    data, marks = description.build()
    last = marks["pc.ram.bitmap"] + 350 // 8
    broken = data[:last] + bytes([data[last] | 0x80]) + data[last + 1 :]
    with pytest.raises(CheckpointError, match=r"past the last page \(349\)"):
        read_checkpoint(BytesSource(broken))


def test_reading_costs_one_bit_a_page():
    class CountingSource(BytesSource):
        read_length = 0

        def pread(self, file_offset: int, length: int) -> bytes:
            self.read_length += length
            return super().pread(file_offset, length)

    data = MigrationFile(blocks=[Block("pc.ram", 4096, dict.fromkeys(range(4096), b"x"))]).data()
    source = CountingSource(data)
    read_checkpoint(source)
    assert source.read_length < 4096 // 8 + 100_000


# --- broken files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """A field of SMALL, what is put in its place, and a part of the error's text."""

    name: str
    mark: str
    data: bytes
    text: str
    shift: int = 0


BROKEN = [
    Broken("magic", "magic", b"QEVN", "Not a migration stream"),
    Broken("zero header", "magic", bytes(8), "unfinished save"),
    Broken("version 2", "version", be32(2), "version 2"),
    Broken("version 4", "version", be32(4), "version 4"),
    Broken("no configuration", "configuration", b"\1", "Configuration section missing"),
    Broken("machine name too long", "machine.length", be32(1 << 31), "2147483648 bytes is not plausible"),
    Broken("unknown capability", "capabilities", b"mapped-ran", "'mapped-ran' is unknown", 37),
    Broken("capability count", "capabilities", be32(2), "unknown or listed twice", 32),
    Broken("many capabilities", "capabilities", be32(1 << 30), "not plausible", 32),
    Broken("unknown subsection", "capabilities", b"C", "unknown", 2),
    Broken("subsection version", "capabilities", be32(2), "version 2", 28),
    Broken("other section first", "ram", b"\4", "section type 0x04"),
    Broken("iterable section", "ram.idstr", b"\3raw", "'raw' is not supported"),
    Broken("ram version 3", "ram.version_id", be32(3), "version 3"),
    Broken("ram instance 1", "ram.instance_id", be32(1), "instance 1"),
    Broken("no block list", "total", be64(71 * 4096 | 8), "Unexpected RAM flags 0x8"),
    Broken("total too small", "total", be64(70 * 4096 | 4), "after the list of RAM blocks"),
    Broken("total far too small", "total", be64(4096 | 4), "goes beyond the total"),
    Broken("total too large", "total", be64(72 * 4096 | 4), "name is empty"),
    Broken("total beyond reason", "total", be64(1 << 62 | 4), "bytes of RAM are more than"),
    Broken("idstr empty", "pc.ram", b"\0", "name is empty"),
    Broken("idstr with NUL", "pc.ram", b"\6pc\0ram", "NUL byte"),
    Broken("used_length odd", "pc.ram.used_length", be64(70 * 4096 - 1), "not a multiple"),
    Broken("used_length too large", "pc.ram.used_length", be64(72 * 4096), "goes beyond the total"),
    Broken("used_length huge", "pc.ram.used_length", be64(1 << 63), "goes beyond the total"),
    Broken("used_length too small", "pc.ram.used_length", be64(69 * 4096), "the list is damaged"),
    Broken("header version 2", "pc.ram.version", be32(2), "header version 2"),
    Broken("page_size 0", "pc.ram.page_size", be64(0), "page_size 0"),
    Broken("page_size 2048", "pc.ram.page_size", be64(2048), "page_size 2048"),
    Broken("page_size 8192", "pc.ram.page_size", be64(8192), "page_size 8192"),
    Broken("bitmap_offset 0", "pc.ram.bitmap_offset", be64(0), "not right after"),
    Broken("bitmap_offset huge", "pc.ram.bitmap_offset", be64((1 << 64) - 1), "not right after"),
    Broken("pages_offset unaligned", "pc.ram.pages_offset", be64(4097), "bad alignment"),
    Broken("pages_offset half a page on", "pc.ram.pages_offset", be64(4096 + 512), "bad alignment"),
    Broken("pages_offset 0", "pc.ram.pages_offset", be64(0), "before the end of the bitmap"),
    Broken("pages_offset wrong", "pc.ram.pages_offset", be64(8192), "name is empty"),
    Broken("pages_offset huge", "pc.ram.pages_offset", be64((1 << 64) - 4096), "the file ends at"),
    Broken("second block overlaps", "vga.vram.pages_offset", be64(4096), "before the end of the bitmap"),
    Broken("bit past the end", "pc.ram.bitmap", b"\xff" * 16, "past the last page"),
    Broken("no EOS", "eos", be64(8), "Unexpected RAM flags"),
    Broken("RAM footer", "ram.footer", b"\x7e" + be32(2), "another section id"),
    Broken("no RAM footer", "ram.footer", b"\x7d", "section type 0x7d"),
    Broken("page record in a PART", "part.0.eos", be64(8), "Unexpected RAM flags 0x8"),
    Broken("PART's footer", "part.0.footer", b"\x7e" + be32(9), "footer"),
    Broken("PART of another section", "part.0", b"\2" + be32(9), "section id 9 was not started"),
    Broken("END of another section", "part.1", b"\3" + be32(9), "section id 9 was not started"),
    Broken("END missing", "part.1", b"\2", "section type 0x04"),
    Broken("command too long", "command", b"\x08\0\x0b\xff\xff", "ends inside a command"),
    Broken("START among the devices", "timer", b"\1", "'timer' is not supported"),
    Broken("PART among the devices", "timer", b"\2", "a part of section 200"),
    Broken("unknown section type", "timer", b"\x0b", "section type 0x0b is unknown"),
    Broken("section id twice", "timer.section_id", be32(1), "occurs twice"),
    Broken("device not in the vmdesc", "timer.idstr", b"\5times", "'times' .instance 0. stands where"),
    Broken("device's instance", "timer.instance_id", be32(1), "'timer' .instance 1. stands where"),
    Broken("device's footer", "timer.footer", b"\x7e" + be32(0), "no footer"),
    Broken("device's footer missing", "timer.footer", b"\0", "no footer"),
    Broken("EOF missing", "eof", b"\4", "no footer"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_broken_files_are_refused(broken):
    data, marks = SMALL.build()
    mutable = bytearray(data)
    start = marks[broken.mark] + broken.shift
    mutable[start : start + len(broken.data)] = broken.data
    assert mutable != data
    with pytest.raises(CheckpointError, match=broken.text) as caught:
        read_checkpoint(BytesSource(bytes(mutable)))
    assert caught.value.file_offset is not None
    assert "\n" not in str(caught.value)


def test_a_vmdesc_of_another_page_size_is_refused():
    data = SMALL.data().replace(b'"page_size": 4096', b'"page_size": 8192')
    with pytest.raises(CheckpointError, match="page_size"):
        read_checkpoint(BytesSource(data))


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        (0, "'timer' is not in the vmdesc"),
        (2, "is not as long as the vmdesc says"),
        (4, "the vmdesc lists 'extra', which has no section"),
    ],
)
def test_a_vmdesc_of_other_devices_is_refused(devices, text):
    three = replace(SMALL, devices=[*SMALL.devices, Device("extra", b"extra")])
    described = [*three.devices, Device("extra", b"extra", instance_id=1)][:devices]
    data, marks = three.build()
    other = replace(SMALL, devices=described).build()
    data = data[: marks["vmdesc"]] + other[0][other[1]["vmdesc"] :]
    with pytest.raises(CheckpointError, match=text):
        read_checkpoint(BytesSource(data))


@pytest.mark.parametrize("vmdesc", [True, False])
@pytest.mark.parametrize("footers", [True, False])
def test_a_file_cut_short_is_refused(vmdesc, footers):
    description = replace(SMALL, vmdesc=vmdesc, footers=footers, setup_devices=[EARLY] if footers or vmdesc else [])
    data, marks = description.build()
    opaque_from = len(data) if footers else marks["device_state"] + 1
    for stop in [*range(200), *range(200, marks["eos"], 997), *range(marks["eos"], marks["eof"] + 1)]:
        if stop >= opaque_from:
            with contextlib.suppress(CheckpointError):
                assert read_checkpoint(BytesSource(data[:stop]))[0].opaque
            continue
        with pytest.raises(CheckpointError):
            read_checkpoint(BytesSource(data[:stop]))


def test_a_file_that_shrinks_while_it_is_read_is_refused():
    data, marks = SMALL.build()

    class ShrinkingSource(BytesSource):
        def pread(self, file_offset: int, length: int) -> bytes:
            return super().pread(file_offset, 8 if file_offset == marks["pc.ram.bitmap"] else length)

    with pytest.raises(CheckpointError, match="ends inside the bitmap"):
        read_checkpoint(ShrinkingSource(data))


@pytest.mark.parametrize("data", [b"", b"Q", b"QEVM", b"QEVM\0\0\0", bytes(100), b"\x7fELF" * 100, b"QEVM\0\0\0\3"])
def test_what_is_no_stream_is_refused(data):
    with pytest.raises(CheckpointError, match=r"Not a migration stream|ends inside"):
        read_checkpoint(BytesSource(data))


def test_a_vmdesc_that_does_not_follow_the_device_state_is_none_of_it():
    data, marks = replace(SMALL, devices=[]).build()
    data = data[: marks["eof"]] + b"\0garbage" + data[marks["eof"] :]
    checkpoint, _ = read_checkpoint(BytesSource(data))
    assert checkpoint.end_offset == marks["eof"] + 1
    assert not checkpoint.has_vmdesc


@pytest.mark.parametrize("offset", [1, 4096, 1 << 62, 1 << 64])
def test_another_offset_is_refused(offset):
    with pytest.raises(CheckpointError, match="Not a migration stream"):
        read_checkpoint(BytesSource(SMALL.data()), offset)


def test_a_plain_stream_is_refused_with_advice():
    with pytest.raises(CheckpointError, match=r"plain migration stream.*capability mapped-ram"):
        read(SMALL, capabilities=[])


@pytest.mark.parametrize("bits", [0, 9, 17, 64])
def test_target_pages_that_no_machine_has_are_refused(bits):
    data, marks = replace(SMALL, target_page_bits=12).build()
    payload = marks["target-page-bits"] + 2 + len("configuration/target-page-bits") + 4
    data = data[:payload] + be32(bits) + data[payload + 4 :]
    with pytest.raises(CheckpointError, match="target page"):
        read_checkpoint(BytesSource(data))


def test_subsections_that_come_twice_are_refused():
    data, marks = replace(SMALL, uuid=bytes(16)).build()
    for name, stop in [("capabilities", "uuid"), ("uuid", "ram")]:
        section = data[marks[name] : marks[stop]]
        twice = data[: marks["ram"]] + section + data[marks["ram"] :]
        with pytest.raises(CheckpointError, match="occurs twice"):
            read_checkpoint(BytesSource(twice))


def test_too_many_blocks_are_refused():
    with pytest.raises(CheckpointError, match="more than 4096 RAM blocks"):
        read(SMALL, blocks=[*(Block(f"b{i}", 0) for i in range(4096)), Block("last", 1)], alignment=4096)


def test_two_blocks_of_one_name_are_refused():
    with pytest.raises(CheckpointError, match="listed twice"):
        read(SMALL, blocks=[Block("pc.ram", 1), Block("pc.ram", 1)])


ONE_SECTION = b"\4" + be32(100) + b"\1d" + bytes(8)


@pytest.mark.parametrize(
    ("device_state", "text"),
    [
        (b"\x08\0\0\0\0" * 1_000_000, "more than 4096 commands"),
        (
            b"".join(b"\4" + be32(i) + b"\1d" + bytes(8) + b"\x7e" + be32(i) for i in range(10, 40_000)),
            "more than 16384",
        ),
        (ONE_SECTION + (b"\x7e" + be32(100) + b"\4") * 1_000_000, None),
        (ONE_SECTION + b"\x7e" * 1_000_000, "has no footer"),
        (b"\0\6\0\0\0\2{}" * 1_000_000, None),
        (b"\0\6\0\0\0\x08{}}}}}}}" * 500_000, None),
    ],
    ids=["commands", "sections", "footers", "no footers", "vmdescs", "broken vmdescs"],
)
def test_files_made_to_take_long_do_not(device_state, text):
    data, marks = SMALL.build()
    source = BytesSource(data[: marks["device_state"]] + device_state)
    if text is None:
        checkpoint, _ = read_checkpoint(source)
        assert checkpoint.opaque or checkpoint.sections == ()
    else:
        with pytest.raises(CheckpointError, match=text):
            read_checkpoint(source)


@pytest.mark.parametrize(
    "json",
    [
        b"[" * 100_000,
        b'{"devices":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"devices": [' + b"9" * 10_000 + b"]}",
        b'{"devices": 1}',
        b'{"devices": [1, null, [], {}, "timer"]}',
        b'{"devices": [{"name": "timer", "instance_id": 0, "fields": [{"size": "xx", "array_len": 99999999999}]}]}',
        b'{"devices": [{"name": "timer", "instance_id": 0, "fields": [{"size": 1e400}]}]}',
        b'{"devices": [{"name": "timer", "instance_id": 0, "fields": [{"size": -1}]}]}',
        b'{"devices": [{"name": "timer", "instance_id": 0, "fields": [{"size": 9223372036854775807}]}]}',
        b'{"devices": [{"name": "timer", "instance_id": 0, "fields": 3}]}',
        b'{"devices": [{"name": "timer", "instance_id": [], "fields": []}]}',
        b'{"page_size": [], "devices": []}',
    ],
)
def test_a_vmdesc_of_nonsense_does_no_harm(json):
    data, marks = SMALL.build()
    data = data[: marks["vmdesc"]] + b"\6" + be32(len(json)) + json
    try:
        checkpoint, _ = read_checkpoint(BytesSource(data))
    except CheckpointError:
        return
    assert [section.idstr for section in checkpoint.sections] == ["timer", "globalstate"]


# --- fuzzing ----------------------------------------------------------------------------------------------

FUZZED, _MARKS = replace(
    SMALL, setup_devices=[EARLY], blocks=[Block("pc.ram", 70, {0: b"x"}), Block("rom", 1)]
).build()
METADATA = [
    *range(_MARKS["pc.ram.page.0"] - 4096, _MARKS["pc.ram.bitmap"] + 16),
    *range(_MARKS["rom"], _MARKS["rom.bitmap"] + 8),
    *range(_MARKS["eos"], len(FUZZED)),
]


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from(METADATA), st.integers(0, 255)), min_size=1, max_size=6),
    st.sampled_from([None, *METADATA]),
)
def test_a_mutated_file_is_read_or_refused(changes, stop):
    data = bytearray(FUZZED)
    for file_offset, value in changes:
        data[file_offset] = value
    with contextlib.suppress(CheckpointError):
        read_checkpoint(BytesSource(bytes(data[:stop])))


def test_every_single_byte_of_metadata_may_be_wrong():
    generator = random.Random(1)
    for file_offset in METADATA:
        data = bytearray(FUZZED)
        data[file_offset] ^= generator.randrange(1, 256)
        with contextlib.suppress(CheckpointError):
            read_checkpoint(BytesSource(bytes(data)))


@given(st.binary(max_size=2000))
def test_random_bytes_after_a_good_header(data):
    _, marks = SMALL.build()
    for mark in ("configuration", "ram", "total", "device_state"):
        with pytest.raises(CheckpointError):
            read_checkpoint(BytesSource(FUZZED[: marks[mark]][: marks[mark]] + data))
