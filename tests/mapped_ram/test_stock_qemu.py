"""The format as stock QEMU writes and reads it."""

import json

import pytest

from ckptfs.mapped_ram.checkpoint import read_checkpoint, read_device_state, read_setup, with_run_state
from ckptfs.mapped_ram.layout import empty_image, frame, image_of, layout
from ckptfs.mapped_ram.precopy import read_precopy, vmstate_stream
from ckptfs.mapped_ram.stream import BytesSource

PC = ("-machine", "pc", "-m", "16M", "-vga", "std")
VIRTIO_MEM = (
    "-machine", "q35", "-m", "128M,maxmem=1G,slots=1", "-smp", "2",
    "-object", "memory-backend-ram,id=vm0,size=128M", "-device", "virtio-mem-pci,memdev=vm0,requested-size=16M",
    "-device", "virtio-net-pci,netdev=n0", "-netdev", "user,id=n0",
)  # fmt: skip
NO_FOOTERS = ("-machine", "pc", "-m", "16M", "-global", "migration.send-section-footer=off")
NO_VMDESC = ("-machine", "pc,suppress-vmdesc=on", "-m", "16M", "-uuid", "11111111-2222-3333-4444-555555555555")

MACHINES = pytest.mark.parametrize("machine", [PC, VIRTIO_MEM, NO_FOOTERS, NO_VMDESC, ("-machine", "none")])


def written(image, bitmaps, pages, stream_offset=0):
    """The file that a writer makes: a layout's extents, bitmaps, and each block's pages."""
    result = layout(image, stream_offset)
    data = bytearray(result.end_offset)
    for file_offset, extent in result.extents:
        data[file_offset : file_offset + len(extent)] = extent
    for block in result.blocks:
        bitmap = bitmaps[block.idstr].to_bytes()
        data[block.bitmap_offset : block.bitmap_offset + len(bitmap)] = bitmap
        data[block.pages_offset : block.pages_offset + block.used_length] = pages(block.idstr)
    return bytes(data)


@pytest.mark.parametrize("offset", [0, 0x1001])
@MACHINES
def test_metadata_comes_out_as_qemu_wrote_it(qemu_file, machine, offset):
    source = qemu_file(*machine, capabilities=["mapped-ram", "validate-uuid"], offset=offset)
    checkpoint, bitmaps = read_checkpoint(source, offset)
    assert checkpoint.end_offset == source.length
    assert not checkpoint.opaque
    assert checkpoint.run_state == "prelaunch"
    assert {block.idstr for block in checkpoint.blocks} == set(bitmaps)
    setup, device_state = read_setup(source, checkpoint), read_device_state(source, checkpoint)
    result = layout(image_of(checkpoint, setup, device_state), offset)
    assert result.blocks == checkpoint.blocks
    for file_offset, extent in result.extents[:-1]:
        assert source.pread(file_offset, len(extent)) == extent
    # After the last block: EOS, footer, early sections, QEMU's PARTs (which hold nothing), END, device state.
    file_offset, extent = result.extents[-1]
    before_parts = len(extent) - len(device_state) - (13 if machine is NO_FOOTERS else 18)
    assert source.pread(file_offset, before_parts) == extent[:before_parts]
    assert extent.endswith(source.pread(checkpoint.device_state_offset, source.length))
    for block in checkpoint.blocks:
        bitmap = bitmaps[block.idstr].to_bytes()
        assert source.pread(block.bitmap_offset, len(bitmap)) == bitmap


@MACHINES
def test_device_sections_are_those_of_the_vmdesc(qemu_file, machine):
    checkpoint, _ = read_checkpoint(qemu_file(*machine))
    if checkpoint.vmdesc is not None:
        sections = [*checkpoint.setup_sections, *checkpoint.sections]
        devices = checkpoint.vmdesc["devices"]
        assert [section.idstr for section in sections] == [device["name"] for device in devices]
    assert checkpoint.sections[-1].idstr == "globalstate"


def test_early_sections_are_found(qemu_file):
    checkpoint, _ = read_checkpoint(qemu_file(*VIRTIO_MEM))
    assert [section.idstr[-24:] for section in checkpoint.setup_sections] == ["/virtio-mem-device-early"]


@pytest.mark.parametrize("offset", [0, 0x1001])
def test_qemu_loads_what_was_laid_out(qemu_file, qemu_loads, offset):
    source = qemu_file(*VIRTIO_MEM)
    checkpoint, bitmaps = read_checkpoint(source)
    device_state = with_run_state(read_device_state(source, checkpoint), checkpoint, "paused")
    image = image_of(checkpoint, read_setup(source, checkpoint), device_state)
    offsets = {block.idstr: (block.pages_offset, block.used_length) for block in checkpoint.blocks}
    data = written(image, bitmaps, lambda idstr: source.pread(*offsets[idstr]), offset)
    qemu_loads(data, *VIRTIO_MEM, offset=offset)
    assert read_checkpoint(BytesSource(data), offset)[0].run_state == "paused"


def test_qemu_loads_the_image_of_a_guest_without_a_machine(qemu_loads):
    data = written(empty_image([]), {}, None)
    qemu_loads(data, "-machine", "none")


