"""QEMU's own tests of migration to files (tests/qtest/migration/file-tests.c of 10.0), with ckptfs as one side.

As there: bytes before an offset are filled with a marker first and have to be intact afterwards; a stopped guest is
saved, loaded, and goes on counting. Both ways round with stock QEMU, and between two mounts.
"""

import errno
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.control.descriptors import Handed, add_to_fdset, fdset_option, mount_inheriting, open_on
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import Mounted, run_mount
from tests.qemu.guest import Guest
from tests.qemu.machine import VGA_AND_RNG, Qemu
from tests.qemu.stock_checkpoint import StockCheckpoint, StockCheckpoints, assert_ram_equals

MOUNT_FAILURE = 32
OFFSET = 0x1000
MARKER = b"\x55" * OFFSET


@dataclass(frozen=True)
class Row:
    """One of QEMU's tests; ``multifd`` is the number of channels, 0 for none."""

    name: str
    multifd: int = 0
    direct_io: bool = False
    offset: int = 0
    fdset: bool = False

    def handed(self, path: Path, access: int) -> list[Handed]:
        """What a manager opens for this: one descriptor, and one for direct I/O where that is wanted."""
        if not self.fdset:
            return []
        direct = [Handed(path, access | os.O_DIRECT)] if self.direct_io else []
        return [Handed(path, access), *direct]

    def uri(self, path: Path) -> str:
        """Where the checkpoint is, for either side."""
        name = "/dev/fdset/1" if self.fdset else path
        return f"file:{name},offset={self.offset:#x}" if self.offset else f"file:{name}"


ROWS = [
    Row("precopy/file/mapped-ram"),
    Row("precopy/file/mapped-ram/offset", offset=OFFSET),
    Row("precopy/file/mapped-ram/offset/fdset", offset=OFFSET, fdset=True),
    Row("multifd/file/mapped-ram", multifd=4),
    Row("multifd/file/mapped-ram/dio", multifd=4, direct_io=True),
    Row("multifd/file/mapped-ram/fdset", multifd=4, offset=OFFSET, fdset=True),
    Row("multifd/file/mapped-ram/fdset/dio", multifd=4, offset=OFFSET, fdset=True, direct_io=True),
]
rows = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


def mounted_from(mount: Mount, row: Row, path: Path) -> Mounted:
    """A mount of the checkpoint at ``path``, opened as ``row`` says."""
    options = [f"direct_io={'on' if row.direct_io else 'off'}"]
    if row.multifd:
        options.append(f"multifd_channels={row.multifd}")
    files = row.handed(path, os.O_RDONLY)
    if not files:
        return mount(row.uri(path), *options)
    return mount(row.uri(path), *options, fdset_option(*files), program=mount_inheriting(*files))


def mounted_to(mount: Mount, row: Row, checkpoint: StockCheckpoint, path: Path) -> Mounted:
    """A mount of what stock QEMU saved, with the descriptors to save it to ``path`` as ``row`` says."""
    files = row.handed(path, os.O_WRONLY)
    if not files:
        return mount(checkpoint.path)
    return mount(checkpoint.path, fdset_option(*files), program=mount_inheriting(*files))


def migrate(mounted: Mounted, row: Row, path: Path) -> None:
    """Save as ``row`` says, in the words of QEMU's monitor, and see that the marker is still there."""
    mounted.ctl(f"migrate_set_capability multifd {'on' if row.multifd else 'off'}")
    if row.multifd:
        mounted.ctl(f"migrate_set_parameter multifd-channels {row.multifd}")
    mounted.ctl(f"migrate_set_parameter direct-io {'on' if row.direct_io else 'off'}")
    mounted.ctl(f"migrate {row.uri(path)}")
    status = mounted.status()
    assert status["migration"]["status"] == "completed"
    assert status["direct-io"] == ("on" if row.direct_io else "off")
    with path.open("rb") as file:
        assert file.read(row.offset) == MARKER[: row.offset]


def prepared(path: Path, row: Row) -> Path:
    """The file to save to: with the marker before the offset, if there is one."""
    if row.offset or row.fdset:
        path.write_bytes(MARKER)
    return path


async def assert_runs_in_qemu(checkpoint: StockCheckpoint, row: Row, path: Path) -> None:
    """Load ``path`` into stock QEMU as ``row`` says, and see that the guest goes on counting."""
    async with checkpoint.qemu() as vm:
        await load(vm, row, path)
        await vm.cont()
        tick = await vm.tick()
        assert tick > checkpoint.last_tick
        assert await vm.tick() == tick + 1


async def load(vm: Qemu, row: Row, path: Path) -> None:
    if not row.fdset:
        await vm.load(path, offset=row.offset, multifd=row.multifd, direct_io=row.direct_io)
        return
    await trio.to_thread.run_sync(add_to_fdset, vm.qmp_path, 1, *row.handed(path, os.O_RDONLY))
    await vm.load(Path("/dev/fdset/1"), offset=row.offset, multifd=row.multifd, direct_io=row.direct_io)
    await vm.qmp("remove-fd", fdset_id=1)
    assert await vm.qmp("query-fdsets") == []


