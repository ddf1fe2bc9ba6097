"""`ckptfs.mounted`: a mount for as long as a `with` lasts."""

import mmap
import os
import subprocess
from pathlib import Path

import pytest

import ckptfs
from ckptfs.errors import CheckpointError, StateError
from tests.mount.harness import is_mounted


def test_a_new_guest_is_saved_and_comes_back(tmp_path: Path) -> None:
    with ckptfs.mounted(tmp_path / "ckpt", ram=["heap:1M", "more:64k"]) as mount:
        path = mount.path
        events = mount.events()
        with (mount.path / "ram/heap").open("r+b") as file, mmap.mmap(file.fileno(), 0) as heap:
            heap[4096:4101] = b"hello"
            assert mount.save().startswith(f"saved {tmp_path}/ckpt: 1 page")
        assert next(events)["event"] == "MIGRATION"
        assert mount.status()["state"] == "idle"
        assert len(mount.status()["blocks"]) == 2
    assert not path.exists()
    assert all("event" in event for event in events)  # they end with the mount
    with ckptfs.mounted(tmp_path / "ckpt", tmp_path, ro=True, qmp=None) as mount:
        assert mount.path == tmp_path
        assert (mount.path / "ram/heap").read_bytes()[4096:4101] == b"hello"
    assert not is_mounted(tmp_path)


def test_memory_as_it_is_and_changes(tmp_path: Path) -> None:
    with ckptfs.mounted("none", ram="heap:1M") as mount:
        heap = mount.memory().blocks["heap"]
        array = heap[4096:8192]
        assert not array.any()
        with (mount.path / "ram/heap").open("r+b") as file:
            file.seek(4096)
            file.write(b"hello")
        assert array[:6].tobytes() == b"hello\0" == heap.read(4096, 6)
        del array, heap  # they are users of the mount
        memory = mount.memory(map=["heap@1G"])
        assert memory.physical.read((1 << 30) + 4096, 5) == b"hello"
        assert memory.states()["heap"][:3].tolist() == [0, 3, 0]
        with pytest.raises(StateError, match="has no views/vmcoreinfo, and its status says why"):
            memory.vmcoreinfo()
        with pytest.raises(CheckpointError, match="has no views/map"):
            print(mount.memory().physical)


def test_words_of_failures(tmp_path: Path) -> None:
    with (
        pytest.raises(StateError, match="For a new guest, say how much RAM it has"),
        ckptfs.mounted(tmp_path / "x"),
    ):
        raise AssertionError
    with ckptfs.mounted("none", ram="heap:64k") as mount:
        with pytest.raises(StateError, match=r"say where to save"):
            mount.save()
        with pytest.raises(StateError, match="nosuch"):
            mount.run("nosuch")
        mount.save(tmp_path / "a file")
    assert (tmp_path / "a file").exists()
    with pytest.raises(StateError, match="no guest's RAM is mounted here"):
        ckptfs.Mount(tmp_path).status()


def test_a_mount_in_use_stays_and_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(StateError, match="busy"),
        ckptfs.mounted("none", tmp_path, ram="heap:64k"),
        (tmp_path / "ram/heap").open("rb") as file,
    ):
        left = os.dup(file.fileno())
    assert is_mounted(tmp_path)
    os.close(left)
    subprocess.run(["umount", tmp_path], check=True)


def test_it_ends_when_the_body_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ckptfs.mounted("none", tmp_path, ram="heap:64k"):
        raise ZeroDivisionError
    assert not is_mounted(tmp_path)
