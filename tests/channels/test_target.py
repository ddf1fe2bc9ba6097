import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptfs.channels.identity import Identity
from ckptfs.channels.target import PathTarget, wait_for_saves
from ckptfs.channels.version import NOTHING, FileVersion
from ckptfs.errors import CkptfsError, CommandError, StateError, StorageError
from tests.doubles.storage import FailingCall, open_descriptors

NO_DEVICE = -1
FORMER = b"QEVM" + b"former" * 1000
NEWER = b"QEVM" + b"newer" * 1000
LEFTOVER = ".vm1.0123456789ab.ckptfs-partial"

pytestmark = pytest.mark.usefixtures("nothing_stays_open")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as somebody else")


@pytest.fixture
def directory(public: Path) -> Path:
    """A directory for checkpoints, which anybody may write to."""
    directory = public / "ckpt"
    directory.mkdir()
    directory.chmod(0o1777)
    return directory


def target_for(
    path: Path, identity: Identity | None = None, stream_offset: int = 0, expected: FileVersion | None = None
) -> PathTarget:
    return PathTarget(str(path), stream_offset, identity or Identity.of_daemon(), NO_DEVICE, expected)


def save(path: Path, content: bytes = NEWER, identity: Identity | None = None) -> None:
    target = target_for(path, identity)
    os.pwrite(target.file.fd, content, 0)
    target.publish()


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


# --- publish and discard ----------------------------------------------------------------------------------


def test_a_new_file_appears_whole_under_its_name(directory: Path) -> None:
    target = target_for(directory / "vm1")
    os.pwrite(target.file.fd, NEWER, 0)
    assert not (directory / "vm1").exists()
    target.publish()
    assert names(directory) == ["vm1"]
    assert (directory / "vm1").read_bytes() == NEWER


def test_a_former_checkpoint_is_there_until_the_new_one_is(directory: Path) -> None:
    path = directory / "vm1"
    path.write_bytes(FORMER)
    with path.open("rb") as reader:
        target = target_for(path)
        os.pwrite(target.file.fd, NEWER, 0)
        assert path.read_bytes() == FORMER
        target.publish()
        assert path.read_bytes() == NEWER
        assert reader.read() == FORMER  # whoever has it open keeps it
    assert names(directory) == ["vm1"]


def test_an_empty_file_is_replaced(directory: Path) -> None:
    (directory / "vm1").touch()
    save(directory / "vm1")
    assert (directory / "vm1").read_bytes() == NEWER


def test_a_discarded_one_leaves_no_trace(directory: Path) -> None:
    path = directory / "vm1"
    path.write_bytes(FORMER)
    target = target_for(path)
    os.pwrite(target.file.fd, NEWER, 0)
    target.discard()
    assert names(directory) == ["vm1"]
    assert path.read_bytes() == FORMER


def test_one_that_was_published_is_not_discarded(directory: Path) -> None:
    target = target_for(directory / "vm1")
    os.pwrite(target.file.fd, NEWER, 0)
    target.publish()
    others = [os.open(directory, os.O_RDONLY) for _ in range(3)]  # they get the numbers of those just closed
    target.discard()
    assert (directory / "vm1").read_bytes() == NEWER
    for fd in others:
        os.close(fd)


def test_the_data_is_durable_before_the_name_and_the_name_before_the_return(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def recorded(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else args[1]))
            return call(*args, **kwargs)

        return record

    (directory / "vm1").write_bytes(FORMER)
    target = target_for(directory / "vm1")
    temporary = os.readlink(f"/proc/self/fd/{target.file.fd}")
    for name in ("fdatasync", "rename", "fsync"):
        monkeypatch.setattr(os, name, recorded(name))
    target.publish()
    assert calls == [("fdatasync", temporary), ("rename", "vm1"), ("fsync", str(directory))]


@pytest.mark.parametrize("call", ["fdatasync", "rename"])
def test_a_failed_sync_is_final(directory: Path, call: str) -> None:
    path = directory / "vm1"
    path.write_bytes(FORMER)
    target = target_for(path)
    os.pwrite(target.file.fd, NEWER, 0)
    with FailingCall((call,), 1, errno.EIO).installed(), pytest.raises(OSError, match="injected"):
        target.publish()
    target.discard()
    assert names(directory) == ["vm1"]
    assert path.read_bytes() == FORMER


