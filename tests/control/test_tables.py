"""What QEMU validates on loading, and what it forgets; how its saves fail; and what query-migrate tells."""

import errno
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.control.footprint import footprint
from tests.doubles.migration_file import Block, Device, MigrationFile, be32, be64
from tests.mount.conftest import Mount
from tests.mount.decode import PAGE, decode
from tests.mount.disk import Disk
from tests.mount.harness import MODULE_DEADLINE, Mounted, run_mount
from tests.qemu.stock_checkpoint import StockCheckpoints

MiB = 1 << 20

# --- what is validated on loading -------------------------------------------------------------------------

PAGES = {0: b"first", 69: b"last"}
FILE = MigrationFile(blocks=[Block("pc.ram", 70, PAGES), Block("vga.vram", 1, {0: b"vga"})], alignment=PAGE)
STALE = [replace(FILE.blocks[0], stale=dict.fromkeys(range(1, 69), b"stale")), FILE.blocks[1]]
NOBODYS = Device("nobodys", b"nobody's state", instance_id=7)
RAM = b"".join(PAGES.get(page, b"").ljust(PAGE, b"\0") for page in range(70))

Change = Callable[[bytes, dict[str, int]], bytes]


def put(mark: str, data: bytes, at: int = 0) -> Change:
    """Write over a field."""

    def change(content: bytes, marks: dict[str, int]) -> bytes:
        start = marks[mark] + at
        return content[:start] + data + content[start + len(data) :]

    return change


def cut(mark: str, at: int = 0) -> Change:
    """End the file there."""
    return lambda content, marks: content[: marks[mark] + at]


