"""Mounts of objects: what is fetched, how often, and what happens when the object or its store changes."""

import mmap
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import RunCkptfs
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import PAGE, decode
from tests.mount.test_silence import ERRORS, SHORT_DEADLINE, read
from tests.stores.relay import Relay
from tests.stores.seaweed import Seaweed

MiB = 1 << 20
CONTENT = np.random.default_rng(1).bytes(64 * MiB)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of 64 MiB that is full, and one that is nearly empty."""
    pages = {page: CONTENT[page * PAGE : (page + 1) * PAGE] for page in range(len(CONTENT) // PAGE)}
    path = tmp_path_factory.mktemp("objects") / "vm1"
    MigrationFile(blocks=[Block("pc.ram", len(pages), pages), Block("vga.vram", 4096, {9: b"9"})]).write(path)
    return path


@pytest.fixture(scope="module")
def stored(seaweed: Seaweed, checkpoint: Path) -> str:
    """A bucket with the checkpoint as it stands, `dense`, and as GNU tar packs it, `dir/sparse`."""
    bucket = seaweed.bucket()
    seaweed.put(bucket, "dense", checkpoint.read_bytes())
    arguments = ["tar", "--format=pax", "-cSf", "-", "-C", checkpoint.parent, checkpoint.name]
    seaweed.put(bucket, "dir/sparse", subprocess.run(arguments, check=True, capture_output=True).stdout)
    return bucket


def test_a_sparse_tar_is_mounted_and_read_once(stored: str, relay: Relay, mount: Mount) -> None:
    mounted = mount(f"s3://{stored}/dir/sparse")
    assert mounted.status()["spec"] == f"s3://{stored}/dir/sparse"
    begun = relay.count("GET")
    assert begun <= 3
    assert (mounted.ram / "pc.ram").read_bytes() == CONTENT
    assert relay.count("GET") <= begun + 66
    before = relay.count("GET")
    mounted.ctl("restore")
    assert relay.count("GET") <= before + 1
    assert (mounted.ram / "vga.vram").read_bytes() == b"9".rjust(9 * PAGE + 1, b"\0").ljust(4096 * PAGE, b"\0")
    assert relay.count("GET") <= before + 1


def test_a_dense_object_is_mounted(stored: str, mount: Mount) -> None:
    mounted = mount(f"s3://{stored}/dense")
    with (mounted.ram / "pc.ram").open("rb") as file:
        file.seek(40 * MiB + 5)
        assert file.read(3 * MiB) == CONTENT[40 * MiB + 5 : 43 * MiB + 5]


def test_exported_without_a_mount(stored: str, tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    run_ckptfs("export", f"s3://{stored}/dir/sparse", tmp_path / "copy", "--format", "mapped-ram")
    assert decode(tmp_path / "copy").blocks["pc.ram"].tobytes() == CONTENT
    assert run_ckptfs("verify", tmp_path / "copy").stdout.startswith(f"{tmp_path}/copy: sound: ")
    run_ckptfs("export", f"s3://{stored}/dense", tmp_path / "flat", "--format", "raw", "--map", "pc.ram@0")
    assert (tmp_path / "flat").read_bytes() == CONTENT


def test_eight_readers_of_one_chunk_fetch_it_once(stored: str, relay: Relay, mount: Mount) -> None:
    mounted = mount(f"s3://{stored}/dir/sparse")
    before = relay.count("GET")

    def read(number: int) -> bytes:
        return read_direct(mounted.ram / "pc.ram", 32 * MiB + number * 8 * PAGE)

    with ThreadPoolExecutor(8) as threads:
        for number, data in enumerate(threads.map(read, range(8))):
            place = 32 * MiB + number * 8 * PAGE
            assert data == CONTENT[place : place + PAGE]
    assert relay.count("GET") == before + 1


def test_what_was_read_is_fetched_first_the_next_time(
    stored: str, seaweed: Seaweed, relay: Relay, mount: Mount
) -> None:
    first = mount(f"s3://{stored}/dense")
    for place in (8 * MiB, 40 * MiB):
        read_direct(first.ram / "pc.ram", place)
    assert first.ctl("record").startswith("ok ")
    assert first.ctl("record").endswith(f"s3://{stored}/dense.working-set")  # replaced
    second = mount(f"s3://{stored}/dense", "prefetch=recorded")
    while "that were recorded are in the page cache" not in second.log.read_text():
        pass
    before = relay.count("GET")
    for place in (8 * MiB, 40 * MiB):
        assert read_direct(second.ram / "pc.ram", place) == CONTENT[place : place + PAGE]
    assert relay.count("GET") == before
    read_direct(second.ram / "pc.ram", 24 * MiB)
    assert relay.count("GET") == before + 1
    seaweed.put(stored, "dense.working-set", b"Dear Sir")
    third = mount(f"s3://{stored}/dense", "prefetch=recorded")
    while "0 bytes that were recorded" not in third.log.read_text():
        pass


def read_direct(path: Path, place: int) -> bytes:
    """One page, past the kernel's cache."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, PAGE)
        os.preadv(fd, [buffer], place)
        return buffer[:]
    finally:
        os.close(fd)


