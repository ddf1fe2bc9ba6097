"""Addresses: QEMU's rules for URIs and channels, its words, and QEMU itself."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import CommandError
from ckptfs.migration.address import (
    ExecAddress,
    FdAddress,
    FileMigrationArgs,
    MigrateAddress,
    ObjectAddress,
    RdmaAddress,
    SocketAddress,
    parse_channels,
    parse_migrate_json,
    parse_target,
    parse_uri,
    seekable_file,
)
from tests.migration.conftest import StockMonitor

PATH = "/nonexistent/x"
FILE = {"transport": "file", "filename": PATH, "offset": 0}


def main_channel(**address: Any) -> dict[str, Any]:
    return {"channels": [{"channel-type": "main", "addr": address}]}


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("file:/p", FileMigrationArgs("/p", 0)),
        ("file:p", FileMigrationArgs("p", 0)),
        ("file:/p,offset=0x1001", FileMigrationArgs("/p", 0x1001)),
        ("file:/p,offset=4k", FileMigrationArgs("/p", 4096)),
        ("file:/a b,c=d,offset=1", FileMigrationArgs("/a b,c=d", 1)),
        ("file:file:/p", FileMigrationArgs("file:/p", 0)),
        ("fd:5", FdAddress("5")),
        ("fd:mig", FdAddress("mig")),
        ("tcp:host:4444", SocketAddress("inet", "host:4444")),
        ("unix:/run/mig", SocketAddress("unix", "/run/mig")),
        ("vsock:2:1", SocketAddress("vsock", "2:1")),
        ("exec:cat > x", ExecAddress(("/bin/sh", "-c", "cat > x"))),
        ("rdma:host:1", RdmaAddress("host:1")),
    ],
)
def test_a_uri(uri: str, address: MigrateAddress) -> None:
    assert parse_uri(uri) == address


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("file:/p,offset=0x20M", "file URI has bad offset 0x20M: Invalid argument"),
        ("file:/p,offset=", "file URI has bad offset : Invalid argument"),
        ("file:/p,offset=4k,x=1", "file URI has bad offset 4k,x=1: Invalid argument"),
        ("file:/p,offset=1,offset=2", "file URI has bad offset 1,offset=2: Invalid argument"),
        ("file:/p,offset=16E", "file URI has bad offset 16E: Numerical result out of range"),
        ("file:/p,offset=-1", "file URI has bad offset -1: Numerical result out of range"),
        ("nosuch:x", "unknown migration protocol: nosuch:x"),
        ("FILE:/p", "unknown migration protocol: FILE:/p"),
        ("", "unknown migration protocol: "),
        ("fd:", "invalid file descriptor address"),
        ("file:/dev/fdset/x", "Could not parse fdset /dev/fdset/x"),
        ("file:/dev/fdset/", "Could not parse fdset /dev/fdset/"),
        ("file:/dev/fdset/-1", "Could not parse fdset /dev/fdset/-1"),
        ("file:/dev/fdset/1/2", "Could not parse fdset /dev/fdset/1/2"),
        ("file:/dev/fdset/0x1", "Could not parse fdset /dev/fdset/0x1"),
        ("file:/dev/fdset/99999999999", "Could not parse fdset /dev/fdset/99999999999"),
    ],
)
def test_a_uri_is_refused_as_stock_qemu_does(stock_monitor: StockMonitor, uri: str, text: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_uri(uri)
    assert str(caught.value) == text
    assert stock_monitor.qmp_error("migrate", uri=uri) == text


def test_a_path_that_is_no_uri_is_refused_as_stock_qemu_does_with_a_hint(stock_monitor: StockMonitor) -> None:
    with pytest.raises(CommandError) as caught:
        parse_uri("/p")
    assert str(caught.value) == f"{stock_monitor.qmp_error('migrate', uri='/p')} (did you mean file:/p?)"


@pytest.mark.parametrize("uri", ["file:", "file:/p,offset=8E", "file:/a\0b", "file:/\ud800"])
def test_a_uri_that_no_file_can_have(uri: str) -> None:
    with pytest.raises(CommandError):
        parse_uri(uri)


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ({"uri": "file:/p,offset=1"}, FileMigrationArgs("/p", 1)),
        ({"uri": "file:/p", "detach": True}, FileMigrationArgs("/p")),
        ({"uri": "file:/p", "channels": []}, FileMigrationArgs("/p")),
        (
            main_channel(transport="file", filename="/p,offset=2", offset=4096),
            FileMigrationArgs("/p,offset=2", 4096),
        ),
        (main_channel(transport="socket", type="fd", str="mig"), FdAddress("mig")),
        (main_channel(transport="socket", type="unix", path="/s"), SocketAddress("unix", "/s")),
        (main_channel(transport="socket", type="inet", host="h", port="1"), SocketAddress("inet", "h:1")),
        (main_channel(transport="socket", type="vsock", cid="2", port="1"), SocketAddress("vsock", "2:1")),
        (main_channel(transport="exec", args=["cat", "x"]), ExecAddress(("cat", "x"))),
        (main_channel(transport="rdma", host="h", port="1"), RdmaAddress("h:1")),
    ],
)
def test_channels(arguments: dict[str, Any], address: MigrateAddress) -> None:
    assert parse_channels(arguments) == address
    assert parse_migrate_json(json.dumps(arguments)) == address
    assert parse_migrate_json(json.dumps({"execute": "migrate", "arguments": arguments, "id": 1})) == address


def test_the_channel_object_of_incoming() -> None:
    channel = main_channel(transport="file", filename="/p", offset=0)["channels"][0]
    assert parse_migrate_json(json.dumps(channel)) == FileMigrationArgs("/p", 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"channels": []},
        {"uri": 5},
        {"uri": None},
        {"channels": 5},
        {"channels": [5]},
        {"channels": [{}]},
        {"channels": [{"channel-type": "main"}]},
        {"channels": [{"addr": FILE}]},
        {"channels": [{"channel-type": "foo", "addr": FILE}]},
        {"channels": [{"channel-type": "main", "addr": FILE}] * 2},
        {"channels": [{"channel-type": "main", "addr": FILE, "x": 1}]},
        {"channels": [{"channel-type": "main", "addr": 5}]},
        main_channel(),
        main_channel(transport="foo"),
        main_channel(transport="file"),
        main_channel(transport="file", filename=PATH),
        main_channel(transport="file", offset=0),
        main_channel(transport="file", filename=5, offset=0),
        main_channel(transport="file", filename=PATH, offset="0x1000"),
        main_channel(transport="file", filename=PATH, offset=1 << 64),
        main_channel(transport="file", filename=PATH, offset=1.5),
        main_channel(transport="file", filename=PATH, offset=True),
        main_channel(**FILE, x=1),
        main_channel(transport="socket"),
        main_channel(transport="socket", type="fd"),
        main_channel(transport="socket", type="inet"),
        main_channel(transport="socket", type="inet", host="h"),
        main_channel(transport="socket", type="inet", host="h", port=5),
        main_channel(transport="socket", type="foo"),
        main_channel(transport="exec"),
        main_channel(transport="exec", args="x"),
        main_channel(transport="rdma", host="h"),
        {"uri": f"file:{PATH}", "nosuch": 1},
        {"uri": f"file:{PATH}", "detach": 1},
        {"uri": f"file:{PATH}", "resume": True},
        {"uri": f"nosuch:{PATH}"},
    ],
)
def test_arguments_are_refused_as_stock_qemu_does(stock_monitor: StockMonitor, arguments: dict[str, Any]) -> None:
    with pytest.raises(CommandError) as caught:
        parse_channels(arguments)
    assert str(caught.value) == stock_monitor.qmp_error("migrate", **arguments)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "[]",
        "{",
        "[" * 100000,
        '{"uri": "file:/p", "uri": "file:/q"}',
        '{"uri": ' + "9" * 5000 + "}",
        '{"uri": "file:/a\\u0000b"}',
        '{"uri": "file:/\\ud800"}',
        '{"execute": 5}',
        '{"execute": "quit"}',
        '{"execute": "migrate", "arguments": 5}',
        '{"execute": "migrate", "x": 5}',
        '{"channels": [{"channel-type": "main", "addr": {"transport": "file", "filename": "/p", "offset": -1}}]}',
        '{"uri": "file:/p", "channels": [{"channel-type": "main", "addr": {"transport": "exec", "args": []}}]}',
    ],
)
def test_json_that_is_no_migrate_command(text: str) -> None:
    with pytest.raises(CommandError):
        parse_migrate_json(text)


def test_a_target_is_a_uri_or_a_path() -> None:
    assert parse_target("/ckpt/vm,offset=1") == FileMigrationArgs("/ckpt/vm,offset=1")
    assert parse_target("./a:b") == FileMigrationArgs("./a:b")
    assert parse_target("file:/ckpt/vm,offset=1") == FileMigrationArgs("/ckpt/vm", 1)
    assert parse_target("/mnt/\udcff") == FileMigrationArgs("/mnt/\udcff")
    with pytest.raises(CommandError, match="unknown migration protocol: a:b"):
        parse_target("a:b")


@pytest.mark.parametrize(
    ("uri", "transport"),
    [("tcp:h:1", "socket"), ("unix:/s", "socket"), ("exec:cat", "exec"), ("rdma:h:1", "rdma")],
)
def test_what_is_not_seekable_is_refused_by_name(uri: str, transport: str) -> None:
    with pytest.raises(CommandError, match=f"^transport '{transport}' is not supported: .*seekable file"):
        seekable_file(parse_uri(uri))


def test_files_and_descriptors_are_seekable() -> None:
    for address in (FileMigrationArgs("/p", 1), FdAddress("5")):
        assert seekable_file(address) is address


@pytest.mark.parametrize(
    ("filename", "fdset_id"),
    [("/dev/fdset/1", 1), ("/dev/fdset/ 1", 1), ("/dev/fdset/007", 7), ("/dev/fdset", None), ("/p", None)],
)
def test_an_fdset(filename: str, fdset_id: int | None) -> None:
    assert FileMigrationArgs(filename).fdset_id == fdset_id


@given(st.text(), st.text())
def test_any_uri_is_an_address_or_a_command_error(scheme: str, rest: str) -> None:
    for uri in (scheme, f"{scheme}:{rest}", f"file:{rest}", f"file:/p,offset={rest}", f"fd:{rest}"):
        try:
            parse_uri(uri)
        except CommandError:
            continue


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: (
        st.lists(values) | st.dictionaries(st.sampled_from(["uri", "channels", "addr", "offset"]), values)
    ),
    max_leaves=10,
)


@given(json_values)
def test_any_json_is_an_address_or_a_command_error(value: object) -> None:
    with contextlib.suppress(CommandError):
        parse_migrate_json(json.dumps(value))


@pytest.mark.parametrize(
    ("text", "bucket", "key"),
    [
        ("s3://bucket/a/b c", "bucket", "a/b c"),
        ("gs://bucket/vm", "bucket", "vm"),
        ("az://container/vm", "container", "vm"),
        ("https://host:8443/dir/vm", "host:8443", "dir/vm"),
        ("http://127.0.0.1/vm", "127.0.0.1", "vm"),
    ],
)
def test_objects(text: str, bucket: str, key: str) -> None:
    address = parse_target(text)
    assert isinstance(address, ObjectAddress)
    assert (address.bucket, address.key) == (bucket, key)
    assert seekable_file(parse_uri(text)) == address


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3://", "names no object: expected s3://BUCKET/KEY"),
        ("s3://bucket", "names no object"),
        ("s3://bucket/", "names no object"),
        ("s3://bucket/a/", "names no object"),
        ("https://host", "names no object: expected https://HOST/PATH"),
        ("s3://bucket/a/../b", "a part of its path is empty"),
        ("s3://bucket//a", "a part of its path is empty"),
        ("s3://bu cket/a", "no bucket has that name"),
        ("s3://bucket/a\n", "holds a character that no name of an object can have"),
        ("https://user:secret@host/vm", "may hold a secret"),
        ("https://host/vm?X-Amz-Signature=secret", "may hold a secret"),
        ("s3://KEY:secret@bucket/vm", "may hold a secret"),
    ],
)
def test_what_names_no_object(text: str, words: str) -> None:
    with pytest.raises(CommandError, match=words) as caught:
        parse_target(text)
    assert "secret@" not in str(caught.value)
    assert "Signature" not in str(caught.value)


def test_a_scheme_without_slashes_is_no_object() -> None:
    with pytest.raises(CommandError, match="unknown migration protocol: s3:vm"):
        parse_target("s3:vm")