BROKEN: list[tuple[str, Change, str]] = [
    ("magic wrong", put("magic", b"QEVN"), "Not a migration stream"),
    ("stream at another offset", lambda content, marks: bytes(PAGE) + content, "at byte 0x0"),
    ("version 2", put("version", be32(2)), "version 2"),
    ("version 4", put("version", be32(4)), "version 4"),
    ("config byte missing", put("configuration", b"\1"), "Configuration section missing"),
    ("unknown capability name", put("capabilities", b"mapped-rom", at=0x25), "mapped-rom"),
    ("machine name beyond reason", put("machine.length", be32(1 << 30)), "plausible"),
    ("another iterable section", put("ram.idstr", b"\3raw"), "'raw' is not supported"),
    ("header version > 1", put("pc.ram.version", be32(2)), "version 2"),
    ("page_size 0", put("pc.ram.page_size", be64(0)), "page_size 0"),
    ("page_size 2048", put("pc.ram.page_size", be64(2048)), "page_size 2048"),
    ("page_size 8192", put("pc.ram.page_size", be64(8192)), "page_size 8192"),
    ("bitmap unreadable", put("pc.ram.bitmap_offset", be64(1 << 40)), "bitmap_offset"),
    ("region has bad alignment", put("pc.ram.pages_offset", be64(PAGE + 1)), "alignment"),
    ("pages_offset wrong but aligned", put("pc.ram.pages_offset", be64(2 * PAGE)), "at byte"),
    ("pages before the end of the bitmap", put("vga.vram.pages_offset", be64(0)), "at byte"),
    ("used_length too large", put("pc.ram.used_length", be64(1 << 40)), "at byte"),
    ("used_length too small", put("pc.ram.used_length", be64(PAGE)), "at byte"),
    ("used_length no multiple of a page", put("pc.ram.used_length", be64(100)), "used_length"),
    ("total too large", put("total", be64(72 * PAGE | 4)), "at byte"),
    ("total too small", put("total", be64(70 * PAGE | 4)), "at byte"),
    ("total wraps", put("total", be64((1 << 64) - PAGE | 4)), "at byte"),
    ("bitmap past the last page", put("pc.ram.bitmap", b"\xff" * 16), "past the last page"),
    ("cut inside the pages", cut("pc.ram.page.69", 1), "at byte"),
    ("cut inside a bitmap", cut("pc.ram.bitmap", 8), "at byte"),
    ("cut in the device state", cut("timer.payload", 3), "at byte"),
    ("cut before the end of file mark", cut("eof"), "at byte"),
    ("flag PAGE in a RAM section", put("part.0.eos", be64(0x08)), "RAM flags"),
    ("flag ZERO in a RAM section", put("part.0.eos", be64(0x02)), "RAM flags"),
    ("flag XBZRLE in a RAM section", put("part.0.eos", be64(0x40)), "RAM flags"),
    ("flag HOOK in a RAM section", put("part.0.eos", be64(0x80)), "RAM flags"),
    ("flag MULTIFD_FLUSH in a RAM section", put("part.0.eos", be64(0x200)), "RAM flags"),
    ("flag MEM_SIZE after the start", put("part.0.eos", be64(0x04)), "RAM flags"),
    ("flag CONTINUE in a RAM section", put("part.0.eos", be64(0x20)), "RAM flags"),
    ("flag COMPRESS_PAGE in a RAM section", put("part.0.eos", be64(0x100)), "RAM flags"),
    ("unknown flag in a RAM section", put("part.0.eos", be64(0x800)), "RAM flags"),
    ("footer missing", put("ram.footer", b"\0"), "footer"),
    ("footer of another section", put("ram.footer", b"\x7e" + be32(99)), "footer"),
    ("footer of a device missing", put("timer.footer", b"\0"), "timer"),
    ("footer of another device", put("timer.footer", b"\x7e" + be32(201)), "timer"),
    ("devices in another order than in the vmdesc", put("timer.idstr", b"\5rtc34"), "stands where"),
    ("section id twice", put("timer.section_id", be32(1)), "occurs twice"),
    ("section ram of another version", put("ram.version_id", be32(3)), "version"),
    ("name of a block twice", put("vga.vram", b"\6pc.ram\0\0"), "at byte"),
]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A mount of nothing, which no broken file fills."""
    directory = tmp_path_factory.mktemp("empty")
    mounted = Mounted("none", directory / "mnt", directory / "log", deadline=MODULE_DEADLINE)
    yield mounted
    mounted.clean_up()


@pytest.mark.parametrize("multifd", ["on", "off"])
@pytest.mark.parametrize(("change", "text"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_file(change: Change, text: str, multifd: str, empty: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "broken"
    path.write_bytes(change(*FILE.build()))
    empty.ctl(f"migrate_set_capability multifd {multifd}")
    before = footprint(empty.pid)
    with pytest.raises(OSError, match="error: ") as caught:
        empty.ctl(f"migrate_incoming file:{path}")
    assert caught.value.errno == errno.EINVAL
    words = str(caught.value.strerror)
    assert words.startswith(f"error: {path}: at byte 0x")
    assert text in words
    assert "\n" not in words
    assert footprint(empty.pid) == before
    assert list(empty.ram.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "error"), [("/", errno.EINVAL), ("/dev/zero", errno.EINVAL), ("/nowhere", errno.ENOENT)]
)
def test_what_is_no_file(path: str, error: int, empty: Mounted) -> None:
    with pytest.raises(OSError, match=f"error: {path}: ") as caught:
        empty.ctl(f"migrate_incoming file:{path}")
    assert caught.value.errno == error
    assert list(empty.ram.iterdir()) == []


FINE: list[tuple[str, MigrationFile, Change]] = [
    ("as it is", FILE, lambda content, marks: content),
    ("header version 0", FILE, put("pc.ram.version", be32(0))),
    ("no vmdesc", replace(FILE, vmdesc=False), lambda content, marks: content),
    ("vmdesc cut", FILE, cut("vmdesc.json", 20)),
    ("vmdesc is no JSON", FILE, put("vmdesc.json", b"{{{{")),
    ("trailing garbage", FILE, lambda content, marks: content + b"garbage"),
    ("bitmap all ones", FILE, put("pc.ram.bitmap", b"\xff" * 8 + b"\x3f")),
    ("several parts", replace(FILE, part_count=7), lambda content, marks: content),
    ("no switchover command", replace(FILE, switchover_start=False), lambda content, marks: content),
    ("no footers", replace(FILE, footers=False), lambda content, marks: content),
    ("a device that nobody knows", replace(FILE, devices=[NOBODYS, *FILE.devices]), lambda content, marks: content),
    ("a device of a newer version", FILE, put("timer.version_id", be32(1 << 31))),
    ("stale bytes under a clear bit", replace(FILE, blocks=STALE), lambda content, marks: content),
]


@pytest.mark.parametrize(("file", "change"), [case[1:] for case in FINE], ids=[case[0] for case in FINE])
def test_a_file_that_is_fine(file: MigrationFile, change: Change, mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "fine"
    path.write_bytes(change(*file.build()))
    mounted = mount("none")
    mounted.ctl(f"migrate_incoming file:{path}")
    assert (mounted.ram / "pc.ram").read_bytes() == RAM


@pytest.mark.parametrize(
    ("capabilities", "options"),
    [
        ((), "mapped_ram=on"),
        (("mapped-ram",), "multifd=off,mapped_ram=off"),
        (("mapped-ram",), "x_ignore_shared=on"),
        (("x-ignore-shared", "mapped-ram"), "x_ignore_shared=off"),
    ],
)
def test_a_capability_on_one_side_only(
    capabilities: tuple[str, ...], options: str, mount_point: Path, tmp_path: Path
) -> None:
    # QEMU refuses that; here the file says what it is, and a capability is about the next save.
    path = tmp_path / "checkpoint"
    replace(FILE, capabilities=capabilities).write(path)
    result = run_mount(path, mount_point, options, flags=("-f",))
    assert (result.returncode, result.stderr) == (0, "")


def test_ram_that_is_left_out_has_to_be_named(empty: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    blocks = [replace(FILE.blocks[0], ignored=True), FILE.blocks[1]]
    replace(FILE, blocks=blocks, capabilities=["x-ignore-shared", "mapped-ram"]).write(path)
    with pytest.raises(OSError, match=rf"error: {path}: leaves out pc.ram .*-o shared=pc\.ram:PATH") as caught:
        empty.ctl(f"migrate_incoming file:{path}")
    assert caught.value.errno == errno.EINVAL
    assert list(empty.ram.iterdir()) == []


# --- how a save fails -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """4 MiB, on which short writes happen before there is no space left."""
    disk = Disk("tmpfs", tmp_path / "image", tmp_path / "small", 4 * MiB)
    yield disk.path
    disk.close()


@pytest.mark.parametrize(
    ("options", "writers"),
    [
        ("multifd=on,direct_io=on", "running"),
        ("multifd=on,direct_io=off", "running"),
        ("multifd=on,direct_io=on", "stopped"),
        ("multifd=off,direct_io=on", "running"),
        ("multifd=off,direct_io=off", "stopped"),
    ],
)
def test_no_space_left(options: str, writers: str, small_disk: Path, mount: Mount) -> None:
    path = small_disk / "checkpoint"
    mounted = mount(path, f"ram=pc.ram:8M,{options}")
    ram = mounted.ram / "pc.ram"
    with ram.open("r+b") as file:
        file.write(os.urandom(MiB))
    mounted.ctl("save")
    former = path.read_bytes()
    before = footprint(mounted.pid)
    data = os.urandom(8 * MiB)
    with ram.open("r+b") as file:
        file.write(data)
    if writers == "stopped":
        mounted.ctl("stop")
    for command in ("save", "save ram-only", f"migrate file:{small_disk}/other"):
        with pytest.raises(OSError, match="No space left on device") as caught:
            mounted.ctl(command)
        assert caught.value.errno == errno.ENOSPC
        migration = mounted.status()["migration"]
        assert migration["status"] == "failed"
        assert migration["error-desc"].endswith(": No space left on device")
        assert mounted.ctl("info migrate").startswith(f"Migration status: failed ({migration['error-desc']})")
        assert os.listdir(small_disk) == [path.name]
        assert path.read_bytes() == former
        assert footprint(mounted.pid) == before
        assert mounted.status()["writers"] == writers
    assert ram.read_bytes() == data
    subprocess.run(["mount", "-o", "remount,size=32M", small_disk], check=True)
    mounted.ctl("save")
    assert decode(path).blocks["pc.ram"].tobytes() == data


def test_a_save_by_somebody_who_may_not(public: Path, mount: Mount) -> None:
    closed = public / "closed"
    closed.mkdir(0o700)
    mounted = mount(public / "checkpoint", "ram=pc.ram:1M,allow_other,umask=0", path=public / "mnt")
    script = f"exec 3<>{mounted.path}/ctl; echo save {closed}/file >&3 && exit 9; cat <&3"
    result = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-c", script],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, f"error: {closed}/file: Permission denied\n")
    assert "Permission denied" in result.stderr
    assert os.listdir(closed) == []


def test_a_second_save_right_after_the_first(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:1M")
    for _ in range(3):  # QEMU refuses that until `cont`
        mounted.ctl("save")
        mounted.ctl(f"migrate file:{tmp_path}/other")
    assert (tmp_path / "checkpoint").read_bytes() == (tmp_path / "other").read_bytes()


# --- what query-migrate tells -----------------------------------------------------------------------------


async def test_query_migrate_has_qemus_names(
    stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path
) -> None:
    checkpoint = stock_checkpoint()
    async with checkpoint.qemu() as vm:
        await vm.load(checkpoint.path)
        theirs = await vm.migrate_to(tmp_path / "theirs", multifd=2)
        their_text = await vm.hmp("info migrate")
    mounted = mount(checkpoint.path)
    mounted.ctl(f"save {tmp_path / 'ours'}")
    ours = mounted.status()["migration"]
    assert ours.keys() == theirs.keys() - {"downtime"}  # no guest was paused here
    assert ours["ram"].keys() == theirs["ram"].keys()
    for name in ("status", "page-size", "total"):
        assert {**ours, **ours["ram"]}[name] == {**theirs, **theirs["ram"]}[name]
    assert {type(ours["ram"][name]) for name in ours["ram"] if name != "mbps"} == {int}

    def names(text: str) -> list[str]:
        lines = text[text.index("Migration status") :].replace("\r", "").splitlines()
        return [line.split(":")[0].strip() for line in lines if ":" in line]

    assert [name for name in names(mounted.ctl("info migrate")) if name not in names(their_text)] == []


@pytest.mark.parametrize(("multifd", "multifd_bytes"), [("on", 2 * MiB), ("off", 0)])
def test_query_migrate_counts(multifd: str, multifd_bytes: int, mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:8M,ram=vga.vram:1M", f"multifd={multifd}")
    assert mounted.status()["migration"] == {}
    assert mounted.ctl("info migrate") == "Migration status: none"
    with (mounted.ram / "pc.ram").open("r+b") as file:
        file.write(os.urandom(2 * MiB) + bytes(MiB))
    started = time.monotonic()
    mounted.ctl("save")
    elapsed = (time.monotonic() - started) * 1000
    migration: dict[str, Any] = mounted.status()["migration"]
    ram = migration["ram"]
    assert migration["status"] == "completed"
    assert 0 <= migration["setup-time"] <= migration["total-time"] <= elapsed + 1
    assert ram["total"] == 9 * MiB
    assert ram["remaining"] == 0
    assert (ram["normal"], ram["duplicate"]) == (512, 9 * 256 - 512)
    assert ram["normal-bytes"] == ram["transferred"] == 2 * MiB
    assert ram["multifd-bytes"] == multifd_bytes
    assert ram["page-size"] == PAGE
    text = mounted.ctl("info migrate")
    for line in (
        "Migration status: completed",
        "total ram: 9216 kbytes",
        "normal: 512 pages",
        "page size: 4 kbytes",
        f"multifd bytes: {multifd_bytes >> 10} kbytes",
    ):
        assert line in text.splitlines()


def test_query_migrate_counts_what_remains(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:8M", "max_bandwidth=64k")  # it would be minutes
    mounted.fill(1)
    mounted.ctl("save nowait")
    while not (ram := mounted.status()["migration"]["ram"])["transferred"]:
        pass  # no state of QEMU's says that pages have gone
    assert 0 < ram["remaining"] < ram["total"] == 8 * MiB
    assert ram["transferred"] + ram["remaining"] == ram["total"]
    (line,) = (line for line in mounted.ctl("info migrate").splitlines() if line.startswith("remaining ram: "))
    assert 0 < int(line.split()[2]) <= ram["remaining"] >> 10
    mounted.ctl("cancel")


STATUS_KEYS = [
    "version", "pid", "spec", "state", "base", "base-offset", "base-machine", "base-run-state", "vmstate",
    "direct-io", "writers", "qmp", "guest", "capture", "users", "shared-use", "lease", "block-count",
    "page-count", "zero-pages", "checkpoint-pages", "read-pages",
    "written-pages", "restored", "overlay-bytes", "set-aside-pages", "waiting-readers", "storage", "views",
    "views-missing", "time-to-first-byte", "time-to-full", "verify", "bad-page-count", "last-command",
    "last-outcome", "last-save", "last-save-to", "last-save-downtime", "log",
    "status", "error-desc", "total-time", "setup-time", "downtime", "total", "transferred", "remaining", "normal",
    "duplicate", "mbps",
]  # fmt: skip


def test_status_has_always_all_keys_in_the_same_order(mount: Mount, tmp_path: Path) -> None:
    def keys() -> list[str]:
        return [line.split(" ")[0] for line in (mounted.path / "status").read_text().splitlines()]

    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:1M")
    assert keys() == STATUS_KEYS
    for command in ("save", "restore", "stop", "cont", "reset", "info migrate"):
        mounted.ctl(command)
        assert keys() == STATUS_KEYS
        lines = dict(line.split(" ", 1) for line in (mounted.path / "status").read_text().splitlines())
        assert lines["last-command"] == command
        document = json.loads((mounted.path / "status.json").read_text())
        assert [key for key in document if key in STATUS_KEYS] == [key for key in STATUS_KEYS if key in document]
