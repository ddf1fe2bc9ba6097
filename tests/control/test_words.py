"""QEMU's words on ctl: its monitor's example, URIs, parameters and capabilities, and what it says to wrong ones."""

import errno
import json
import os
from pathlib import Path

import pytest
import trio

from ckptfs.migration.capabilities import CAPABILITIES
from ckptfs.migration.parameters import PARAMETERS
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import Mounted
from tests.qemu.stock_checkpoint import StockCheckpoints

MiB = 1 << 20


def refusal(mounted: Mounted, command: str) -> tuple[int | None, str]:
    """The errno and the words of a command that is refused."""
    with pytest.raises(OSError, match="error: ") as caught:
        mounted.ctl(command)
    return caught.value.errno, str(caught.value.strerror).removeprefix("error: ")


# --- QEMU's example (docs/devel/migration/mapped-ram.rst, multifd) ------------------------------------------

EXAMPLE = """\
stop
migrate_set_capability multifd on
migrate_set_capability mapped-ram on
migrate_set_parameter max-bandwidth 0
migrate_set_parameter multifd-channels 8
migrate file:migfile
"""


async def test_qemus_example_as_it_stands(stock_checkpoint: StockCheckpoints, mount: Mount, tmp_path: Path) -> None:
    checkpoint = stock_checkpoint()
    mounted = mount(checkpoint.path)
    directory = tmp_path / "where I am"
    directory.mkdir()
    script = f'while read -r line; do echo "$line" > {mounted.path}/ctl || exit; done'
    await trio.run_process(["bash", "-c", script], stdin=EXAMPLE.encode(), cwd=directory)
    assert os.listdir(directory) == ["migfile"]
    mounted.umount()
    async with checkpoint.qemu() as vm:
        await vm.load(directory / "migfile", multifd=8)
        await vm.cont()
        tick = await vm.tick()
        assert tick > checkpoint.last_tick
        assert await vm.tick() == tick + 1


# --- words that find nothing to do -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("migrate_continue pre-switchover", "Migration not in expected state: "),
        ("migrate_cancel", "nothing is running, so there is nothing to cancel"),
        ("migrate -r file:/nowhere/file", "Cannot resume if there is no paused migration"),
        ("migrate_incoming file:/nowhere/file", "this mount already has RAM"),
    ],
)
def test_nothing_to_do(command: str, text: str, standing: Mounted) -> None:
    before = standing.status()["migration"]
    error, words = refusal(standing, command)
    assert error == (errno.EEXIST if "incoming" in command else errno.EINVAL)
    assert words.startswith(text)
    assert standing.status()["migration"] == before


# --- file: URIs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        ("0", 0),
        ("4097", 4097),
        ("0x1001", 0x1001),
        ("0X1001", 0x1001),
        ("4k", 4096),
        ("4K", 4096),
        ("1.5k", 1536),
        (".5M", MiB // 2),
        ("010", 10),
        ("512b", 512),
        ("1M", MiB),
    ],
)
def test_sizes_of_offsets(size: str, offset: int, standing: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "a, file"
    standing.ctl(f"migrate 'file:{path},offset={size}'")
    assert len(decode(path, offset).blocks["pc.ram"]) == MiB


INVALID = "Invalid argument"
OUT_OF_RANGE = "Numerical result out of range"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ("", INVALID),
        ("0x20M", INVALID),
        ("1.5", INVALID),
        ("1e3", INVALID),
        ("4k,x=1", INVALID),
        ("4k,offset=4k", INVALID),
        ("0x1.8", INVALID),
        ("4q", INVALID),
        ("-1", OUT_OF_RANGE),
        ("16E", OUT_OF_RANGE),
        ("18446744073709551616", OUT_OF_RANGE),
        ("0x10000000000000000", OUT_OF_RANGE),
    ],
)
def test_sizes_that_are_none(size: str, text: str, standing: Mounted, tmp_path: Path) -> None:
    error, words = refusal(standing, f"migrate file:{tmp_path}/file,offset={size}")
    assert (error, words) == (errno.EINVAL, f"file URI has bad offset {size}: {text}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", ["8E", "9223372036854775808"])
def test_an_offset_that_no_file_has(size: str, standing: Mounted, tmp_path: Path) -> None:
    error, words = refusal(standing, f"migrate file:{tmp_path}/file,offset={size}")
    assert error == errno.EINVAL
    assert "is outside of any file" in words