def test_a_name_that_may_be_lost_is_an_error_that_says_so(directory: Path) -> None:
    path = directory / "vm1"
    path.write_bytes(FORMER)
    target = target_for(path)
    os.pwrite(target.file.fd, NEWER, 0)
    with FailingCall(("fsync",), 1, errno.EIO).installed(), pytest.raises(StorageError) as caught:
        target.publish()
    target.discard()
    assert str(caught.value) == (
        f"{path}: the new checkpoint is in place, but its directory could not be synced"
        f" ({os.strerror(errno.EIO)} (injected)), so a power cut may undo that: save again"
    )
    assert caught.value.errno == errno.EIO
    assert names(directory) == ["vm1"]
    assert path.read_bytes() == NEWER


def test_only_the_owner_can_read_it_whatever_the_umask(directory: Path) -> None:
    former = os.umask(0)
    try:
        target = target_for(directory / "vm1")
    finally:
        os.umask(former)
    assert os.fstat(target.file.fd).st_mode & 0o777 == 0o600
    target.publish()
    assert (directory / "vm1").stat().st_mode & 0o777 == 0o600


def test_no_child_inherits_its_descriptors(directory: Path) -> None:
    before = set(open_descriptors())
    target = target_for(directory / "vm1")
    mine = set(open_descriptors()) - before
    assert len(mine) == 2
    assert not any(os.get_inheritable(int(fd)) for fd in mine)
    target.discard()


@pytest.mark.parametrize(
    "name",
    ["x" * 255, "€" * 85, "\udcff" * 255, "with\nnewline", "%s"],
    ids=["long", "utf-8", "bytes", "newline", "percent"],
)
def test_every_name_that_the_file_system_takes_will_do(directory: Path, name: str) -> None:
    save(directory / name)
    save(directory / name, FORMER)
    assert os.listdir(os.fsencode(directory)) == [os.fsencode(name)]


def test_the_parent_is_found_once(directory: Path, tmp_path: Path) -> None:
    target = target_for(directory / "vm1")
    directory.rename(tmp_path / "moved")
    directory.symlink_to("/nonexistent")
    target.publish()
    assert names(tmp_path / "moved") == ["vm1"]


# --- left-overs -------------------------------------------------------------------------------------------


def test_leftovers_of_a_dead_daemon_are_removed(directory: Path) -> None:
    (directory / LEFTOVER).write_bytes(b"half a checkpoint")
    target_for(directory / "vm1").discard()
    assert names(directory) == []


