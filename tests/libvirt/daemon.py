"""A libvirtd of the tests' own, and its domains.

It is the system's libvirtd program in a mount namespace of its own, in which /etc/libvirt, /run/libvirt and the
other folders that are compiled into it are ours: nothing of the machine is read or changed, and several run side by
side. Its PATH holds one QEMU and a few programs that compress, as it asks every QEMU that it finds what it can do.
There is no KVM in its /dev, which libvirt would ask each time whether QEMU's user may use it; from that /dev it
makes one for each machine.

What is mounted below `directory` by anybody is seen inside, as that is a shared mount.
"""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.mount.harness import enter_a_mount_namespace, unmount_by_force
from tests.qemu.stepper import Stepper

DEADLINE = 180.0
"""Seconds for any one command."""

PROGRAMS = ("qemu-system-x86_64", "gzip", "bzip2", "xz", "zstd", "mount", "sh", "sed", "ln", "cat")
_OWN = {"etc": "/etc/libvirt", "run": "/run/libvirt", "lib": "/var/lib/libvirt"}
_OWN |= {"cache": "/var/cache/libvirt", "log": "/var/log/libvirt"}
HOOK = Path(__file__).parents[2] / "mount-helpers" / "libvirt-qemu-hook"
_DEV = """\
cd /dev
umount --recursive --lazy /dev
mount -t tmpfs -o mode=755 dev /dev
cp --archive null zero full random urandom /dev
sed -n 's/^ *\\([0-9]*\\) userfaultfd$/\\1/p' /proc/misc | while read minor; do
    mknod --mode=600 /dev/userfaultfd c 10 $minor
done
mkdir /dev/pts /dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
ln -s pts/ptmx /dev/ptmx
"""
_KEEPER = """\
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)
print(subprocess.call(sys.argv[1:], stdout=2), flush=True)
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
"""
"""Starts a daemon and reaps what it leaves behind (PR_SET_CHILD_SUBREAPER): libvirt takes a zombie for alive."""

_QEMU_CONF = """\
security_driver = "none"
cgroup_controllers = [ ]
stdio_handler = "file"
memory_backing_dir = "{memory}"
"""
_LIBVIRTD_CONF = 'auth_unix_rw = "none"\nlog_outputs = "3:file:{log}"\n'


class VirshError(RuntimeError):
    """What virsh said when it failed."""


class Libvirtd:
    """A libvirtd from `start` to `stop`; machines go on while it is restarted. Everybody may pass `directory`."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="libvirt-"))
        self.directory.chmod(0o755)
        subprocess.run(["mount", "--bind", self.directory, self.directory], check=True)
        subprocess.run(["mount", "--make-shared", self.directory], check=True)
        self._state = self.directory / "state"
        for name in _OWN:
            (self._state / name).mkdir(parents=True)
        self.hooks = self._state / "etc" / "hooks" / "qemu.d"
        self.memory = self._state / "memory"
        self.managed = self._state / "lib" / "qemu" / "save"
        """Where managed saves are."""
        self.hooks.mkdir(parents=True)
        shutil.copy(HOOK, self.hooks / "ckptfs")
        self.memory.mkdir()
        self.configure("qemu", "")
        self.configure("libvirtd", _LIBVIRTD_CONF.format(log=self._state / "libvirtd.log"))
        self._programs = self._state / "bin"
        self._programs.mkdir()
        self.emulator = self._programs / PROGRAMS[0]
        for program in PROGRAMS:
            if path := shutil.which(program):
                (self._programs / program).symlink_to(path)
        self.uri = f"qemu+unix:///system?socket={self._state}/run/libvirt-sock"
        self._pidfd = -1
        self.devices: Path
        """The /dev that it sees, as long as it runs."""
        self._keepers: list[subprocess.Popen[bytes]] = []

    def configure(self, name: str, text: str) -> None:
        """Write a file of its configuration, which counts from the next start on."""
        basis = _QEMU_CONF.format(memory=self.memory) if name == "qemu" else ""
        (self._state / "etc" / f"{name}.conf").write_text(basis + text)

    def start(self) -> None:
        """Returns when it answers."""
        binds = "".join(
            f"mkdir -p {path}; mount --bind {self._state / name} {path}; " for name, path in _OWN.items()
        )
        pid_file = self._state / "pid"
        keeper = subprocess.Popen(
            [
                *("sh", "-ec"),
                f'{binds} {_DEV} export PATH={self._programs}; exec "$@"',
                *("sh", sys.executable, "-c", _KEEPER),
                *(str(shutil.which("libvirtd")), "--daemon", "--pid-file", pid_file),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=partial(enter_a_mount_namespace, self.directory),
        )
        assert keeper.stdout is not None
        with keeper.stdout:
            assert keeper.stdout.readline() == b"0\n", self.log()
        self._keepers.append(keeper)
        pid = int(pid_file.read_text())
        self._pidfd = os.pidfd_open(pid)
        self.devices = Path(f"/proc/{pid}/root/dev")
        self.virsh("version")

    def stop(self) -> None:
        """End it; its machines go on."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        assert poll.poll(DEADLINE * 1000), "libvirtd did not end"
        os.close(self._pidfd)

    def restart(self) -> None:
        """End it, and start it again."""
        self.stop()
        self.start()

    def close(self) -> None:
        """End its machines and it, and leave nothing behind."""
        for name in self.virsh("list", "--name").split():
            self.virsh("destroy", name)
        self.stop()
        for keeper in self._keepers:
            keeper.wait(DEADLINE)
        unmount_by_force(self.directory)
        shutil.rmtree(self.directory)

    def virsh(self, *arguments: str | Path) -> str:
        """Run a command of virsh and return what it prints; VirshError if it fails."""
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri, *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip
        if done.returncode:
            raise VirshError(done.stderr.strip())
        return done.stdout.strip()

    def log(self) -> str:
        """What it has logged."""
        return (self._state / "libvirtd.log").read_text()