def test_a_plain_stream_has_the_pages_of_the_mapped_ram_one(qemu_file):
    mapped = qemu_file(*PC)
    plain = qemu_file(*PC, capabilities=[])
    checkpoint, bitmaps = read_checkpoint(mapped)
    stream = read_precopy(plain)
    assert stream.checkpoint.end_offset == plain.length
    assert stream.page_offsets.keys() == bitmaps.keys()
    for block in checkpoint.blocks:
        assert stream.file_bmap(block.idstr) == bitmaps[block.idstr]
        pages = stream.read_pages(plain, block.idstr, 0, block.page_count)
        assert pages.tobytes() == mapped.pread(block.pages_offset, block.used_length)


def test_qemu_loads_a_vmstate_stream(qemu_file, qemu_loads):
    source = qemu_file(*VIRTIO_MEM)
    checkpoint, bitmaps = read_checkpoint(source)
    left_out = {"pc.ram"}
    runs = [
        (block, run)
        for block in checkpoint.blocks
        if block.idstr not in left_out
        for run in bitmaps[block.idstr].runs()
    ]
    pages = [
        (block.idstr, run.start, source.pread(block.pages_offset + 4096 * run.start, 4096 * (run.stop - run.start)))
        for block, run in runs
    ]
    setup, device_state = read_setup(source, checkpoint), read_device_state(source, checkpoint)
    data = vmstate_stream(checkpoint, left_out, pages, setup, device_state)
    qemu_loads(data, *VIRTIO_MEM, capabilities=[])
    stream = read_precopy(BytesSource(data))
    assert stream.page_offsets.keys() == bitmaps.keys() - left_out
    assert all(stream.file_bmap(idstr) == bitmaps[idstr] for idstr in stream.page_offsets)
    assert stream.checkpoint.vmdesc["devices"] == checkpoint.vmdesc["devices"]
    # The vmdesc is the one that QEMU itself writes into a plain stream.
    plain = read_precopy(qemu_file(*VIRTIO_MEM, capabilities=[]))
    assert stream.checkpoint.vmdesc["configuration"] == plain.checkpoint.vmdesc["configuration"]


def test_composing_an_x_ignore_shared_stream_with_its_ram(qemu_file, qemu_loads, tmp_path):
    ram = tmp_path / "ram"
    backend = f"memory-backend-file,id=pc.ram,size=16M,mem-path={ram},share=on"
    source = qemu_file(
        "-machine", "pc,memory-backend=pc.ram", "-m", "16M", "-object", backend, capabilities=["x-ignore-shared"]
    )  # fmt: skip
    stream = read_precopy(source)
    checkpoint = stream.checkpoint
    assert {block.idstr for block in checkpoint.blocks} - stream.page_offsets.keys() == {"pc.ram"}
    image = image_of(checkpoint, read_setup(source, checkpoint), read_device_state(source, checkpoint))
    image = image.configured(("mapped-ram",), None)

    def pages(idstr):
        if idstr == "pc.ram":
            return ram.read_bytes()
        return stream.read_pages(source, idstr, 0, stream.page_offsets[idstr].size).tobytes()

    bitmaps = {idstr: stream.file_bmap(idstr) for idstr in stream.page_offsets}
    mapped, mapped_bitmaps = read_checkpoint(qemu_file("-machine", "pc", "-m", "16M"))
    data = written(image, {**mapped_bitmaps, **bitmaps}, pages)
    composed, composed_bitmaps = read_checkpoint(BytesSource(data))
    assert composed_bitmaps == mapped_bitmaps
    assert composed.vmdesc["configuration"] == mapped.vmdesc["configuration"]
    assert json.dumps(composed.vmdesc).encode() in data
    qemu_loads(data, "-machine", "pc", "-m", "16M")


@pytest.mark.parametrize("capabilities", [[], ["x-ignore-shared"], ["x-ignore-shared", "validate-uuid"]])
def test_the_frame_of_a_plain_stream_is_qemus(qemu_file, tmp_path, capabilities):
    backends = [
        word
        for name in ("m0", "m1")
        for word in (
            "-object", f"memory-backend-file,id={name},size=16M,mem-path={tmp_path}/{name},share=on",
            "-numa", f"node,memdev={name}",
        )
    ]  # fmt: skip
    uuid = ("-uuid", "11111111-2222-3333-4444-555555555555")
    source = qemu_file("-machine", "pc", "-m", "32M", *backends, *uuid, capabilities=capabilities)
    checkpoint = read_precopy(source).checkpoint
    image = image_of(checkpoint, read_setup(source, checkpoint), read_device_state(source, checkpoint))
    addresses = {block.idstr: block.address for block in image.blocks}
    if capabilities:
        assert (addresses["m0"], addresses["m1"]) == (0, 16 << 20)
    else:
        assert set(addresses.values()) == {None}
    before, after = frame(image)
    assert source.pread(0, len(before) - 5) == before[:-5]  # up to the header of END, which QEMU has later
    assert source.pread(source.length - len(after), len(after)) == after