def test_a_temporary_that_another_save_takes_for_a_leftover(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, removed = fcntl.flock, list[str]()

    def too_late(fd: int, operation: int) -> None:
        if len(removed) < 2:
            removed.extend(names(directory))
            os.unlink(directory / removed[-1])
        if len(removed) == 1:  # the other one still has its lock
            raise BlockingIOError
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", too_late)
    target = target_for(directory / "vm1")
    assert len(removed) == 2
    monkeypatch.undo()
    target.seal(0, NEWER)
    target.publish()
    assert names(directory) == ["vm1"]


def test_a_running_save_is_no_leftover(directory: Path) -> None:
    first = target_for(directory / "vm1")
    os.pwrite(first.file.fd, FORMER, 0)
    save(directory / "vm1", NEWER)
    first.publish()
    assert names(directory) == ["vm1"]
    assert (directory / "vm1").read_bytes() == FORMER


def test_a_killed_save_leaves_what_the_next_one_removes(directory: Path) -> None:
    killed = target_for(directory / "vm1")
    leftover = names(directory)
    again = os.open(directory / leftover[0], os.O_RDONLY)  # outlives the daemon, and its lock
    fcntl.flock(killed.file.fd, fcntl.LOCK_UN)
    target_for(directory / "vm1").discard()
    assert names(directory) == []
    os.close(again)
    killed.discard()


@pytest.mark.parametrize(
    "name",
    [
        "vm1.0123456789ab.ckptfs-partial",  # not hidden
        ".vm2.0123456789ab.ckptfs-partial",  # another checkpoint's
        ".vm1.old.0123456789ab.ckptfs-partial",  # that of vm1.old
        ".vm1.012345.ckptfs-partial",
        ".vm1.0123456789ab.ckptfs-partial~",
    ],
)
def test_what_only_looks_like_a_leftover_stays(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"somebody's")
    save(directory / "vm1")
    assert names(directory) == sorted([name, "vm1"])


def test_a_planted_leftover_does_no_harm(directory: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (directory / LEFTOVER).symlink_to(victim)
    (directory / LEFTOVER.replace("0", "f")).mkdir()
    save(directory / "vm1")
    assert victim.read_bytes() == b"precious"


# --- what is refused --------------------------------------------------------------------------------------


def plant_symlink(path: Path) -> None:
    victim = path.with_name("victim")
    victim.write_bytes(FORMER)
    path.symlink_to(victim)


def plant_hard_link(path: Path) -> None:
    victim = path.with_name("victim")
    victim.write_bytes(FORMER)
    path.hardlink_to(victim)


def plant_letters(path: Path) -> None:
    path.write_bytes(b"Dear Sir or Madam")


def plant_a_short_text(path: Path) -> None:
    path.write_bytes(b"QEV")


PLANTED = [
    (plant_symlink, errno.EEXIST),
    (plant_hard_link, errno.EMLINK),
    (os.mkfifo, errno.EEXIST),
    (Path.mkdir, errno.EISDIR),
    (plant_letters, errno.EEXIST),
    (plant_a_short_text, errno.EEXIST),
]


@pytest.mark.parametrize(("plant", "code"), PLANTED)
def test_what_is_no_checkpoint_is_not_replaced(directory: Path, plant: Callable[[Path], None], code: int) -> None:
    path = directory / "vm1"
    plant(path)
    before = names(directory)
    with pytest.raises(CommandError, match="vm1: ") as error:
        target_for(path)
    assert error.value.errno == code
    assert names(directory) == before


@pytest.mark.parametrize(("plant", "code"), PLANTED)
def test_what_is_planted_during_a_save_is_not_replaced_either(
    directory: Path, plant: Callable[[Path], None], code: int
) -> None:
    path = directory / "vm1"
    target = target_for(path)
    os.pwrite(target.file.fd, NEWER, 0)
    plant(path)
    with pytest.raises(CommandError, match="vm1: ") as error:
        target.publish()
    assert error.value.errno == code
    target.discard()
    assert not [name for name in names(directory) if name.endswith("partial")]
    assert path.is_symlink() or path.is_fifo() or path.is_dir() or path.read_bytes() != NEWER


@needs_root
def test_a_device_is_not_replaced(directory: Path) -> None:
    path = directory / "vm1"
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    with pytest.raises(CommandError, match="is not a regular file"):
        target_for(path)
    assert path.is_char_device()


def test_a_place_on_the_own_mount_is_refused_before_it_is_touched(directory: Path) -> None:
    (directory / "vm1").write_bytes(FORMER)
    device = directory.stat().st_dev
    with (
        FailingCall(("listdir", "stat"), 1, errno.EDEADLK).installed(),
        pytest.raises(CommandError, match="lies on this mount; save to another file system") as error,
    ):
        PathTarget(str(directory / "vm1"), 0, Identity.of_daemon(), device)
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("missing/vm1", errno.ENOENT),
        ("file/vm1", errno.ENOTDIR),
        ("loop/vm1", errno.ELOOP),
        ("x" * 256, errno.ENAMETOOLONG),
        ("", errno.EISDIR),
        (".", errno.EISDIR),
        ("missing/..", errno.EISDIR),
    ],
)
def test_a_place_that_is_not_there_is_the_errno_of_the_storage(directory: Path, path: str, code: int) -> None:
    (directory / "file").touch()
    (directory / "loop").symlink_to("loop")
    with pytest.raises((CkptfsError, OSError)) as error:
        PathTarget(f"{directory}/{path}", 0, Identity.of_daemon(), NO_DEVICE)
    assert error.value.errno == code
    assert names(directory) == ["file", "loop"]


@pytest.mark.parametrize("call", ["open", "fstat", "stat", "listdir"])
@pytest.mark.parametrize("former", [None, FORMER])
def test_whatever_call_fails_at_the_start_nothing_is_left(directory: Path, call: str, former: bytes | None) -> None:
    path = directory / "vm1"
    if former is not None:
        path.write_bytes(former)
    before = names(directory)
    for number in range(1, 10):
        with FailingCall((call,), number, errno.EIO).installed() as failing:
            try:
                target_for(path).discard()
            except OSError as error:
                noticed = error.errno
            else:
                noticed = None
        assert names(directory) == before
        if failing.failed is None:
            break
        assert noticed == errno.EIO
    assert number > 1


