"""Saves to objects, and all that can go wrong with one: the former object stays, and no upload is left."""

import errno
import os
import subprocess
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import obstore
import pytest
from botocore.exceptions import ClientError

from ckptfs.channels.backing_file import pwrite_all
from ckptfs.channels.identity import Identity
from ckptfs.channels.stores.object_file import find_object
from ckptfs.channels.stores.upload import ObjectTarget
from ckptfs.channels.version import ObjectVersion
from ckptfs.errors import StateError, StorageError
from ckptfs.migration.address import ObjectAddress
from ckptfs.migration.store import StoreOptions
from tests.live.machines import SMALL, LiveCheckpoints, goes_on
from tests.mount.conftest import Mount
from tests.mount.decode import PAGE
from tests.mount.harness import DEADLINE, Mounted
from tests.stores.relay import Relay, Request
from tests.stores.seaweed import Seaweed
from tests.stores.test_reading import MiB, read_direct


@pytest.fixture
def saved(seaweed: Seaweed, bucket: str, mount: Mount) -> Mounted:
    """A guest of 16 MiB that has been saved to `vm1`."""
    mounted = mount(f"s3://{bucket}/vm1", "ram=pc.ram:16M")
    mounted.fill(1)
    assert seaweed.keys(bucket) == []
    assert mounted.ctl("save").startswith(f"ok saved s3://{bucket}/vm1: 4096 pages")
    assert seaweed.keys(bucket) == ["vm1"]
    assert seaweed.uploads(bucket) == []
    return mounted


def unpack(tar: bytes, directory: Path) -> Path:
    directory.mkdir()
    subprocess.run(["tar", "-xSf", "-", "-C", directory], input=tar, check=True)
    (path,) = directory.iterdir()
    return path


def test_what_is_saved_is_the_file_that_tar_makes_of_it(
    seaweed: Seaweed, bucket: str, mount: Mount, saved: Mounted, tmp_path: Path
) -> None:
    saved.ctl(f"save {tmp_path}/file")
    path = unpack(seaweed.get(bucket, "vm1"), tmp_path / "unpacked")
    assert path.name == "vm1"
    assert path.read_bytes() == (tmp_path / "file").read_bytes()
    mounted = mount(f"s3://{bucket}/vm1")
    data = mounted.fill(2, 2 * MiB)
    rest = (saved.ram / "pc.ram").read_bytes()[2 * MiB :]
    assert mounted.ctl("save").startswith("ok ")  # of a mount that came from there
    assert (mounted.ram / "pc.ram").read_bytes() == data + rest
    mounted.fill(3, 4096)
    assert mounted.ctl("save").startswith("ok ")  # and knows what it wrote
    with pytest.raises(OSError, match="somebody else has changed it") as refused:
        saved.ctl("save")
    assert refused.value.errno == errno.ESTALE
    assert saved.ctl("save force").startswith("ok ")
    assert seaweed.uploads(bucket) == []


async def test_stock_qemu_goes_on_from_what_a_live_save_has_uploaded(
    checkpoints: LiveCheckpoints, seaweed: Seaweed, bucket: str, mount: Mount, tmp_path: Path
) -> None:
    live = checkpoints.live(SMALL)
    mounted = mount(live.path)
    async with SMALL.on(mounted.ram, live.guest, incoming=f"file:{mounted.path}/vmstate") as vm:
        await goes_on(vm)
        mounted.ctl(f"qmp {vm.qmp_path}")
        last_tick = vm.ticks()[-1]
        mounted.ctl(f"save s3://{bucket}/live")
        await goes_on(vm)
    path = unpack(seaweed.get(bucket, "live"), tmp_path / "unpacked")
    async with SMALL.anonymous(live.guest) as vm:
        await vm.load(path)
        assert await vm.tick() >= last_tick


class Held:
    """A save whose upload does not get on: its parts are held on the way to the store."""

    def __init__(self, mounted: Mounted, relay: Relay, threads: ThreadPoolExecutor, command: str = "save") -> None:
        self.reached, self.released = threading.Event(), threading.Event()

        def hold(request: Request) -> bytes | None:
            if request.method == "PUT" and "partNumber" in request.path:
                self.reached.set()
                self.released.wait()
                return b""
            return None

        relay.meddle = hold
        self.saving: Future[str] = threads.submit(mounted.ctl, command)
        assert self.reached.wait(DEADLINE)


