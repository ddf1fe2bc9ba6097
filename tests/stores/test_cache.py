"""What was fetched is kept for the next mount, as far as there is room."""

from pathlib import Path

from tests.mount.conftest import Mount
from tests.mount.decode import PAGE
from tests.stores.relay import Relay
from tests.stores.seaweed import Seaweed
from tests.stores.test_reading import MiB, small


def test_a_second_mount_fetches_nothing_and_damage_is_fetched_again(
    seaweed: Seaweed, bucket: str, relay: Relay, mount: Mount, tmp_path: Path
) -> None:
    seaweed.put(bucket, "vm1", small(b"a"))
    cache = tmp_path / "cache"
    first = mount(f"s3://{bucket}/vm1", f"cache={cache}")
    assert (first.ram / "pc.ram").read_bytes() == b"a" * 16 * MiB
    assert relay.count("GET") > 0
    relay.requests.clear()
    second = mount(f"s3://{bucket}/vm1", f"cache={cache}")
    assert (second.ram / "pc.ram").read_bytes() == b"a" * 16 * MiB
    assert relay.count("GET") == 0
    first.umount()
    second.umount()
    (data,) = cache.glob("*/data")
    assert data.stat().st_mode & 0o777 == 0o600
    with data.open("r+b") as file:
        file.seek(8 * MiB + 5)
        file.write(b"damage")
    third = mount(f"s3://{bucket}/vm1", f"cache={cache}")
    assert (third.ram / "pc.ram").read_bytes() == b"a" * 16 * MiB
    assert relay.count("GET") == 1


def test_a_full_cache_fails_no_read_and_the_oldest_goes(
    seaweed: Seaweed, bucket: str, mount: Mount, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for name in ("a", "b"):
        seaweed.put(bucket, name, small(name.encode()))
    first = mount(f"s3://{bucket}/a", f"cache={cache},cache_size=8M")
    first.expect_log("WARNING: .*/cache is full: what is fetched now is not kept")
    assert (first.ram / "pc.ram").read_bytes() == b"a" * 16 * MiB
    assert sum(path.stat().st_blocks * 512 for path in cache.glob("*/data")) <= 8 * MiB
    first.umount()
    second = mount(f"s3://{bucket}/b", f"cache={cache},cache_size=8M")
    with (second.ram / "pc.ram").open("rb") as file:
        assert file.read(PAGE) == b"b" * PAGE
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_others_may_read_is_refused(
    seaweed: Seaweed, bucket: str, mount: Mount, tmp_path: Path
) -> None:
    from tests.mount.harness import run_mount

    seaweed.put(bucket, "vm1", small(b"a"))
    (tmp_path / "cache").mkdir(mode=0o755)
    (tmp_path / "mnt").mkdir()
    result = run_mount(f"s3://{bucket}/vm1", tmp_path / "mnt", f"cache={tmp_path}/cache")
    assert result.returncode == 32
    assert "others may read or write it" in result.stderr
