"""Two machines that start anew on the RAM of one mount: the second is refused, or everybody is told."""

from pathlib import Path

import pytest

from tests.live.machines import SMALL, goes_on
from tests.mount.conftest import Mount
from tests.qemu.guest import Guest

TOLD = r"processes \d+ and \d+ are machines that both have pc\.ram with share=on"


async def test_the_second_is_refused_its_ram(mount: Mount, guest_files: Guest, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", SMALL.ram_option)
    async with SMALL.on(mounted.ram, guest_files) as vm:
        await vm.tick()
        mounted.expect_log(
            rf"RAM was refused to process \d+: pc\.ram: is the RAM of the machine in process {vm.pid}"
        )
        for share in ("share=on", "share=off"):
            with pytest.raises(EOFError) as caught:
                async with SMALL.on(mounted.ram, guest_files, share=share):
                    pass
            assert any("Device or resource busy" in note for note in caught.value.__notes__)
        with (mounted.ram / "pc.ram").open("r+b") as ram:  # a debugger is no machine
            ram.read(4096)
        await goes_on(vm)
    async with SMALL.on(mounted.ram, guest_files) as vm:  # after the first has ended
        await vm.tick()
    assert mounted.status()["shared-use"] is None


async def test_clones_of_ram_that_nobody_writes_are_not(mount: Mount, guest_files: Guest, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", SMALL.ram_option)
    async with (
        SMALL.on(mounted.ram, guest_files, share="share=off") as first,
        SMALL.on(mounted.ram, guest_files, share="share=off") as second,
    ):
        await first.tick()
        await second.tick()
        assert mounted.ctl("save").count(";") == 0
        assert mounted.status()["shared-use"] is None


async def test_what_could_not_be_seen_at_the_open_is_told(mount: Mount, guest_files: Guest, tmp_path: Path) -> None:
    mounted = mount(tmp_path / "checkpoint", SMALL.ram_option)
    mounted.expect_log(r"process \d+ is a machine that has pc\.ram with share=on, and what it writes changes")
    async with (
        SMALL.on(mounted.ram, guest_files, "-S", share="share=off") as first,
        SMALL.on(mounted.ram, guest_files, "-S") as second,
    ):
        words = (
            f"process {second.pid} is a machine that has pc.ram with share=on, and what it writes changes "
            f"the RAM of the machine in process {first.pid}, which has it with share=off"
        )
        assert mounted.wait_for(lambda status: status["shared-use"] is not None)["shared-use"] == words
        assert f"; but {words}" in mounted.ctl("save")
    mounted.ctl("save")
    assert mounted.status()["shared-use"] is None


async def test_a_destination_that_waits_for_its_source_is_told(
    mount: Mount, guest_files: Guest, tmp_path: Path
) -> None:
    mounted = mount(tmp_path / "checkpoint", SMALL.ram_option)
    mounted.expect_log(TOLD)
    async with SMALL.on(mounted.ram, guest_files) as first:
        await first.tick()
        async with SMALL.on(mounted.ram, guest_files, incoming="defer"):
            mounted.wait_for(lambda status: status["shared-use"] is not None)
