"""mount.ckptfs and mount(8): options, owners, odd paths, fstab, other users."""

import errno
import mmap
import os
import pwd
import resource
import shlex
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.mount.decode import decode
from tests.mount.harness import (
    BIN,
    DEADLINE,
    enter_a_mount_namespace,
    in_a_mount_namespace,
    is_mounted,
    mount_entry,
    run_mount,
)

ROOT = Path(__file__).parents[2]
NOBODY = pwd.getpwnam("nobody")
AS_NOBODY = ("setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups")
READING_ALL = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
"""For programs of ours that run as nobody: they may lie where root alone has access."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", 16, {0: b"first"})]).write(path)
    return path


def as_nobody(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AS_NOBODY, "bash", "-c", script], cwd="/", capture_output=True, text=True, timeout=DEADLINE
    )


# --- options ----------------------------------------------------------------------------------------------


def test_a_read_only_mount(mount: Mount, checkpoint: Path, tmp_path: Path) -> None:
    mounted = mount(checkpoint, "ro")
    path = mounted.ram / "pc.ram"
    assert path.read_bytes().startswith(b"first")
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    with pytest.raises(OSError, match="Read-only file system"):
        path.open("r+b")
    with path.open("rb") as file, pytest.raises(PermissionError):
        mmap.mmap(file.fileno(), 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    for command in ("save", f"save {tmp_path}/other", f"migrate file:{tmp_path}/other"):
        with pytest.raises(OSError, match="read-only") as caught:
            mounted.ctl(command)
        assert caught.value.errno == errno.EPERM
    assert not (tmp_path / "other").exists()
    assert mounted.ctl("restore").startswith("ok ")
    assert mounted.status()["writers"] == "none"


def test_generic_options_are_accepted(mount: Mount, checkpoint: Path) -> None:
    mount(checkpoint, "_netdev,nofail,noauto,user,x-systemd.automount,rw,nosuid,nodev,relatime,defaults")


def test_first_values_of_parameters(mount: Mount, checkpoint: Path) -> None:
    mounted = mount(checkpoint, "multifd_channels=7,direct-io=off", "max_bandwidth=1M")
    parameters = mounted.path / "parameters"
    assert (parameters / "multifd-channels").read_text() == "7\n"
    assert (parameters / "direct-io").read_text() == "off\n"
    assert (parameters / "max-bandwidth").read_text() == f"{1 << 20}\n"
    assert mounted.status()["direct-io"] == "off"


def test_prefetch_brings_everything_in(mount: Mount, checkpoint: Path) -> None:
    mounted = mount(checkpoint, "prefetch=on")
    status = mounted.wait_for(lambda status: bool(status["restored"]))
    assert status["checkpoint-pages"] == 0
    assert status["time-to-full"] is not None


def test_an_offset_in_either_way(mount: Mount, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    MigrationFile(stream_offset=0x1001).write(path)
    for spec, options in ((f"file:{path},offset=0x1001", []), (str(path), ["image_offset=0x1001"])):
        mounted = mount(spec, *options)
        assert (mounted.ram / "pc.ram").read_bytes().startswith(b"first")
        mounted.umount()


def test_several_blocks_of_a_fresh_guest(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", "ram=pc.ram:1M,ram=vga.vram:0x10000", "ram=/rom@etc/acpi/tables:128k")
    sizes = {file.name: file.stat().st_size for file in mounted.ram.iterdir()}
    assert sizes == {"pc.ram": 1 << 20, "vga.vram": 0x10000, "%2From@etc%2Facpi%2Ftables": 128 << 10}


def test_fake_mounts_nothing(checkpoint: Path, mount_point: Path) -> None:
    assert run_mount(checkpoint, mount_point, flags=("-f",)).returncode == 0
    assert not is_mounted(mount_point)


def test_another_mount_namespace(tmp_path: Path) -> None:
    """As `mount -N` has its helper do it: relative names are meant from where the caller stands."""
    (tmp_path / "there").mkdir()
    elsewhere = subprocess.Popen(["sleep", "infinity"], preexec_fn=enter_a_mount_namespace)
    try:
        command = [BIN / "mount.ckptfs", "new", "there", "-N", f"/proc/{elsewhere.pid}/ns/mnt"]
        result = subprocess.run(
            [*command, "-o", "ram=pc.ram:1M,log=log"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert not is_mounted(tmp_path / "there")
        script = f"echo save > {tmp_path}/there/ctl && umount {tmp_path}/there"
        subprocess.run(["nsenter", "--mount", f"--target={elsewhere.pid}", "sh", "-c", script], check=True)
        assert len(decode(tmp_path / "new").blocks["pc.ram"]) == 1 << 20
    finally:
        elsewhere.kill()
        elsewhere.wait()
    result = run_mount(tmp_path / "new", tmp_path / "there", flags=("-N", "/etc/passwd"))
    assert (result.returncode, result.stderr) == (32, "mount.ckptfs: /etc/passwd: Invalid argument\n")


def test_a_mount_on_a_mount(mount: Mount, checkpoint: Path, tmp_path: Path) -> None:
    mounted = mount(checkpoint)
    (tmp_path / "other").mkdir()
    other = mount(checkpoint, path=tmp_path / "other")  # the same checkpoint elsewhere is another guest
    for directory in (mounted.path, other.path, mounted.ram):
        result = run_mount(checkpoint, directory)
        assert result.returncode == 32
        assert result.stderr == (
            f"mount.ckptfs: {directory}: ckptfs is already mounted there; `umount {directory}` first\n"
        )


def test_foreground(checkpoint: Path, mount_point: Path) -> None:
    command = [BIN / "mount.ckptfs", checkpoint, mount_point, "-o", "foreground"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(f"{checkpoint}: mounted on {mount_point}" in line for line in process.stderr)
    assert (mount_point / "ram/pc.ram").read_bytes().startswith(b"first")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 0


@pytest.fixture
def careless() -> Iterator[None]:
    """A caller who wants core files, and whose files anybody may read."""
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    umask = os.umask(0)
    yield
    os.umask(umask)
    resource.setrlimit(resource.RLIMIT_CORE, limits)


@pytest.mark.usefixtures("careless")
def test_a_daemon_holds_nothing_of_its_caller(mount: Mount, checkpoint: Path) -> None:
    mounted = mount(checkpoint)
    assert stat.S_IMODE(mounted.log.stat().st_mode) == 0o600
    for number in (0, 1, 2):
        assert os.readlink(f"/proc/{mounted.pid}/fd/{number}") == "/dev/null"
    assert os.readlink(f"/proc/{mounted.pid}/cwd") == "/"
    limits = Path(f"/proc/{mounted.pid}/limits").read_text()
    assert (
        next(line for line in limits.splitlines() if line.startswith("Max core file size")).split()[4:6]
        == ["0"] * 2
    )


def test_a_daemon_asks_to_be_an_io_flusher(checkpoint: Path, mount_point: Path, tmp_path: Path) -> None:
    """Reclaim in the daemon must not wait for pages that only it can write back; the kernel grants it to few."""
    trace = tmp_path / "strace"
    command = [
        "strace",
        "-f",
        "-e",
        "trace=prctl",
        "-o",
        trace,
        BIN / "mount.ckptfs",
        "-f",
        checkpoint,
        mount_point,
    ]
    subprocess.run(command, check=True, timeout=DEADLINE)
    assert "prctl(PR_SET_IO_FLUSHER, 1" in trace.read_text()


# --- odd paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a,suid,dev", "back\\slash", "a\\,suid", "sp ace", "new\nline", "ünï", "a=b,allow_other"]
)
def test_odd_paths_keep_nosuid_and_nodev(name: str, mount: Mount, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    path = folder / "checkpoint"
    MigrationFile().write(path)
    mounted = mount(path, path=folder / "mnt")
    entry = mount_entry(mounted.path)
    assert entry is not None
    _, options, kind, source = entry
    assert {"nosuid", "nodev"} <= options
    assert "allow_other" not in options
    assert (kind, source) == ("fuse.ckptfs", str(path))
    mounted.ctl("save")
    assert decode(path).blocks["pc.ram"][:5].tobytes() == b"first"


def test_findmnt_shows_it(mount: Mount, checkpoint: Path) -> None:
    mounted = mount(checkpoint)
    output = subprocess.run(
        ["findmnt", "-n", "-o", "SOURCE,TARGET,FSTYPE", mounted.path], check=True, capture_output=True, text=True
    ).stdout
    assert output.split() == [str(checkpoint), str(mounted.path), "fuse.ckptfs"]


# --- other users ------------------------------------------------------------------------------------------


def test_others_have_no_access(mount: Mount, checkpoint: Path, public: Path) -> None:
    mounted = mount(checkpoint, path=public / "mnt")
    for script in (f"ls {mounted.path}", f"cat {mounted.path}/status", f"echo save > {mounted.path}/ctl"):
        result = as_nobody(script)
        assert result.returncode != 0
        assert "Permission denied" in result.stderr


def test_allow_other_goes_by_the_modes(mount: Mount, checkpoint: Path, public: Path) -> None:
    mounted = mount(checkpoint, "allow_other", path=public / "mnt")
    for script in (f"ls {mounted.path}", f"cat {mounted.path}/ram/pc.ram", f"echo cancel > {mounted.path}/ctl"):
        assert "Permission denied" in as_nobody(script).stderr
    mounted.umount()
    mounted = mount(checkpoint, f"allow_other,umask=0027,gid={NOBODY.pw_gid}", path=public / "mnt")
    status = (mounted.ram / "pc.ram").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, NOBODY.pw_gid, 0o640)
    assert as_nobody(f"head -c 5 {mounted.path}/ram/pc.ram").stdout == "first"
    for script in (f"echo x >> {mounted.path}/ram/pc.ram", f"echo restore > {mounted.path}/ctl"):
        assert "Permission denied" in as_nobody(script).stderr
    mounted.umount()
    mounted = mount(checkpoint, f"allow_other,uid={NOBODY.pw_uid}", path=public / "mnt")
    assert as_nobody(f"cd {mounted.path} && exec 3<>ctl && echo restore >&3 && cat <&3").stdout.startswith("ok ")


WITHOUT_ROOT = """
set -eu
mount -t tmpfs none /mnt    # a /dev/fuse for everybody, as udev makes it; nobody else sees this one
mknod -m 666 /mnt/fuse c 10 229
mount --bind /mnt/fuse /dev/fuse
as_nobody() {{ {as_nobody} "$@"; }}

as_nobody {program} {folder}/checkpoint {folder}/mnt -o ram=pc.ram:1M,log={folder}/log
! ls {folder}/mnt           # root has no business there
as_nobody bash -c 'printf guest 1<>{folder}/mnt/ram/pc.ram && echo save >{folder}/mnt/ctl && cat {folder}/mnt/ctl'
as_nobody fusermount3 -u {folder}/mnt
"""


def test_without_root_through_fusermount3(public: Path) -> None:
    folder = public / "theirs"
    (folder / "mnt").mkdir(parents=True)
    for path in (folder, folder / "mnt"):
        os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)
    identity = shlex.join([*AS_NOBODY, *READING_ALL])
    script = WITHOUT_ROOT.format(as_nobody=identity, program=BIN / "mount.ckptfs", folder=folder)
    result = in_a_mount_namespace(script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"ok saved {folder}/checkpoint")
    assert "Permission denied" in result.stderr
    assert decode(folder / "checkpoint").blocks["pc.ram"][:5].tobytes() == b"guest"
    assert (folder / "checkpoint").stat().st_uid == NOBODY.pw_uid
    log = (folder / "log").read_text()
    assert "only root can tune the mount" in log
    assert "ERROR" not in log