XML = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{vm.name}</name>
  <metadata>{vm.metadata}</metadata>
  <memory unit='MiB'>{vm.memory}</memory>
  {vm.backing}
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <loader readonly='yes' type='rom'>{vm.stepper.rom}</loader>
  </os>
  <devices>
    <emulator>{vm.libvirtd.emulator}</emulator>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{vm.serial}' append='on'/></serial>
    <memballoon model='none'/>
    {vm.devices}
  </devices>
  <qemu:commandline>{arguments}</qemu:commandline>
</domain>
"""

SHARED = "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>"
"""RAM in files of libvirt's memory_backing_dir."""


def on_mount(path: Path) -> str:
    """The metadata of a domain whose RAM the hook puts on a mount."""
    return f'<ckptfs:mount xmlns:ckptfs="urn:ckptfs" path="{path}"/>'


def disk_of(path: Path) -> str:
    """A new disk that the guest knows: see `Stepper`."""
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return (
        f"<disk type='file'><driver name='qemu' type='raw'/><source file='{path}'/>"
        "<target dev='vda' bus='ide'/></disk>"
    )


@dataclass(frozen=True)
class Domain:
    """A domain whose guest is a Stepper: it stops when its registers, memory and disk are not of one moment."""

    libvirtd: Libvirtd
    name: str
    stepper: Stepper
    memory: int = 16
    """In MiB."""
    backing: str = ""
    metadata: str = ""
    devices: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def serial(self) -> Path:
        """The file that its guest prints into."""
        return self.libvirtd.directory / f"{self.name}.serial"

    def xml(self) -> Path:
        """A file with its description."""
        path = self.libvirtd.directory / f"{self.name}.xml"
        arguments = "".join(f"<qemu:arg value='{argument}'/>" for argument in self.arguments)
        path.write_text(XML.format(vm=self, arguments=arguments))
        return path

    def define(self) -> None:
        """Make it known to libvirtd; it has printed nothing yet."""
        self.serial.unlink(missing_ok=True)
        self.libvirtd.virsh("define", self.xml())

    def start(self) -> None:
        """Start it, and wait until its guest runs."""
        self.libvirtd.virsh("start", self.name)
        self.goes_on()

    def state(self) -> str:
        """What `virsh domstate --reason` says."""
        return self.libvirtd.virsh("domstate", self.name, "--reason")

    def goes_on(self, passes: int = 2) -> None:
        """Wait until its guest has verified all of its memory that often."""
        enough = len(self._printed()) + passes
        end = time.monotonic() + DEADLINE
        while len(printed := self._printed()) < enough and "!" not in printed:
            assert time.monotonic() < end, f"{self.name}: its guest stands still ({self.state()})"
            time.sleep(0.02)
        assert "!" not in printed, f"{self.name}: its guest's memory or disk is wrong"

    def _printed(self) -> str:
        return self.serial.read_text() if self.serial.exists() else ""

    def remove(self) -> None:
        """Destroy it and forget it."""
        for arguments in (("destroy", self.name), ("undefine", self.name, "--managed-save")):
            try:
                self.libvirtd.virsh(*arguments)
            except VirshError as error:
                if not re.search("not running|failed to get domain", str(error)):
                    raise
