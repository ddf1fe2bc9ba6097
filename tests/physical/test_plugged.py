"""Memory that was plugged in: its address is in no checkpoint, so it is left out unless the user tells."""

from tests.mount.conftest import Mount
from tests.physical.conftest import SavedGuests
from tests.physical.test_stock_dump import flat_view

DIMM = ("-object", "memory-backend-ram,id=d0,size=64M", "-device", "pc-dimm,id=dimm0,memdev=d0")


def test_a_dimm_is_where_the_user_says(saved: SavedGuests, mount: Mount) -> None:
    one = saved.firmware("dimm", "pc", "64M,slots=2,maxmem=1G", *DIMM)
    (start, stop), *others = [(start, stop) for start, stop, region, _ in flat_view(one.mtree) if region == "d0"]
    assert (stop - start, others) == (64 << 20, [])
    lines = (mount(one.path).path / "views" / "map").read_text().splitlines()
    assert [line.split(" ")[2] for line in lines[1:]] == ["pc.ram", "pc.bios"]
    told = mount(one.path, f"map=pc.ram@0,map=d0@{start:#x}").path / "views"
    assert (told / "map").read_text().splitlines() == [
        "# known from map=",
        f"0x0 {64 << 20:#x} pc.ram 0x0",
        f"{start:#x} {64 << 20:#x} d0 0x0",
    ]
    assert (told / "phys").stat().st_size == stop