def test_a_file_system_without_locks_leaves_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="No locks available"):
        target_for(directory / "vm1")
    assert names(directory) == []


# --- the bytes before the stream --------------------------------------------------------------------------

PREFIX = b"somebody's own header, " * 300


def save_behind(path: Path, stream_offset: int, content: bytes = NEWER) -> None:
    target = target_for(path, stream_offset=stream_offset)
    target.keep_prefix()
    target.seal(stream_offset, content)
    target.publish()


@pytest.mark.parametrize("copy_length", [1000, 1 << 24])
@pytest.mark.parametrize("stream_offset", [1, 4096, 5000, len(PREFIX)])
def test_the_bytes_before_the_stream_are_taken_over(
    directory: Path, monkeypatch: pytest.MonkeyPatch, stream_offset: int, copy_length: int
) -> None:
    monkeypatch.setattr("ckptfs.channels.target._COPY_LENGTH", copy_length)
    path = directory / "vm1"
    path.write_bytes(PREFIX[:stream_offset])
    save_behind(path, stream_offset, FORMER)
    save_behind(path, stream_offset, NEWER)
    assert path.read_bytes() == PREFIX[:stream_offset] + NEWER


def test_a_file_that_ends_before_the_stream_is_taken_over_whole(directory: Path) -> None:
    path = directory / "vm1"
    path.write_bytes(b"short")
    save_behind(path, 8192)
    assert path.read_bytes() == b"short".ljust(8192, b"\0") + NEWER


def test_without_a_former_file_the_bytes_before_the_stream_are_zeros(directory: Path) -> None:
    save_behind(directory / "vm1", 4096)
    assert (directory / "vm1").read_bytes() == bytes(4096) + NEWER


def test_a_file_with_something_else_behind_the_prefix_is_not_replaced(directory: Path) -> None:
    path = directory / "vm1"
    path.write_bytes(FORMER)  # a checkpoint, but not there
    with pytest.raises(CommandError, match="exists and holds no checkpoint at byte 0x10"):
        target_for(path, stream_offset=16)
    assert path.read_bytes() == FORMER


# --- on behalf of somebody --------------------------------------------------------------------------------

SOMEBODY = Identity(12345, 12345, (), "/")


@needs_root
def test_a_checkpoint_belongs_to_who_asked_for_it(directory: Path) -> None:
    save(directory / "vm1", identity=SOMEBODY)
    stat = (directory / "vm1").stat()
    assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o777) == (12345, 12345, 0o600)
    save(directory / "vm1", FORMER, identity=SOMEBODY)
    assert (directory / "vm1").read_bytes() == FORMER


