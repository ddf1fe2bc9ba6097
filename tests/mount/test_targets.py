"""Where a save may go, and where not."""

import errno
import os
import pwd
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import DEADLINE, Mounted

NOBODY = pwd.getpwnam("nobody")
LENGTH = 1 << 20


@pytest.fixture
def mounted(mount: Mount, tmp_path: Path) -> Mounted:
    mounted = mount(tmp_path / "checkpoint", f"ram=pc.ram:{LENGTH}")
    with (mounted.ram / "pc.ram").open("r+b") as file:
        file.write(b"guest")
    return mounted


def assert_saved(path: Path, offset: int = 0) -> None:
    assert decode(path, offset).blocks["pc.ram"][:6].tobytes() == b"guest\0"
    assert path.stat().st_mode & 0o777 == 0o600


def refused(mounted: Mounted, target: str | Path) -> tuple[int | None, str]:
    """(errno, words) of a save that must not succeed."""
    with pytest.raises(OSError, match="error: ") as caught:
        mounted.ctl(f"save {target}")
    return caught.value.errno, caught.value.strerror


def test_a_relative_path_is_meant_from_where_the_writer_stands(mounted: Mounted, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    script = f"echo save ./file > {mounted.path}/ctl"
    subprocess.run(["bash", "-c", script], cwd=folder, check=True, timeout=DEADLINE)
    assert_saved(folder / "file")


def test_a_path_with_spaces_is_quoted_as_in_a_shell(mounted: Mounted, tmp_path: Path) -> None:
    mounted.ctl(f"save '{tmp_path}/my vm, 2nd'")
    assert_saved(tmp_path / "my vm, 2nd")


def test_a_checkpoint_is_replaced(mounted: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "other"
    MigrationFile().write(path)
    path.chmod(0o644)
    mounted.ctl(f"save {path}")
    assert_saved(path)


def test_an_empty_file_is_replaced(mounted: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    mounted.ctl(f"save {path}")
    assert_saved(path)


def test_a_file_that_is_no_checkpoint_is_not(mounted: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "letters"
    path.write_text("Dear")
    assert refused(mounted, path)[0] == errno.EEXIST
    assert path.read_text() == "Dear"


def test_no_symbolic_link_is_followed_or_replaced(mounted: Mounted, tmp_path: Path) -> None:
    path, link = tmp_path / "other", tmp_path / "link"
    MigrationFile().write(path)
    content = path.read_bytes()
    link.symlink_to(path)
    assert refused(mounted, link)[0] == errno.EEXIST
    assert link.is_symlink()
    assert path.read_bytes() == content
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    refused(mounted, link)
    assert not (tmp_path / "nowhere").exists()


def test_no_hard_link_is_torn(mounted: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "other"
    MigrationFile().write(path)
    (tmp_path / "second name").hardlink_to(path)
    assert refused(mounted, path)[0] == errno.EMLINK
    assert path.stat().st_nlink == 2


def test_nothing_but_a_file(mounted: Mounted, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert refused(mounted, tmp_path / "fifo")[0] == errno.EEXIST
    assert refused(mounted, tmp_path)[0] == errno.EISDIR
    assert refused(mounted, f"{tmp_path}/")[0] == errno.EISDIR
    assert refused(mounted, "/dev/null")[0] == errno.EEXIST
    assert refused(mounted, tmp_path / "no" / "folder")[0] == errno.ENOENT
    (tmp_path / "file").touch()
    assert refused(mounted, tmp_path / "file" / "below")[0] == errno.ENOTDIR
    assert refused(mounted, tmp_path / ("x" * 256))[0] == errno.ENAMETOOLONG


@pytest.mark.parametrize("name", ["ctl", "new", "ram/pc.ram", "ram/new", ".."])
def test_nothing_on_the_mount_itself(name: str, mounted: Mounted) -> None:
    code, words = refused(mounted, mounted.path / name)
    assert code in (errno.EINVAL, errno.EISDIR)
    assert str(mounted.path) in words


def test_what_is_mounted_over_ram_is_not_flushed(mounted: Mounted, tmp_path: Path) -> None:
    """A save has the kernel write back what programs changed through mmap: by the names in ram/."""
    ram = mounted.ram / "pc.ram"
    (tmp_path / "other").write_bytes(b"over it")
    with ram.open("r+b"):
        subprocess.run(["mount", "--bind", tmp_path / "other", ram], check=True)
        try:
            code, words = refused(mounted, tmp_path / "new")
        finally:
            subprocess.run(["umount", ram], check=True)
        assert code == errno.EBUSY
        assert words == f"error: {ram}: another file system is mounted over it"
        mounted.ctl(f"save {tmp_path / 'new'}")


@pytest.mark.parametrize("capabilities", [("mapped-ram",), ()], ids=["mapped-ram", "plain"])
def test_what_follows_a_checkpoint_stays_where_it_is(
    capabilities: tuple[str, ...], mount: Mount, tmp_path: Path
) -> None:
    """As on a block device, where it is somebody else's: QEMU does not read it, and a save does not copy it."""
    path = tmp_path / "device"
    file = MigrationFile(blocks=[Block("pc.ram", 256, {0: b"guest"})], capabilities=capabilities)
    file.write(path)
    end = path.stat().st_size
    with path.open("r+b") as device:
        device.truncate(end + (400 << 20))
        device.seek(end)
        device.write(b"another's" * 1000)
    mounted = mount(path)
    assert mounted.status()["base-devices"] == ["timer", "globalstate"]
    mounted.ctl(f"save {tmp_path}/saved")
    assert b"another's" not in (tmp_path / "saved").read_bytes()
    assert (tmp_path / "saved").stat().st_size < (3 << 20)
    assert decode(tmp_path / "saved").blocks["pc.ram"][:6].tobytes() == b"guest\0"


def test_not_even_through_a_link_to_it(mounted: Mounted, tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(mounted.ram)
    assert refused(mounted, tmp_path / "way" / "new")[0] in (errno.EINVAL, errno.ELOOP)
    with pytest.raises(OSError, match="lies on this mount"):
        mounted.ctl(f"migrate file:{mounted.ram}/pc.ram")


def test_an_offset_keeps_what_is_before_it(mounted: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(b"\xa5" * 0x1001)
    mounted.ctl(f"save file:{path},offset=0x1001")
    assert path.read_bytes()[:0x1001] == b"\xa5" * 0x1001
    assert decode(path, 0x1001).blocks["pc.ram"][:6].tobytes() == b"guest\0"
    mounted.ctl(f"save file:{path},offset=0x1001")  # once more: a checkpoint is replaced
    assert path.read_bytes()[:0x1001] == b"\xa5" * 0x1001
    path.write_bytes(b"\xa5" * 0x1001 + b"no checkpoint")
    assert refused(mounted, f"file:{path},offset=0x1001")[0] == errno.EEXIST
    assert path.read_bytes().endswith(b"no checkpoint")


def test_an_offset_into_a_file_that_is_mounted(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    MigrationFile(blocks=[Block("pc.ram", 600, {3: b"third", 599: b"last"})], stream_offset=0x1001).write(path)
    with path.open("r+b") as file:
        file.write(b"\xa5" * 0x1001)
    mounted = mount(f"file:{path},offset=0x1001")
    with (mounted.ram / "pc.ram").open("r+b") as file:
        file.write(b"first")
    mounted.ctl("save")
    assert decode(path, 0x1001).blocks["pc.ram"][:5].tobytes() == b"first"
    assert path.read_bytes()[:0x1001] == b"\xa5" * 0x1001
    assert (mounted.ram / "pc.ram").read_bytes()[3 * 4096 :].startswith(b"third\0")


# --- somebody else's words --------------------------------------------------------------------------------


Shell = Callable[[Mounted, str], str]


@pytest.fixture
def as_nobody() -> Shell:
    """`as_nobody(MOUNT, COMMAND)`: what somebody else reads from ctl after he wrote a command."""

    def as_nobody(mounted: Mounted, command: str) -> str:
        script = f"exec 3<>{mounted.path}/ctl; echo '{command}' >&3; cat <&3"
        identity = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups"]
        return subprocess.run(
            [*identity, "bash", "-c", script], cwd="/", capture_output=True, text=True, timeout=DEADLINE
        ).stdout

    return as_nobody


def test_a_root_daemon_opens_only_checkpoints_that_the_writer_could(
    mount: Mount, public: Path, as_nobody: Shell
) -> None:
    path = public / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", 16, {0: b"secret"})]).write(path)
    path.chmod(0o600)
    (public / "mnt").mkdir()
    mounted = mount("none", "allow_other,umask=0", path=public / "mnt")
    assert as_nobody(mounted, f"migrate_incoming file:{path}").startswith(f"error: {path}: Permission denied")
    assert list(mounted.ram.iterdir()) == []
    path.chmod(0o644)
    assert as_nobody(mounted, f"migrate_incoming file:{path}").startswith("ok ")
    assert (mounted.ram / "pc.ram").read_bytes().startswith(b"secret")


def test_a_root_daemon_connects_only_to_machines_that_the_writer_could(
    mount: Mount, public: Path, as_nobody: Shell
) -> None:
    path = public / "qmp"
    (public / "mnt").mkdir()
    mounted = mount(public / "checkpoint", "ram=pc.ram:1M,allow_other,umask=0", path=public / "mnt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        path.chmod(0o600)
        assert as_nobody(mounted, f"qmp {path}").startswith("ok ")
        for command in ("stop", "cont"):
            assert as_nobody(mounted, command).startswith(f"error: QMP socket {path}: Permission denied")
        listener.shutdown(socket.SHUT_RDWR)  # who connects from here on is refused
        path.chmod(0o666)
        assert as_nobody(mounted, "stop").startswith(f"error: QMP socket {path}: Connection refused")


def test_a_root_daemon_saves_only_where_the_writer_could(mount: Mount, public: Path, as_nobody: Shell) -> None:
    for name, owner in (("mine", 0), ("theirs", NOBODY.pw_uid)):
        (public / name).mkdir(mode=0o700)
        os.chown(public / name, owner, -1)
    (public / "mnt").mkdir()
    mounted = mount(public / "mine" / "checkpoint", "ram=pc.ram:1M", "allow_other,umask=0", path=public / "mnt")

    assert "Permission denied" in as_nobody(mounted, f"save {public}/mine/other")
    assert "Permission denied" in as_nobody(mounted, "save")
    assert os.listdir(public / "mine") == []
    assert as_nobody(mounted, f"save {public}/theirs/checkpoint").startswith("ok ")
    saved = public / "theirs" / "checkpoint"
    assert (saved.stat().st_uid, saved.stat().st_mode & 0o777) == (NOBODY.pw_uid, 0o600)
    mounted.umount()
