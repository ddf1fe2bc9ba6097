import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import RunCkptfs
from tests.doubles.migration_file import Block, MigrationFile
from tests.mount.conftest import Mount
from tests.qemu.machine import Qemu
from tests.qemu.stock_checkpoint import StockCheckpoint, StockCheckpoints

MiB = 1 << 20
NUMA = (
    "-object", "memory-backend-ram,id=m0,size=64M", "-numa", "node,memdev=m0",
    "-object", "memory-backend-ram,id=m1,size=64M", "-numa", "node,memdev=m1",
)  # fmt: skip


def args(run_ckptfs: RunCkptfs, *arguments: str | Path) -> list[str]:
    return run_ckptfs("qemu-args", *arguments).stdout.split()


def machine_of(checkpoint: StockCheckpoint) -> str:
    """The machine type that stock QEMU wrote into its file: be32 length and name, after 9 bytes."""
    header = checkpoint.path.read_bytes()[:100]
    return header[13 : 13 + int.from_bytes(header[9:13])].decode()


def test_a_fresh_guest(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    mounted = mount(tmp_path / "new", "ram=pc.ram:16M")
    assert args(run_ckptfs, mounted.path) == [
        "-m", "16M",
        "-object",
        f"memory-backend-file,id=pc.ram,size={16 * MiB},mem-path={mounted.path}/ram/pc.ram,share=on",
        "-machine", "memory-backend=pc.ram",
    ]  # fmt: skip


def test_a_checkpoint_of_a_machine(stock_checkpoint: StockCheckpoints, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    checkpoint = stock_checkpoint()
    mounted = mount(checkpoint.path)
    backend = f"memory-backend-file,id=pc.ram,size={128 * MiB},mem-path={mounted.path}/ram/pc.ram"
    for share in ("on", "off"):
        assert args(run_ckptfs, mounted.path, "--share", share) == [
            "-m", "128M",
            "-object", f"{backend},share={share}",
            "-machine", f"{machine_of(checkpoint)},memory-backend=pc.ram",
            "-incoming", f"file:{mounted.path}/vmstate",
        ]  # fmt: skip


def test_a_checkpoint_of_ram_alone(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    mount(tmp_path / "new", "ram=pc.ram:16M").ctl("save")
    assert args(run_ckptfs, mount(tmp_path / "new").path)[-2:] == ["-machine", "memory-backend=pc.ram"]


def test_numa_nodes_are_in_the_order_of_the_blocks(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    mounted = mount(tmp_path / "new", "ram=m1:16M,ram=m0:32M")
    found = args(run_ckptfs, mounted.path)
    assert found[:2] == ["-m", "48M"]
    assert [word.partition(",size")[0] for word in found if "memory-backend-file" in word] == [
        "memory-backend-file,id=m1",
        "memory-backend-file,id=m0",
    ]
    assert found[-4:] == ["-numa", "node,memdev=m1", "-numa", "node,memdev=m0"]


def test_numa_nodes_whose_order_a_checkpoint_hides(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    MigrationFile(blocks=[Block("m1", 512), Block("m0", 256)]).write(tmp_path / "file")
    path = mount(tmp_path / "file").path
    assert run_ckptfs("qemu-args", path, code=1).stderr == (
        f"{path}: the checkpoint does not tell in which order its NUMA nodes have m1, m0: "
        "say --nodes ID,ID as the machine had it\n"
    )
    found = args(run_ckptfs, path, "--nodes", "m0,m1")
    assert [word for word in found if word.startswith("node")] == ["node,memdev=m0", "node,memdev=m1"]
    line = run_ckptfs("qemu-args", path, "--nodes", "m0,m2", code=2).stderr
    assert line == "ckptfs: --nodes: it is m1,m0, in the right order\n"


def test_only_memory_backends_are_named(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    MigrationFile(blocks=[Block("/objects/ram0", 512), Block("vga.vram", 1)]).write(tmp_path / "file")
    found = args(run_ckptfs, mount(tmp_path / "file").path)
    assert next(word for word in found if word.startswith("memory-backend-file")).startswith(
        f"memory-backend-file,id=ram0,size={2 * MiB},"
    )
    assert "ram/%2Fobjects%2Fram0," in found[3]
    assert found[5].endswith(",memory-backend=ram0")


def test_without_a_memory_backend(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    path = mount(tmp_path / "new", "ram=vga.vram:16M").path
    line = run_ckptfs("qemu-args", path, code=1).stderr
    assert line.startswith(f"{path}: no RAM block here looks like a memory backend")


def test_a_name_that_no_backend_can_have(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    path = mount(tmp_path / "new", "ram=my ram:16M").path
    line = run_ckptfs("qemu-args", path, code=2).stderr
    assert line == "ckptfs: RAM block 'my ram': QEMU has no memory backend of this name\n"


def test_no_machine_starts_with_arguments_that_are_none(
    tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs
) -> None:
    path = mount(tmp_path / "new", "ram=vga.vram:16M").path
    for source in (path, tmp_path / "nothing"):
        refused = run_ckptfs("qemu-args", source, code=1).stdout.split()
        qemu = subprocess.run(
            ["qemu-system-x86_64", *refused, "-S", "-display", "none"], capture_output=True, text=True, timeout=60
        )
        assert (qemu.returncode, qemu.stderr) == (
            1,
            "qemu-system-x86_64: -refused-by-ckptfs: invalid option\n",
        )


def test_pages_written_since_the_checkpoint(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    MigrationFile().write(tmp_path / "file")
    mounted = mount(tmp_path / "file")
    with (mounted.ram / "pc.ram").open("r+b") as ram:
        ram.write(b"patched")
    assert run_ckptfs("qemu-args", mounted.path, code=1).stderr == (
        f"{mounted.path}: pages have been written since the checkpoint, so no machine can start from it: "
        f"`echo reset > {mounted.path}/ctl` drops them, `save` makes a new checkpoint\n"
    )
    mounted.ctl("reset")
    args(run_ckptfs, mounted.path)


@pytest.mark.parametrize("name", ["my vm", "vm*"])
def test_a_path_that_a_shell_would_split(name: str, tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    path = mount(tmp_path / "new", "ram=pc.ram:16M", path=tmp_path / name).path
    line = run_ckptfs("qemu-args", path, code=2).stderr
    assert line.startswith(f"ckptfs: {path}: has ")
    assert "mount it elsewhere" in line


def test_a_file(tmp_path: Path, run_ckptfs: RunCkptfs) -> None:
    for name, offset in ("file", 0), ("behind", 0x3000), ("my vm", 0):
        MigrationFile(stream_offset=offset).write(tmp_path / name)
    plain, behind = (
        run_ckptfs("qemu-args", tmp_path / name, "--offset", offset).stdout
        for name, offset in (("file", "0"), ("behind", "12k"))
    )
    assert behind == plain.replace(f"{tmp_path}/file", f"{tmp_path}/behind")
    for words in ("--share", "on"), ("--nodes", "pc.ram"):
        assert "are for mounts" in run_ckptfs("qemu-args", tmp_path / "file", *words, code=2).stderr
    assert run_ckptfs("qemu-args", tmp_path / "file", "--share", "off").stdout == plain
    assert "which a shell would split; rename it" in run_ckptfs("qemu-args", tmp_path / "my vm", code=2).stderr


def test_a_read_only_mount_has_clones_only(tmp_path: Path, mount: Mount, run_ckptfs: RunCkptfs) -> None:
    MigrationFile().write(tmp_path / "file")
    path = mount(tmp_path / "file", "ro").path
    assert args(run_ckptfs, path)[3].endswith(",share=off,readonly=on,rom=off")
    assert args(run_ckptfs, path, "--share", "off") == args(run_ckptfs, path)
    line = run_ckptfs("qemu-args", path, "--share", "on", code=2).stderr
    assert line == f"ckptfs: {path}: is mounted read-only (ro), so its guests have share=off\n"


@pytest.mark.parametrize(
    ("options", "arguments", "name"), [([], [], "vm1"), (["ro"], [], "vm,1"), ([], ["--share", "off"], "vm1")]
)
async def test_qemu_starts_with_them(
    options: list[str],
    arguments: list[str],
    name: str,
    stock_checkpoint: StockCheckpoints,
    mount: Mount,
    run_ckptfs: RunCkptfs,
    tmp_path: Path,
) -> None:
    checkpoint = stock_checkpoint()
    mounted = mount(checkpoint.path, *options, path=tmp_path / name)
    found = args(run_ckptfs, mounted.path, *arguments)
    async with Qemu(checkpoint.guest, *checkpoint.variant.devices, *found) as vm:
        await vm.cont()
        assert await vm.tick() == checkpoint.last_tick + 1
    assert (mounted.status()["written-pages"] > 0) is (not options and not arguments)


async def test_a_machine_with_two_numa_nodes_goes_on(
    stock_checkpoint: StockCheckpoints, mount: Mount, run_ckptfs: RunCkptfs
) -> None:
    checkpoint = stock_checkpoint(devices=NUMA)
    found = args(run_ckptfs, mount(checkpoint.path).path)
    assert found.count("-numa") == 2
    async with Qemu(checkpoint.guest, *found) as vm:
        await vm.cont()
        assert await vm.tick() == checkpoint.last_tick + 1