def test_a_save_that_is_cancelled_leaves_the_former_object_and_no_upload(
    seaweed: Seaweed, bucket: str, relay: Relay, saved: Mounted
) -> None:
    former = etag(seaweed, bucket, "vm1")
    saved.fill(2)
    for name, before in (("vm1", former), ("new", None)):
        with ThreadPoolExecutor() as threads:
            held = Held(saved, relay, threads, f"save s3://{bucket}/{name}")
            assert seaweed.uploads(bucket) == [name]
            assert etag(seaweed, bucket, name) == before
            held_back = threads.submit(saved.ctl, "cancel")
            saved.wait_for(lambda status: status["migration"]["status"] == "cancelling")
            relay.meddle = lambda request: None
            held.released.set()
            with pytest.raises(OSError, match="the save was cancelled"):
                held.saving.result(DEADLINE)
            assert held_back.result(DEADLINE) == "ok save cancelled"
        while seaweed.uploads(bucket):
            pass
        assert etag(seaweed, bucket, name) == before
    assert saved.ctl("save").startswith("ok ")


def etag(seaweed: Seaweed, bucket: str, key: str) -> str | None:
    """Of an object, None if there is none."""
    try:
        found: str = seaweed.client.head_object(Bucket=bucket, Key=key)["ETag"]
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return None
        raise
    return found


def test_what_a_dead_daemon_has_left_is_aborted_by_the_next_save(
    seaweed: Seaweed, bucket: str, relay: Relay, mount: Mount, saved: Mounted
) -> None:
    former = etag(seaweed, bucket, "vm1")
    with ThreadPoolExecutor() as threads:
        held = Held(saved, relay, threads)
        saved.kill()
        assert isinstance(held.saving.exception(DEADLINE), OSError)
        relay.meddle = lambda request: None
        held.released.set()
    assert seaweed.uploads(bucket) == ["vm1"]
    assert etag(seaweed, bucket, "vm1") == former
    mounted = mount(f"s3://{bucket}/vm1")
    mounted.ctl("save")
    assert seaweed.uploads(bucket) == []
    assert os.listdir(Path(os.environ["TMPDIR"]) / f"ckptfs-{os.geteuid()}") == []


def test_a_server_that_dies_during_a_save_fails_it_and_reads_until_it_is_back(
    seaweed: Seaweed, bucket: str, relay: Relay, saved: Mounted, mount: Mount
) -> None:
    reader = mount(f"s3://{bucket}/vm1")
    reader.expect_log("ERROR: pc.ram: page.*the (store can't be reached|connection to the store broke)")
    former = etag(seaweed, bucket, "vm1")
    data = (saved.ram / "pc.ram").read_bytes()
    with ThreadPoolExecutor() as threads:
        held = Held(saved, relay, threads)
        seaweed.kill()
        relay.meddle = lambda request: None
        held.released.set()
        with pytest.raises(OSError, match="the store gives no answer"):
            held.saving.result(DEADLINE)
    with pytest.raises(OSError, match="Input/output error"):
        read_direct(reader.ram / "pc.ram", 8 * MiB)
    seaweed.start()
    assert etag(seaweed, bucket, "vm1") == former
    while True:  # for a second, it is not asked for again
        try:
            assert read_direct(reader.ram / "pc.ram", 8 * MiB) == data[8 * MiB : 8 * MiB + PAGE]
        except OSError:
            continue
        break
    assert seaweed.uploads(bucket) == ["vm1"]
    assert saved.ctl("save").startswith("ok ")
    assert seaweed.uploads(bucket) == []


def test_of_two_that_save_at_once_one_is_refused(
    seaweed: Seaweed, bucket: str, relay: Relay, saved: Mounted
) -> None:
    def meddle(request: Request) -> bytes | None:
        if request.method == "POST" and "uploadId" in request.path:
            seaweed.put(bucket, "vm1", b"QEVM, written by somebody else")
        return None

    relay.meddle = meddle
    with pytest.raises(OSError, match="was written by somebody else meanwhile") as refused:
        saved.ctl("save")
    assert refused.value.errno == errno.ESTALE
    assert seaweed.get(bucket, "vm1") == b"QEVM, written by somebody else"
    assert seaweed.uploads(bucket) == []


