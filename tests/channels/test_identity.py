import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptfs.channels.identity import Identity

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as somebody else")

OWNER = Identity(12345, 12345, (), "/")
STRANGER = Identity(54321, 54321, (), "/")


@pytest.fixture
def private_file(public: Path) -> Path:
    """A file that only uid 12345, or group 777, can read; everybody can reach it."""
    path = public / "private"
    path.write_bytes(b"secret")
    os.chown(path, 12345, 777)
    path.chmod(0o640)
    return path


def may_read(path: Path) -> bool:
    try:
        path.read_bytes()
    except PermissionError:
        return False
    return True


def test_files_are_opened_as_the_user_would(private_file: Path) -> None:
    with OWNER.assumed():
        assert may_read(private_file)
    with STRANGER.assumed():
        assert not may_read(private_file)
    assert may_read(private_file)


@pytest.mark.parametrize(
    "identity", [Identity(54321, 777, (), "/"), Identity(54321, 54321, (5, 777), "/")], ids=["primary", "further"]
)
def test_his_groups_count(private_file: Path, identity: Identity) -> None:
    with identity.assumed():
        assert may_read(private_file)


def test_the_groups_of_the_daemon_do_not_count(private_file: Path) -> None:
    own_groups = os.getgroups()
    os.setgroups([777])
    try:
        with STRANGER.assumed():
            assert not may_read(private_file)
        assert os.getgroups() == [777]
    finally:
        os.setgroups(own_groups)


def test_no_capability_helps_him(tmp_path: Path) -> None:
    with STRANGER.assumed():
        with pytest.raises(PermissionError):
            os.open(tmp_path / "new", os.O_CREAT | os.O_WRONLY)
        with pytest.raises(PermissionError):
            os.chmod(tmp_path, 0o777)


def test_other_threads_stay_what_they_are(private_file: Path) -> None:
    with ThreadPoolExecutor(1) as other_thread:
        other_thread.submit(os.getpid).result()  # it is there before
        with STRANGER.assumed():
            assert other_thread.submit(may_read, private_file).result()
            assert not may_read(private_file)


def test_the_daemon_is_itself_again_after_an_error(private_file: Path) -> None:
    def fail() -> None:
        with STRANGER.assumed():
            raise KeyError("bug")

    with pytest.raises(KeyError):
        fail()
    assert may_read(private_file)
    assert os.geteuid() == 0


def test_root_and_the_daemon_itself_need_no_disguise(private_file: Path) -> None:
    for identity in (Identity.of_daemon(), Identity(0, 0, (), None)):
        with identity.assumed():
            assert may_read(private_file)


def test_an_identity_that_cannot_be_assumed_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refusing:
        """setfsuid(2) returns the former uid, whether it worked or not."""

        def __getattr__(self, name: str) -> object:
            return (lambda uid: os.geteuid()) if name == "setfsuid" else getattr(ctypes.CDLL(None), name)

    monkeypatch.setattr("ckptfs.channels.identity._libc", Refusing())
    with pytest.raises(PermissionError), STRANGER.assumed():
        pytest.fail("went on as root")


def test_a_process_is_read_from_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    identity = Identity.of_process(os.getpid(), 1000, 1001)
    assert identity == Identity(1000, 1001, tuple(os.getgroups()), str(tmp_path))


def test_a_process_that_is_gone_has_no_groups_and_no_directory() -> None:
    assert Identity.of_process(2**22 + 1, 1000, 1001) == Identity(1000, 1001, (), None)