def small(content: bytes) -> bytes:
    """A checkpoint of 16 MiB whose pages are all ``content``."""
    return MigrationFile(blocks=[Block("pc.ram", 4096, dict.fromkeys(range(4096), content * PAGE))]).data()


def test_an_object_that_is_overwritten_fails_at_once_and_is_asked_for_once(
    seaweed: Seaweed, bucket: str, relay: Relay, mount: Mount
) -> None:
    seaweed.put(bucket, "vm1", small(b"a"))
    mounted = mount(f"s3://{bucket}/vm1")
    assert read_direct(mounted.ram / "pc.ram", 0) == b"a" * PAGE
    seaweed.put(bucket, "vm1", small(b"b"))
    mounted.expect_log(f"ERROR: .*s3://{bucket}/vm1: was overwritten since it was mounted")
    before = relay.count("GET")
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            read_direct(mounted.ram / "pc.ram", 8 * MiB)
    assert relay.count("GET") == before + 1
    status = mounted.status()
    assert "was overwritten since it was mounted" in status["bad-pages"][0]["error"]
    assert read_direct(mounted.ram / "pc.ram", PAGE) == b"a" * PAGE  # what is here is of the former version


def test_a_version_is_read_on_in_a_bucket_that_keeps_versions(seaweed: Seaweed, bucket: str, mount: Mount) -> None:
    seaweed.client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    seaweed.put(bucket, "vm1", small(b"a"))
    mounted = mount(f"s3://{bucket}/vm1")
    seaweed.put(bucket, "vm1", small(b"b"))
    assert read_direct(mounted.ram / "pc.ram", 8 * MiB) == b"a" * PAGE
    seaweed.client.delete_object(Bucket=bucket, Key="vm1")
    assert read_direct(mounted.ram / "pc.ram", 12 * MiB) == b"a" * PAGE


def test_a_chunk_that_can_t_be_had_fails_for_its_pages_and_is_had_later(
    seaweed: Seaweed, bucket: str, relay: Relay, mount: Mount
) -> None:
    seaweed.put(bucket, "vm1", small(b"a"))
    mounted = mount(f"s3://{bucket}/vm1")
    mounted.expect_log("ERROR: pc.ram: page.* can't be read from the checkpoint: .*: the store refuses this .400.")
    relay.meddle = lambda request: b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    before = relay.count("GET")
    with pytest.raises(OSError, match="Input/output error"):
        read_direct(mounted.ram / "pc.ram", 8 * MiB)
    assert relay.count("GET") == before + 1
    relay.meddle = lambda request: None
    while True:  # for a second, it is not asked for again
        try:
            assert read_direct(mounted.ram / "pc.ram", 8 * MiB) == b"a" * PAGE
        except OSError:
            continue
        break
    assert relay.count("GET") == before + 2


def test_a_silent_store_fails_reads_by_the_one_deadline(stored: str, seaweed: Seaweed, mount: Mount) -> None:
    mounted = mount(f"s3://{stored}/dir/sparse", program=(sys.executable, SHORT_DEADLINE, "2"))
    mounted.expect_log("ERROR: s3://.*: the storage has not answered for 2 s")
    mounted.expect_log(
        "ERROR: pc.ram: pages [0-9]* to [0-9]* can't be read from the checkpoint: .* no answer in 2 s"
    )
    places = dict(zip(ERRORS, (8 * MiB, 24 * MiB, 40 * MiB), strict=True))
    seaweed.signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor() as threads:
            readers = {how: threads.submit(read, how, mounted, place) for how, place in places.items()}
        for how, (code, words) in ERRORS.items():
            failed = readers[how].result()
            assert failed.returncode == code
            assert words in failed.stderr.decode()
        assert mounted.status()["storage"].startswith("silent: no answer for pages pc.ram ")
    finally:
        seaweed.signal(signal.SIGCONT)
    while mounted.status()["storage"] != "ok":
        pass
    for how, place in places.items():
        assert read(how, mounted, place).stdout == CONTENT[place : place + PAGE]
