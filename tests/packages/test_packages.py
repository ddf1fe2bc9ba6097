"""What others install: the sdist and its wheel, `make install` without a network, the Debian package."""

import os
import shlex
import subprocess
import tarfile
import zipfile
from email.parser import BytesParser
from email.policy import compat32
from pathlib import Path

import pytest

import ckptfs
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import mount_point  # noqa: F401  a fixture
from tests.mount.harness import BIN, in_a_mount_namespace

ROOT = Path(__file__).parents[2]
PATIENCE = 300
"""s that a command may take."""


def run(command: list[str | Path]) -> str:
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# --- PyPI's ------------------------------------------------------------------------------------------------


def test_the_sdist_is_the_whole_project_and_its_wheel_can_be_installed(tmp_path: Path) -> None:
    run([BIN / "python", "-m", "build", "--no-isolation", "--outdir", tmp_path])  # the wheel from the sdist
    name = f"ckptfs-{ckptfs.__version__}"
    with tarfile.open(tmp_path / f"{name}.tar.gz") as sdist:
        members = {member.name: member for member in sdist}
    for path in ("LICENSE", "CHANGELOG.md", "Makefile", "docs/format.md", "tests/conftest.py", ".ci/install"):
        assert f"{name}/{path}" in members
    assert members[f"{name}/mount-helpers/install"].mode & 0o111
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl") as wheel:
        names = wheel.namelist()
        metadata = BytesParser(policy=compat32).parsebytes(wheel.read(f"{name}.dist-info/METADATA"))
        commands = wheel.read(f"{name}.dist-info/entry_points.txt").decode()
    assert {path.split("/")[0] for path in names} == {"ckptfs", f"{name}.dist-info"}
    assert f"{name}.dist-info/licenses/LICENSE" in names
    assert "ckptfs/py.typed" in names
    assert metadata["Version"] == ckptfs.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_payload().startswith("# ckptfs\n")
    assert "mount.ckptfs = " in commands


def test_the_changelog_tells_of_this_version() -> None:
    assert f"\n## [{ckptfs.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


# --- make install ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `make wheels` has put what is installed."""
    directory = tmp_path_factory.mktemp("wheels")
    run(["make", "wheels", f"WHEELS={directory}"])
    return directory


MOUNT_8 = """
set -eu
mount -t tmpfs none /usr/sbin       # where mount(8) looks for helpers; nobody else sees this one
mount -t tmpfs -o ro none {storage}
! mount-helpers/install {storage} {prefix} {wheels} 2>{words}
grep -F "can't be written by" {words}
umount {storage}
! mount-helpers/install {staging} {prefix} {storage} 2>{words}
grep -F "has no wheel of ckptfs" {words}
ln -s {wheels}/ckptfs-*.whl {storage}
touch {storage}/pyfuse3-3.5.0-cp27-cp27mu-linux_x86_64.whl
! mount-helpers/install {staging} {prefix} {storage} 2>{words}
grep -F "are not for it (cp3" {words}
rm {storage}/*
test ! -e {staging}
unshare --net mount-helpers/install {staging} {prefix} {wheels}
interpreter=$(head -n 1 {staging}{prefix}/bin/ckptfs | cut -d ' ' -f 1 | tr -d '#!')
setpriv --reuid=65534 --regid=65534 --clear-groups env $interpreter -c ""
test -z "$(find {staging} -type d '(' -name tests -o -name _tests ')')"
# and as a package is unpacked:
tar -C {staging} -c . | tar -C / -x --keep-directory-symlink --no-overwrite-dir
rm -r {staging}
test "$(readlink /sbin/mount.ckptfs)" = {prefix}/bin/mount.ckptfs
for page in mount.ckptfs.8 ckptfs.1 ckptfs.5; do
    man -M {prefix}/share/man --where ${{page##*.}} ${{page%.*}} | grep /share/man/man${{page##*.}}/$page
done
bash -c '. {prefix}/share/bash-completion/completions/ckptfs; complete -p ckptfs'

{prefix}/bin/qmp-shell --help | grep -F qmp_server
mount -t tmpfs none /etc/libvirt
eval "$(grep '^install -D ' docs/howto/libvirt.md | sed 's|/usr/local|'{prefix}'|')"
/etc/libvirt/hooks/qemu.d/ckptfs vm prepare begin - </dev/null
umount /etc/libvirt
mount -t ckptfs {checkpoint} {directory} -o prefetch=on,multifd_channels=3
findmnt -n -o FSTYPE,OPTIONS {directory} | grep '^fuse.ckptfs .*nosuid,nodev'
test "$(head -c 5 {directory}/ram/pc.ram)" = first
test "$(cat {directory}/parameters/multifd-channels)" = 3
umount {directory}

mount -T {fstab} {directory}
test "$(head -c 5 {directory}/ram/pc.ram)" = first
{prefix}/bin/ckptfs info {directory} | grep pc.ram
mount -o remount,ro {directory} 2>&1 | grep -F "a mount can't be remounted"
umount {directory}

mount -t tmpfs none {storage}
for umount in umount 'umount -c' '{prefix}/bin/ckptfs umount -q'; do         # -c: as systemd does
    mount -t ckptfs {storage}/vm {directory} -o ram=pc.ram:4M,max_bandwidth=2M
    dd if=/dev/urandom of={directory}/ram/pc.ram bs=1M count=2 conv=notrunc status=none
    echo "save nowait" >{directory}/ctl
    $umount {directory}
    test "$(ls -A {storage})" = vm          # and no temporary file: the save is over
    rm {storage}/vm
    mount -o remount,ro {storage}           # EBUSY as long as anybody writes there
    mount -o remount,rw {storage}
done
mount -t ckptfs {storage}/vm {directory} -o ram=pc.ram:4M
printf written 1<>{directory}/ram/pc.ram
umount {directory} 2>&1 | grep -F '1 written page (4 KiB) not saved'
umount {storage}
! grep -s {directory} /run/mount/utab

! mount -t ckptfs {checkpoint} {directory} -o nosuch
! mount -t ckptfs /nowhere {directory}
mount -t ckptfs /nowhere {directory} -o nosuch 2>&1 | grep -F "mount option 'nosuch'"

mount-helpers/uninstall '' {prefix}
test -z "$(ls /sbin)"
test -z "$(find {prefix} -type f)"
echo all of it
"""


