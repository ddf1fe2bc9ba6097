"""mount.ckptfs: what it makes of its arguments, and how it tells that it can't."""

import grp
import pwd
import subprocess
from pathlib import Path

import pytest

from tests.doubles.migration_file import MigrationFile
from tests.mount.conftest import Mount
from tests.mount.harness import BIN, DEADLINE, in_a_mount_namespace, is_mounted, mount_entry, run_mount

USAGE, MOUNT_FAILURE = 1, 32
NOBODY = pwd.getpwnam("nobody")
NOGROUP = grp.getgrgid(NOBODY.pw_gid).gr_name


def test_relative_paths_are_meant_from_where_the_caller_stands(
    tmp_path: Path, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mounted = mount("new", "ram=pc.ram:16M,qmp=sockets/qmp", "log=daemon.log")
    mounted.log = tmp_path / "daemon.log"
    mounted.ctl("save ram-only")
    assert (tmp_path / "new").exists()
    assert mounted.log.exists()
    assert mounted.status()["qmp"] == f"waiting {tmp_path}/sockets/qmp"
    assert mounted.status()["spec"] == str(tmp_path / "new")


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("checkpoint", "{}/checkpoint"),
        ("./a:b", "{}/a:b"),
        ("file:checkpoint", "file:{}/checkpoint"),
        ("file:sub/../checkpoint,offset=0x0", "file:{}/checkpoint,offset=0x0"),
        ("none", "none"),
    ],
)
def test_the_source_in_findmnt_can_be_mounted_from_anywhere(
    spec: str, source: str, tmp_path: Path, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("checkpoint", "a:b"):
        MigrationFile().write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    mounted = mount(spec)
    entry = mount_entry(mounted.path)
    assert entry is not None
    assert entry[3] == mounted.status()["spec"] == source.format(tmp_path)


def test_owner_and_group_by_name(mount: Mount, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", f"ram=pc.ram:1M,uid={NOBODY.pw_name},gid={NOGROUP}")
    status = (mounted.ram / "pc.ram").stat()
    assert (status.st_uid, status.st_gid) == (NOBODY.pw_uid, NOBODY.pw_gid)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("uid=no one", "mount option 'uid=no one': there is no such user"),
        ("gid=nosuch", "mount option 'gid=nosuch': there is no such group"),
        ("remount,ro", "mount option 'remount': a mount can't be remounted"),
        ("ram=pc.ram:0", "mount option 'ram=pc.ram:0': a block can't be empty"),
    ],
)
def test_an_option_that_is_refused(option: str, words: str, mount_point: Path) -> None:
    result = run_mount("none", mount_point, option)
    assert (result.returncode, result.stdout) == (USAGE, "")
    assert result.stderr.startswith(f"mount.ckptfs: {words}")
    assert result.stderr.count("\n") == 1


def test_a_name_with_a_colon_is_no_protocol(mount_point: Path) -> None:
    result = run_mount("vm-12:30.ckpt", mount_point)
    assert result.returncode == USAGE
    assert result.stderr == (
        "mount.ckptfs: unknown migration protocol: vm-12:30.ckpt"
        " (if it is the name of a file, write ./vm-12:30.ckpt)\n"
    )


def test_a_new_guest_that_could_not_be_saved(mount_point: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "missing", tmp_path / "missing/too"):
        result = run_mount(directory / "checkpoint", mount_point, "ram=pc.ram:1M")
        assert result.returncode == MOUNT_FAILURE
        assert result.stderr == (
            f"mount.ckptfs: {directory}: no such directory; the first save would create {directory}/checkpoint"
            " in it\n"
        )
    result = run_mount(tmp_path / "file/checkpoint", mount_point, "ram=pc.ram:1M")
    assert result.returncode == MOUNT_FAILURE
    assert f"{tmp_path}/file/checkpoint: Not a directory" in result.stderr


# --- what the kernel, libfuse or fusermount3 refuses --------------------------------------------------------

AS_NOBODY = (
    f"setpriv --reuid={NOBODY.pw_uid} --regid={NOBODY.pw_gid} --clear-groups --inh-caps=+dac_read_search"
    " --ambient-caps=+dac_read_search"
)
FUSE_FOR_ALL = "mknod -m 666 /mnt/fuse c 10 229; mount --bind /mnt/fuse /dev/fuse"
REFUSED = {
    "a mount point of somebody else's": (
        FUSE_FOR_ALL,
        f"chown 0 {{directory}}; {AS_NOBODY}",
        "",
        "{directory}: fusermount3: user has no write access to mountpoint {directory}",
    ),
    "allow_other": (
        f"{FUSE_FOR_ALL}; : >/mnt/fuse.conf; mount --bind /mnt/fuse.conf /etc/fuse.conf",
        AS_NOBODY,
        "allow_other",
        "{directory}: fusermount3: option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf",
    ),
    "no device": (
        "mknod /mnt/fuse c 10 250; mount --bind /mnt/fuse /dev/fuse",
        "",
        "",
        "{directory}: /dev/fuse is not there: load the kernel module (modprobe fuse); a container has to be given"
        " the device (--device /dev/fuse)",
    ),
    "a device that is not for us": (
        "mknod -m 600 /mnt/fuse c 10 229; mount --bind /mnt/fuse /dev/fuse",
        AS_NOBODY,
        "",
        "{directory}: fuse: failed to open /dev/fuse: Permission denied: a container has to be given the device"
        " (--device /dev/fuse); elsewhere its mode is 0666",
    ),
    "no fusermount3": (
        f"{FUSE_FOR_ALL}; : >/mnt/none; mount --bind /mnt/none /usr/bin/fusermount3",
        AS_NOBODY,
        "",
        "{directory}: fuse: failed to exec fusermount3: Permission denied: mounting without root takes the package"
        " fuse3",
    ),
    "root that may not mount": (
        "",
        "setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin",
        "",
        "{directory}: fusermount3: mount failed: Operation not permitted: mounting in a container takes"
        " CAP_SYS_ADMIN (--cap-add SYS_ADMIN) and a security profile that allows mount(2)",
    ),
}


@pytest.mark.parametrize(("system", "prefix", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_a_mount_that_fails_names_the_cause(
    system: str, prefix: str, options: str, words: str, public: Path
) -> None:
    directory = public / "mnt"
    directory.mkdir(mode=0o755)
    script = (
        f"set -e; mount -t tmpfs none /mnt; chown {NOBODY.pw_uid} {directory}; {system or ':'}\n"
        f"{prefix.format(directory=directory)} {BIN}/mount.ckptfs none {directory}"
        f" -o {','.join(['ram=pc.ram:1M,log=/dev/null', options])}"
    )
    result = in_a_mount_namespace(script)
    assert result.stderr == f"mount.ckptfs: {words.format(directory=directory)}\n"
    assert result.returncode == MOUNT_FAILURE


def test_a_caller_without_standard_descriptors(mount_point: Path, tmp_path: Path) -> None:
    script = f"exec {BIN}/mount.ckptfs none {mount_point} -o ram=pc.ram:1M,log={tmp_path}/log <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", script], timeout=DEADLINE).returncode == 0
    assert is_mounted(mount_point)
    assert (mount_point / "ram/pc.ram").stat().st_size == 1 << 20
    subprocess.run(["umount", mount_point], check=True, timeout=DEADLINE)
