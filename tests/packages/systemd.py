"""A systemd of one's own: process 1 of some namespaces, on a copy of this machine's files that ends with it."""

import os
import shlex
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mount.harness import BIN, enter_a_mount_namespace

PATIENCE = 120
"""s for systemd to start, and for one of its commands."""

_BOOT = """
mount -t tmpfs tmpfs {root}
mkdir {root}/upper {root}/work {root}/all
mount -t overlay overlay {root}/all -o lowerdir=/,upperdir={root}/upper,workdir={root}/work
cd {root}/all
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mkdir -p ckpt mnt/vm1 etc/vm
mount --bind {ckpt} ckpt
cp {units}/* etc/systemd/system
for program in {bin}/ckptfs {bin}/mount.ckptfs {bin}/umount.fuse.ckptfs; do ln -sf $program usr/sbin; done
printf '[Unit]\\nDefaultDependencies=no\\n' > etc/systemd/system/trial.target
echo {settings} > etc/vm/vm1
exec env -i container=trial NOTIFY_SOCKET=@{name} PATH=/usr/sbin:/usr/bin \\
    chroot . /lib/systemd/systemd --unit=trial.target --log-target=null
"""


class Systemd:
    """It runs; `pid` is its process here."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def run(self, *command: str, code: int = 0) -> str:
        """Run a command where it is; return what that prints."""
        inside = ["nsenter", f"--target={self.pid}", "--pid", "--mount", "--root", "--wd", *command]
        result = subprocess.run(
            inside,
            env={"PATH": "/usr/sbin:/usr/bin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        assert result.returncode == code, result.stdout + self.journal()
        return result.stdout

    def journal(self) -> str:
        """All that its units have said."""
        return subprocess.run(
            ["nsenter", f"--target={self.pid}", "--mount", "--root", "journalctl", "--no-pager"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        ).stdout


@contextmanager
def booted(directory: Path, units: Path, ckpt: Path, settings: str) -> Iterator[Systemd]:
    """Boot it with `units`; `ckpt` is its /ckpt, `settings` are what /etc/vm/vm1 holds."""
    name = f"ckptfs-{os.getpid()}-{directory.name}"
    root = directory / "root"
    root.mkdir()
    places = {"root": root, "units": units, "ckpt": ckpt, "bin": BIN}
    script = _BOOT.format(
        name=name, settings=shlex.quote(settings), **{key: shlex.quote(str(path)) for key, path in places.items()}
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, (directory / "boot").open("wb") as log:
        ready.bind(f"\0{name}")
        ready.settimeout(PATIENCE)
        namespaces = ["--pid", "--cgroup", "--ipc", "--uts", "--fork", "--kill-child"]
        process = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-euc", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=enter_a_mount_namespace,
        )
        try:
            while b"READY=1" not in ready.recv(1 << 12).split(b"\n"):
                pass
            yield Systemd(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()))
        finally:
            process.kill()
            process.wait(PATIENCE)