@needs_root
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777 & ~0o001])
def test_a_place_where_he_may_not_write_is_eacces(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    with pytest.raises(PermissionError) as error:
        target_for(directory / "vm1", SOMEBODY)
    assert error.value.errno == errno.EACCES
    assert names(directory) == []


@needs_root
def test_a_checkpoint_that_he_could_not_replace_is_not_replaced(directory: Path) -> None:
    path = directory / "vm1"
    path.write_bytes(FORMER)  # root's, in a sticky directory
    path.chmod(0o644)
    target = target_for(path, SOMEBODY)
    os.pwrite(target.file.fd, NEWER, 0)
    with pytest.raises(PermissionError):
        target.publish()
    target.discard()
    assert names(directory) == ["vm1"]
    assert path.read_bytes() == FORMER


@needs_root
def test_a_file_that_he_could_not_read_is_not_taken_over(directory: Path) -> None:
    path = directory / "vm1"
    path.write_bytes(FORMER)
    path.chmod(0o600)
    with pytest.raises(PermissionError):
        target_for(path, SOMEBODY)
    assert names(directory) == ["vm1"]


@needs_root
def test_a_leftover_of_somebody_else_stays(directory: Path) -> None:
    (directory / LEFTOVER).write_bytes(b"root's")
    target_for(directory / "vm1", SOMEBODY).discard()
    assert names(directory) == [LEFTOVER]


# --- saves that are running ---------------------------------------------------------------------------------


def test_running_saves_are_waited_for(directory: Path) -> None:
    path = directory / "vm1"
    begun: list[str] = []

    def wait(what: str, seconds: float) -> bool:
        return wait_for_saves(str(path), seconds, lambda: begun.append(what))

    (directory / LEFTOVER).touch()
    assert wait("nothing", 0)
    target, other = target_for(path), target_for(directory / "vm2")
    assert not wait("in vain", 0.01)
    timer = threading.Timer(0.1, target.discard)
    timer.start()
    assert wait("to the end", 60)
    timer.join()
    assert begun == ["in vain", "to the end"]
    other.discard()


# --- the version that is expected --------------------------------------------------------------------------


def version_of(path: Path) -> FileVersion:
    with path.open("rb") as file:
        return FileVersion.of(file.fileno())


def test_publish_tells_the_version_that_it_wrote(directory: Path) -> None:
    path = directory / "vm1"
    for expected in (NOTHING, None):
        target = target_for(path, expected=expected)
        os.pwrite(target.file.fd, NEWER, 0)
        target.publish()
        assert target.published == version_of(path)


def test_another_version_is_refused_before_anything_is_written(directory: Path) -> None:
    path = directory / "vm1"
    path.write_bytes(FORMER)
    former = version_of(path)
    save(path)
    with pytest.raises(StateError, match="is not the file that this mount came from"):
        target_for(path, expected=former)
    with pytest.raises(StateError, match="was made by somebody else"):
        target_for(path, expected=NOTHING)
    path.unlink()
    with pytest.raises(StateError, match="is gone, or empty") as caught:
        target_for(path, expected=former)
    assert caught.value.errno == errno.ESTALE
    assert names(directory) == []


def assert_not_published(target: PathTarget, words: str) -> None:
    with pytest.raises(StateError, match=words):
        target.publish()
    target.discard()


@pytest.mark.parametrize("exists", [False, True])
def test_another_version_that_came_while_we_wrote(exists: bool, directory: Path) -> None:
    path = directory / "vm1"
    if exists:
        path.write_bytes(FORMER)
    target = target_for(path, expected=version_of(path) if exists else NOTHING)
    save(path)
    assert_not_published(target, "is not the file that this mount" if exists else "was made by somebody else")
    assert names(directory) == ["vm1"]
    assert path.read_bytes() == NEWER


def test_two_that_are_at_the_rename(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "vm1"
    path.write_bytes(FORMER)
    first, second = (target_for(path, expected=version_of(path)) for _ in range(2))
    os.pwrite(first.file.fd, NEWER, 0)
    rename = os.rename

    def rename_late(*args: Any, **kwargs: Any) -> None:
        assert_not_published(second, "somebody else has locked it")
        rename(*args, **kwargs)

    monkeypatch.setattr(os, "rename", rename_late)
    first.publish()
    assert path.read_bytes() == NEWER
    assert names(directory) == ["vm1"]


def test_one_that_comes_before_the_lock(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "vm1"
    path.write_bytes(FORMER)
    first, second = (target_for(path, expected=version_of(path)) for _ in range(2))
    os.pwrite(first.file.fd, NEWER, 0)
    flock = fcntl.flock

    def flock_late(*args: Any) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.publish()
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    assert_not_published(second, "was replaced by somebody else just now")
    assert path.read_bytes() == NEWER


def test_one_that_comes_before_the_first_rename(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "vm1"
    first, second = (target_for(path, expected=NOTHING) for _ in range(2))
    os.pwrite(first.file.fd, NEWER, 0)
    open_former = PathTarget._open_former

    def open_early(target: PathTarget) -> int | None:
        former = open_former(target)
        monkeypatch.undo()
        first.publish()
        return former

    monkeypatch.setattr(PathTarget, "_open_former", open_early)
    assert_not_published(second, "was made by somebody else just now")
    assert path.read_bytes() == NEWER


def test_where_there_are_no_locks(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "vm1"
    path.write_bytes(FORMER)
    target = target_for(path, expected=version_of(path))
    os.pwrite(target.file.fd, NEWER, 0)

    def without_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    target.publish()
    assert path.read_bytes() == NEWER
