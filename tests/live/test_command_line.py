import pytest

from ckptfs.qemu.clones import Clone, MACAddresses, arguments_of
from ckptfs.qemu.command_line import Option, inherited_descriptors, join, parse, without_memory


def changed(text: str, *, has_serial: bool = False, snapshot: bool = False) -> list[str]:
    clone = Clone(3, "/run/clones", "vm-3")
    return join(arguments_of(clone, parse(text.split()), MACAddresses(), has_serial=has_serial, snapshot=snapshot))


@pytest.mark.parametrize(
    "text",
    [
        "-m 1G -nodefaults -S disk.img -device virtio-rng-pci",
        "-object {'qom-type':'memory-backend-ram','id':'m0'}",
        "-name a,,b -daemonize",
    ],
)
def test_what_is_not_changed_stays_as_it_is(text: str) -> None:
    assert join(parse(text.split())) == text.split()


def test_two_dashes_are_one() -> None:
    assert join(parse(["--enable-kvm", "--m", "1G"])) == ["-enable-kvm", "-m", "1G"]


def test_properties() -> None:
    assert Option("object", "memory-backend-file,id=a,,b,share").properties() == {
        "": "memory-backend-file", "id": "a,b", "share": "on",
    }  # fmt: skip
    assert Option("m", "size=1G,slots=2").properties() == {"size": "1G", "slots": "2"}
    assert Option("object", '{"qom-type": "x", "size": 5}').properties() == {"qom-type": "x", "size": 5}
    assert Option("object", "{no json").properties() == {}
    assert Option("snapshot").properties() == {}


def test_a_property_is_set_in_either_form() -> None:
    assert Option("device", "e1000,mac=1,netdev=n").with_property("mac", "a,b").value == "e1000,netdev=n,mac=a,,b"
    assert Option("device", '{"driver": "e1000"}').with_property("mac", "2").value == (
        '{"driver": "e1000", "mac": "2"}'
    )


def test_memory_is_left_out_and_nothing_else() -> None:
    kept = "-object memory-backend-ram,id=other,size=1M -object rng-random,id=m0 -machine pc,memory-backend=m0"
    left_out = (
        "-object memory-backend-ram,id=m0,size=1M -incoming defer -mem-path /x -mem-prealloc -daemonize "
        '-loadvm tag -object {"qom-type":"memory-backend-memfd","id":"m0"}'
    )
    assert join(without_memory(parse(f"{left_out} {kept}".split()), {"m0"})) == kept.split()


@pytest.mark.parametrize(
    "value", ["socket,id=c,fd=7", "tap,id=n,fds=3:4,vhostfds=5:6", "fd=3,id=n", "tap,id=n,vhostfd=9"]
)
def test_descriptors_of_a_former_parent_are_found(value: str) -> None:
    assert inherited_descriptors([Option("netdev", value), Option("netdev", "user,id=fd=x")]) == [value]


def test_a_clone_has_its_number_where_the_caller_wants_it() -> None:
    arguments = changed("-netdev user,id=n,hostfwd=tcp::70{n}-:22 -serial file:my-{n} -name vm{n}")
    assert "user,id=n,hostfwd=tcp::703-:22" in arguments
    assert "file:my-3" in arguments
    assert [arguments[i + 1] for i, word in enumerate(arguments) if word == "-name"] == ["vm3"]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("-device virtio-net-pci,netdev=n", "mac=52:54:00:"),
        ('-device {"driver":"e1000","netdev":"n"}', '"mac": "52:54:00:'),
        ("-nic user,mac=52:54:00:12:34:56", "user,mac=52:54:00:"),
        ("-net nic", "macaddr=52:54:00:"),
    ],
)
def test_every_card_has_an_address_of_its_own(text: str, address: str) -> None:
    first, second = changed(text)[1], changed(text)[1]
    assert address in first
    assert first != second
    assert "12:34:56" not in first


@pytest.mark.parametrize(
    "text",
    ["-nic none", "-net user", "-device virtio-rng-pci", "-device virtio-net-pci,netdev=n,mac=52:54:0:0:0:{n}"],
)
def test_no_other_option_gets_one(text: str) -> None:
    assert changed(text)[:2] == text.replace("{n}", "3").split()


def test_two_cards_have_two_addresses() -> None:
    arguments = changed("-device e1000,netdev=a -device e1000,netdev=b")
    assert arguments[1].rpartition("mac=")[2] != arguments[3].rpartition("mac=")[2]


def test_the_generation_is_another() -> None:
    assert changed("-device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87")[1] == "vmgenid,guid=auto"


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("-serial stdio", ["file:/run/clones/3.serial"]),
        ("-serial none -nodefaults", ["none"]),
        ("-serial pty -serial pty", ["file:/run/clones/3.serial", "file:/run/clones/3.serial1"]),
        ("-m 1G", ["file:/run/clones/3.serial"]),
        ("-nodefaults", []),
    ],
)
def test_serial_lines_go_to_files(text: str, files: list[str]) -> None:
    arguments = changed(text, has_serial=True)
    assert [arguments[i + 1] for i, word in enumerate(arguments) if word == "-serial"] == files


def test_what_is_shared_otherwise() -> None:
    assert changed("-nodefaults", snapshot=True) == [
        "-nodefaults", "-display", "none", "-monitor", "none", "-snapshot", "-name", "guest=vm-3",
        "-qmp", "unix:/run/clones/3.qmp,server=on,wait=off",
    ]  # fmt: skip
    assert changed("-snapshot -vnc :{n} -monitor null", snapshot=True)[:5] == [
        "-snapshot", "-vnc", ":3", "-monitor", "null",
    ]  # fmt: skip