def test_what_holds_no_checkpoint_is_not_replaced(seaweed: Seaweed, bucket: str, saved: Mounted) -> None:
    seaweed.put(bucket, "letters", b"Dear Sir")
    with pytest.raises(OSError, match="exists and holds no checkpoint"):
        saved.ctl(f"save s3://{bucket}/letters")
    with pytest.raises(OSError, match="there is no such bucket"):
        saved.ctl("save s3://nobucket/vm1")
    with pytest.raises(OSError, match="a web server takes no saves"):
        saved.ctl("save https://127.0.0.1/vm1")


def test_each_request_of_a_save_is_refused_in_its_turn(
    seaweed: Seaweed, bucket: str, relay: Relay, mount: Mount
) -> None:
    """Whatever fails: the former object or the new one, all of it; no upload; and the next save works."""
    saved = mount(f"s3://{bucket}/vm1", "ram=pc.ram:1M")
    saved.ctl("save")
    seaweed.client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    requests = count_requests(relay, saved)
    assert requests >= 6

    def refuse(at: int, request: Request) -> bytes | None:
        return BAD_REQUEST if len(relay.requests) == at + 1 else None

    for number in range(requests):
        former = etag(seaweed, bucket, "vm1")
        data = saved.fill(number, 4096)
        relay.requests.clear()
        relay.meddle = partial(refuse, number)
        with pytest.raises(OSError, match=r"\(400|\(ClientError"):
            saved.ctl("save")
        relay.meddle = lambda request: None
        assert seaweed.uploads(bucket) == []
        assert (etag(seaweed, bucket, "vm1") == former) is (number < requests - 1)  # it has been there by then
        assert saved.ctl("save").startswith("ok ")
        assert data in seaweed.get(bucket, "vm1")


BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def count_requests(relay: Relay, mounted: Mounted) -> int:
    relay.requests.clear()
    mounted.ctl("save")
    return len(relay.requests)


def test_a_store_that_refuses_a_part_fails_the_save(
    seaweed: Seaweed, bucket: str, relay: Relay, saved: Mounted
) -> None:
    def refuse(request: Request) -> bytes | None:
        if request.method == "PUT":
            return b"HTTP/1.1 507 Insufficient Storage\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        return None

    relay.meddle = refuse
    with pytest.raises(OSError, match="the store is full") as failed:
        saved.ctl("save")
    assert failed.value.errno == errno.ENOSPC
    assert seaweed.uploads(bucket) == []


def other_store(url: str) -> ObjectTarget:
    """A save as to a store that is none of S3, which have to do with less; the judge is the same server."""
    target = ObjectTarget(ObjectAddress(url), StoreOptions(), Identity.of_daemon(), None)
    target._upload = None
    pwrite_all(target.file.fd, b"QEVM" + bytes(20 * MiB - 4), 0)
    return target


def test_a_store_that_is_none_of_s3_takes_a_save_unless_somebody_has_changed_the_object(
    seaweed: Seaweed, bucket: str, relay: Relay, tmp_path: Path
) -> None:
    first = other_store(f"s3://{bucket}/vm1")
    first.publish()
    assert unpack(seaweed.get(bucket, "vm1"), tmp_path / "unpacked").stat().st_size == 20 * MiB
    assert isinstance(first.published, ObjectVersion)
    assert first.published.etag == etag(seaweed, bucket, "vm1")
    second, third = other_store(first.path), other_store(first.path)
    second.publish()
    with pytest.raises(StateError, match="somebody else has changed it"):
        third.publish()
    third.discard()
    assert etag(seaweed, bucket, "vm1") == getattr(second.published, "etag", None)
    assert seaweed.uploads(bucket) == []


def test_a_library_that_panics_ends_no_daemon(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    panic = type("PanicException", (BaseException,), {})

    def head(*_: object) -> None:
        raise panic("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(obstore, "head", head)
    with pytest.raises(StorageError, match="vm1: obstore has failed: called"):
        find_object(ObjectAddress(f"s3://{bucket}/vm1"), StoreOptions())