def test_mount_and_fstab_after_an_install(wheels: Path, mount_point: Path, tmp_path: Path) -> None:  # noqa: F811
    prefix, fstab, checkpoint = tmp_path / "prefix", tmp_path / "fstab", tmp_path / "checkpoint"
    MigrationFile(blocks=[Block("pc.ram", 16, {0: b"first"})]).write(checkpoint)
    fstab.write_text(f"{checkpoint} {mount_point} ckptfs noauto,nofail,x-systemd.automount,prefetch=on 0 0\n")
    names = {
        "wheels": wheels,
        "staging": tmp_path / "staging",
        "words": tmp_path / "words",
        "prefix": prefix,
        "fstab": fstab,
        "checkpoint": checkpoint,
        "directory": mount_point,
        "storage": tmp_path / "storage",
    }
    names["storage"].mkdir()
    script = MOUNT_8.format(**{name: shlex.quote(str(path)) for name, path in names.items()})
    result = in_a_mount_namespace(script, PATIENCE, cwd=ROOT)
    assert result.stdout.endswith("all of it\n"), result.stdout + result.stderr
    assert not Path("/sbin/mount.ckptfs").is_relative_to(prefix)


# --- Debian's ----------------------------------------------------------------------------------------------


def test_the_debian_package(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPKG_DEB_COMPRESSOR_TYPE", "none")  # it is looked at, and no more
    run([ROOT / "mount-helpers" / "deb", wheels, tmp_path])
    (package,) = tmp_path.glob("*.deb")
    assert package.name.startswith(f"ckptfs_{ckptfs.__version__}-1~")
    depends = run(["dpkg-deb", "--field", package, "Depends"])
    assert "libfuse3-" in depends
    assert "fuse3, " in depends
    assert "python3 (>= 3." in depends
    run(["dpkg-deb", "--raw-extract", package, tmp_path / "tree"])
    run(["sh", "-ec", f"cd {shlex.quote(str(tmp_path / 'tree'))}; md5sum --quiet --check DEBIAN/md5sums"])
    installed = tmp_path / "tree" / "usr"
    assert {path.name for path in (tmp_path / "tree").iterdir()} == {"DEBIAN", "usr"}  # /sbin is a link
    assert os.readlink(installed / "sbin" / "mount.ckptfs") == "/usr/bin/mount.ckptfs"
    assert (installed / "bin" / "ckptfs").read_text().startswith("#!/usr/bin/python3 -I\n")
    assert "usr/lib/ckptfs/pyfuse3" in (installed / "share/doc/ckptfs/copyright").read_text()
    assert str(tmp_path) not in (installed / "bin" / "ckptfs").read_text()