@rows
async def test_from_ckptfs_to_qemu(
    row: Row, stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    checkpoint = stock_checkpoint()
    path = prepared(tmp_path / "migfile", row)
    mounted = mounted_to(mount, row, checkpoint, path)
    before = open_on(mounted.pid, path)
    migrate(mounted, row, path)
    mounted.ctl("restore")  # what was saved is the base now: it is closed when it is not needed any more
    assert open_on(mounted.pid, path) == before
    await assert_runs_in_qemu(checkpoint, row, path)


@rows
async def test_from_qemu_to_ckptfs(
    row: Row, stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    checkpoint = stock_checkpoint()
    path = prepared(tmp_path / "migfile", row)
    async with checkpoint.qemu() as vm:
        await vm.load(checkpoint.path)
        if row.fdset:
            await trio.to_thread.run_sync(add_to_fdset, vm.qmp_path, 1, *row.handed(path, os.O_WRONLY))
        target = Path("/dev/fdset/1") if row.fdset else path
        await vm.migrate_to(target, offset=row.offset, multifd=row.multifd, direct_io=row.direct_io)
        if row.fdset:
            await vm.qmp("remove-fd", fdset_id=1)
    mounted = mounted_from(mount, row, path)
    assert_ram_equals((mounted.ram / "pc.ram").read_bytes(), checkpoint.visible)
    assert mounted.status()["base-devices"]
    if row.fdset:
        mounted.ctl("restore")
        assert sum(open_on(mounted.pid, path).values()) == len(row.handed(path, os.O_RDONLY))


@rows
def test_from_ckptfs_to_ckptfs(row: Row, stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path) -> None:
    checkpoint = stock_checkpoint()
    path = prepared(tmp_path / "migfile", row)
    migrate(mounted_to(mount, row, checkpoint, path), row, path)
    mounted = mounted_from(mount, row, path)
    assert_ram_equals((mounted.ram / "pc.ram").read_bytes(), checkpoint.visible)
    source, saved = decode(checkpoint.path), decode(path, row.offset)
    assert saved.device_sections == source.device_sections


# --- live: the guest runs while it is saved ---------------------------------------------------------------

LIVE = [Row("precopy/file/mapped-ram/live"), Row("multifd/file/mapped-ram/live", multifd=4)]


@pytest.mark.parametrize("row", LIVE, ids=[row.name for row in LIVE])
def test_live_from_qemu_to_ckptfs(row: Row, stock_checkpoint: StockCheckpoints, mount: Mount) -> None:
    checkpoint = stock_checkpoint(live=True, multifd=row.multifd)
    mounted = mounted_from(mount, row, checkpoint.path)
    assert_ram_equals((mounted.ram / "pc.ram").read_bytes(), checkpoint.visible)


@pytest.mark.parametrize("row", LIVE, ids=[row.name for row in LIVE])
async def test_live_from_ckptfs_to_qemu(row: Row, guest_files: Guest, mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "migfile"
    mounted = mount(tmp_path / "vm", "ram=pc.ram:128M")
    backend = f"memory-backend-file,id=pc.ram,size=128M,mem-path={mounted.ram / 'pc.ram'},share=on"
    arguments = (*VGA_AND_RNG, "-object", backend)
    async with Qemu(guest_files, *arguments, machine="pc,memory-backend=pc.ram") as vm:
        last = await vm.tick()
        mounted.ctl(f"qmp {vm.qmp_path}")
        await trio.to_thread.run_sync(migrate, mounted, row, path)
        assert await vm.tick() > last  # and it goes on
    mounted.ctl("qmp none")
    async with Qemu(guest_files, *VGA_AND_RNG, incoming="defer") as vm:
        await load(vm, row, path)
        tick = await vm.tick()
        assert tick > last
        assert await vm.tick() == tick + 1


# --- validate-uuid ----------------------------------------------------------------------------------------

UUID = "11111111-1111-1111-1111-111111111111"
OTHER_UUID = "22222222-2222-2222-2222-222222222222"


@pytest.fixture(scope="module")
def with_uuid(stock_checkpoint: StockCheckpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stock QEMU saves of a guest with a uuid, capability validate-uuid on."""
    checkpoint = stock_checkpoint()
    path = tmp_path_factory.mktemp("uuid") / "migfile"

    async def save() -> None:
        async with checkpoint.qemu("-uuid", UUID) as vm:
            await vm.load(checkpoint.path)
            state = [{"capability": "validate-uuid", "state": True}]
            await vm.qmp("migrate-set-capabilities", capabilities=state)
            await vm.migrate_to(path)

    trio.run(save)
    return path


@pytest.mark.parametrize("options", [(f"uuid={UUID}", "validate_uuid=on"), ("validate_uuid=on",), ()], ids=str)
def test_a_uuid_that_is_right_or_not_looked_at(options: tuple[str, ...], with_uuid: Path, mount: Mount) -> None:
    assert mount(with_uuid, *options).status()["base-devices"]


def test_a_uuid_that_is_wrong(with_uuid: Path, mount_point: Path) -> None:
    result = run_mount(with_uuid, mount_point, f"validate_uuid=on,uuid={OTHER_UUID}")
    assert result.returncode == MOUNT_FAILURE
    assert f"UUID received is {UUID} and local is {OTHER_UUID}" in result.stderr


def test_a_source_without_uuid(stock_checkpoint: StockCheckpoints, mount: Mount) -> None:
    checkpoint = stock_checkpoint()
    assert mount(checkpoint.path, f"validate_uuid=on,uuid={UUID}").status()["base-devices"]


@pytest.mark.parametrize(("uuid", "right"), [(UUID, True), (None, True), (OTHER_UUID, False)])
async def test_qemu_validates_the_uuid_that_ckptfs_saved(
    uuid: str | None,
    right: bool,
    with_uuid: Path,
    stock_checkpoint: StockCheckpoints,
    mount: Mount,
    tmp_path: Path,
) -> None:
    again = tmp_path / "again"
    mount(with_uuid, "validate_uuid=on").ctl(f"save {again}")
    with pytest.raises(EOFError) if not right else nullcontext() as refused:
        async with stock_checkpoint().qemu(*(("-uuid", uuid) if uuid else ())) as vm:
            await vm.load(again)
    if refused is not None:
        assert any(f"UUID received is {UUID}" in note for note in refused.value.__notes__)


def test_without_validate_uuid_none_is_saved(with_uuid: Path, mount: Mount, tmp_path: Path) -> None:
    again = tmp_path / "again"
    mount(with_uuid).ctl(f"save {again}")
    assert b"configuration/uuid" not in again.read_bytes()[:4096]
    assert b"configuration/uuid" in with_uuid.read_bytes()[:4096]


# --- arguments --------------------------------------------------------------------------------------------


def channels(path: Path, **more: object) -> dict[str, object]:
    address = {"transport": "file", "filename": str(path), "offset": 0}
    return {"channel-type": "main", "addr": address, **more}


@pytest.mark.parametrize("command", ["migrate", "migrate_incoming"])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"uri": "file:/x", "channels": [channels(Path("/x"))]}, "need either 'uri' or 'channels' argument"),
        ({}, "need either 'uri' or 'channels' argument"),
        ({"channels": [channels(Path("/x"))] * 2}, "Channel list has more than one main entry"),
        ({"uri": "file:/x,offset=0x20M"}, "file URI has bad offset 0x20M: Invalid argument"),
    ],
    ids=["both_set", "none_set", "two main entries", "offset/bad"],
)
def test_arguments_that_qemu_refuses(
    command: str, arguments: dict[str, object], text: str, standing: Mounted
) -> None:
    before = standing.status()["migration"]
    with pytest.raises(OSError, match=f"error: {text}") as caught:
        standing.ctl(f"{command} {json.dumps(arguments)}")
    assert caught.value.errno == errno.EINVAL
    assert standing.status()["migration"] == before  # nothing was started


@pytest.mark.parametrize(
    ("uri", "error", "text"),
    [
        ("tcp:127.0.0.1:0", errno.EINVAL, "transport 'socket' is not supported"),
        ("unix:/nowhere", errno.EINVAL, "transport 'socket' is not supported"),
        ("vsock:1:2", errno.EINVAL, "transport 'socket' is not supported"),
        ("rdma:host:1", errno.EINVAL, "transport 'rdma' is not supported"),
        ("'exec:cat > file'", errno.EINVAL, "transport 'exec' is not supported"),
        ("http://host/file", errno.EROFS, "http://host/file: a web server takes no saves"),
        ("FILE:/x", errno.EINVAL, "unknown migration protocol: FILE:/x"),
        ("file:/nowhere/at/all", errno.ENOENT, "/nowhere/at/all: No such file or directory"),
        ("file:/proc/cmdline", errno.EEXIST, "/proc/cmdline: exists and holds no checkpoint"),
        ("file:", errno.ENOENT, "the file name is empty"),
        ("fd:nosuch", errno.ENOENT, "fd:nosuch: no descriptor of that name was handed in"),
        ("file:/dev/fdset/7", errno.ENOENT, "no such fdset was handed in"),
        ("file:/dev/fdset/x", errno.EINVAL, "Could not parse fdset /dev/fdset/x"),
    ],
)
def test_a_bad_destination(uri: str, error: int, text: str, standing: Mounted, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=text) as caught:
        standing.ctl(f"migrate {uri}")
    assert caught.value.errno == error
    standing.ctl(f"migrate file:{tmp_path}/another")  # it goes on