def test_a_path_that_only_json_can_say(standing: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "x,offset=1"
    address = {"transport": "file", "filename": str(path), "offset": 0}
    standing.ctl("migrate " + json.dumps({"channels": [{"channel-type": "main", "addr": address}]}))
    assert len(decode(path).blocks["pc.ram"]) == MiB


FILE = {"transport": "file", "filename": "/x", "offset": 0}


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (FILE | {"offset": "0x1000"}, "Parameter 'channels[0].addr.offset' expects uint64"),
        (FILE | {"offset": -1}, "Parameter 'channels[0].addr.offset' expects uint64"),
        (FILE | {"offset": 1.5}, "Parameter 'channels[0].addr.offset' expects uint64"),
        ({"transport": "file", "filename": "/x"}, "Parameter 'channels[0].addr.offset' is missing"),
        ({"transport": "file", "offset": 0}, "Parameter 'channels[0].addr.filename' is missing"),
        (FILE | {"filename": 1}, "Invalid parameter type for 'channels[0].addr.filename', expected: string"),
        (FILE | {"more": 1}, "Parameter 'channels[0].addr.more' is unexpected"),
        ({"transport": "none"}, "Parameter 'transport' does not accept value 'none'"),
        ({"transport": "exec", "args": ["cat"]}, "transport 'exec' is not supported"),
        ({"transport": "rdma", "host": "h", "port": "1"}, "transport 'rdma' is not supported"),
        ({"transport": "socket", "type": "unix", "path": "/x"}, "transport 'socket' is not supported"),
        ({"transport": "socket", "type": "inet", "host": "h", "port": "1"}, "transport 'socket' is not supported"),
        ({"transport": "socket", "type": "fd", "str": "x"}, "fd:x: no descriptor of that name was handed in"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("command", ["migrate", "migrate_incoming"])
def test_channels(command: str, address: dict[str, object], text: str, standing: Mounted) -> None:
    channels = {"channels": [{"channel-type": "main", "addr": address}]}
    if command == "migrate_incoming" and "fd:" in text:
        text = "this mount already has RAM"
    assert refusal(standing, f"{command} {json.dumps(channels)}")[1].startswith(text)


# --- parameters -------------------------------------------------------------------------------------------

# name, default as in its file; value on ctl, value in its file
SETTINGS = [
    ("max-bandwidth", "0", "100", str(100 * MiB)),
    ("max-bandwidth", "0", "1.5M", str(3 * MiB // 2)),
    ("max-bandwidth", "0", "0x10", str(16 * MiB)),
    ("multifd-channels", "4", "1", "1"),
    ("multifd-channels", "4", "255", "255"),
    ("multifd-channels", "4", "0x10", "16"),
    ("multifd-channels", "4", "017", "15"),
    ("direct-io", "on", "off", "off"),
    ("zero-page-detection", "multifd", "legacy", "legacy"),
    ("zero-page-detection", "multifd", "none", "none"),
    ("downtime-limit", "300", "2000000", "2000000"),
    ("avail-switchover-bandwidth", "0", "1", str(MiB)),
    ("multifd-compression", "none", "none", "none"),
    ("mode", "normal", "normal", "normal"),
    ("xbzrle-cache-size", "67108864", "4k", "4096"),
    ("max-postcopy-bandwidth", "0", "1M", str(MiB)),
    ("cpu-throttle-initial", "20", "99", "99"),
    ("announce-initial", "50", "100000", "100000"),
]


@pytest.mark.parametrize(("name", "default", "value", "shown"), SETTINGS)
def test_a_parameter_by_all_doors(name: str, default: str, value: str, shown: str, standing: Mounted) -> None:
    path = standing.path / "parameters" / name
    assert path.read_text() == f"{default}\n"
    assert standing.ctl(f"migrate_set_parameter {name} {value}").startswith(f"ok {name} {shown}")
    assert path.read_text() == f"{shown}\n"
    line = next(
        line for line in standing.ctl("info migrate_parameters").splitlines() if line.startswith(f"{name}:")
    )
    assert line.split()[1] == shown
    path.write_text(f"{default}\n")
    assert path.read_text() == f"{default}\n"


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("nosuch 1", "invalid parameter value: nosuch"),
        ("multifd-channel 1", "invalid parameter value: multifd-channel (did you mean multifd-channels?)"),
        ("multifd-channels 0", "Parameter 'multifd_channels' expects a value between 1 and 255"),
        ("multifd-channels 256", "Parameter 'multifd-channels' expects uint8_t"),
        ("multifd-channels 1x", "Parameter 'multifd-channels' expects uint64"),
        ("multifd-channels -1", "Parameter 'multifd-channels' expects uint8_t"),
        ("max-bandwidth 1x", "Invalid size 1x"),
        ("max-bandwidth -1", "Invalid size -1"),
        ("max-bandwidth 16E", "Invalid size 16E"),
        ("max-bandwidth 8E", "Invalid size 8E"),
        ("direct-io perhaps", "Parameter 'direct-io' expects 'on' or 'off'"),
        ("zero-page-detection all", "Parameter 'zero-page-detection' does not accept value 'all'"),
        (
            "downtime-limit 2000001",
            "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms",
        ),
        ("multifd-compression zstd", "Mapped-ram only available for non-compressed non-TLS multifd migration"),
        ("multifd-compression zlib", "Mapped-ram only available for non-compressed non-TLS multifd migration"),
        ("multifd-compression lzma", "Parameter 'multifd-compression' does not accept value 'lzma'"),
        ("tls-creds x", "Mapped-ram only available for non-compressed non-TLS multifd migration"),
        ("mode cpr-reboot", "mode 'cpr-reboot' is not supported: a checkpoint is saved in mode 'normal'"),
        ("mode cpr-transfer", "mode 'cpr-transfer' is not supported: a checkpoint is saved in mode 'normal'"),
        ("mode nosuch", "Parameter 'mode' does not accept value 'nosuch'"),
        ("direct-io", "usage: migrate_set_parameter NAME VALUE"),
        ("direct-io on off", "usage: migrate_set_parameter NAME VALUE"),
    ],
)
def test_a_parameter_that_is_refused(setting: str, text: str, standing: Mounted) -> None:
    before = standing.ctl("info migrate_parameters")
    error, words = refusal(standing, f"migrate_set_parameter {setting}")
    assert error == errno.EINVAL
    assert words.startswith(text)
    assert standing.ctl("info migrate_parameters") == before


def test_every_parameter_and_capability_has_a_file_that_takes_back_what_it_shows(standing: Mounted) -> None:
    parameters, capabilities = standing.path / "parameters", standing.path / "capabilities"
    assert sorted(os.listdir(parameters)) == sorted(PARAMETERS)
    assert sorted(os.listdir(capabilities)) == sorted(CAPABILITIES)
    for path in (*parameters.iterdir(), *capabilities.iterdir()):
        text = path.read_text()
        path.write_text(text)
        assert path.read_text() == text


def test_a_parameter_that_does_nothing_says_so(standing: Mounted) -> None:
    assert "(without effect: " in standing.ctl("migrate_set_parameter cpu-throttle-initial 20")
    assert "(without effect: " in standing.ctl("migrate_set_capability auto-converge on")
    standing.ctl("migrate_set_capability auto-converge off")


# --- capabilities -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "setting", "text"),
    [
        ([], "nosuch on", "invalid parameter value: nosuch"),
        ([], "mapped-rom on", "invalid parameter value: mapped-rom (did you mean mapped-ram?)"),
        ([], "multifd maybe", "Expected 'on' or 'off'"),
        ([], "multifd", "usage: migrate_set_capability NAME on|off"),
        ([], "xbzrle on", "Multifd is not compatible with xbzrle"),
        (["multifd off"], "xbzrle on", "Mapped-ram migration is incompatible with xbzrle"),
        (["multifd off", "mapped-ram off"], "xbzrle on", "capability 'xbzrle' is not supported"),
        ([], "postcopy-ram on", "Postcopy is not yet compatible with multifd"),
        (["multifd off"], "postcopy-ram on", "Mapped-ram migration is incompatible with postcopy"),
        (["x-ignore-shared on"], "postcopy-ram on", "Postcopy is not compatible with ignore-shared"),
        (["multifd off"], "zero-copy-send on", "Zero copy only available for non-compressed non-TLS multifd"),
        ([], "zero-copy-send on", "capability 'zero-copy-send' is not supported"),
        ([], "switchover-ack on", "Capability 'switchover-ack' requires capability 'return-path'"),
        ([], "postcopy-preempt on", "Postcopy preempt requires postcopy-ram"),
        ([], "background-snapshot on", "Background-snapshot is not compatible with multifd"),
        (["multifd off"], "background-snapshot on", "capability 'background-snapshot' is not supported"),
        ([], "dirty-bitmaps on", "capability 'dirty-bitmaps' is not supported"),
        ([], "x-colo on", "capability 'x-colo' is not supported"),
        (["auto-converge on"], "dirty-limit on", "dirty-limit conflicts with auto-converge"),
    ],
    ids=str,
)
def test_a_capability_that_is_refused(before: list[str], setting: str, text: str, standing: Mounted) -> None:
    defaults = standing.ctl("info migrate_capabilities")
    for other in before:
        standing.ctl(f"migrate_set_capability {other}")
    state = standing.ctl("info migrate_capabilities")
    error, words = refusal(standing, f"migrate_set_capability {setting}")
    assert error == errno.EINVAL
    assert words.startswith(text)
    assert standing.ctl("info migrate_capabilities") == state
    for other in reversed(before):
        name, value = other.split()
        standing.ctl(f"migrate_set_capability {name} {'off' if value == 'on' else 'on'}")
    assert standing.ctl("info migrate_capabilities") == defaults


def test_multifd_without_mapped_ram_is_refused_at_the_save(standing: Mounted, tmp_path: Path) -> None:
    standing.ctl("migrate_set_capability mapped-ram off")
    error, words = refusal(standing, f"migrate file:{tmp_path}/file")
    assert error == errno.EINVAL
    assert words.startswith("Migration requires multi-channel URIs (e.g. tcp)")
    standing.ctl("migrate_set_capability mapped-ram on")
    assert os.listdir(tmp_path) == []
