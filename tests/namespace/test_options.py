"""Mount options: each of them, all ways to get one wrong, and what mount(8) adds."""

import dataclasses
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import CommandError
from ckptfs.migration.address import LibvirtDomain, QMPSocket
from ckptfs.migration.capabilities import CAPABILITIES
from ckptfs.migration.parameters import PARAMETERS, MigrationParameters
from ckptfs.migration.size import SIZE_RULE, MiB
from ckptfs.migration.store import StoreOptions
from ckptfs.namespace.options import MountOptions, parse_options, split_options


def changes(text: str) -> dict[str, Any]:
    """What differs from a mount without options."""
    options, default = parse_options([text]), MountOptions()
    names = [field.name for field in dataclasses.fields(MountOptions)]
    return {name: getattr(options, name) for name in names if getattr(options, name) != getattr(default, name)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("ram=pc.ram:1G", {"ram": {"pc.ram": 1024 * MiB}}),
        (
            "ram=pc.ram:0x10000000,ram=0000:00:02.0/vga.vram:16M",
            {"ram": {"pc.ram": 256 * MiB, "0000:00:02.0/vga.vram": 16 * MiB}},
        ),
        ("ro", {"read_only": True}),
        ("ro,rw", {}),
        ("qmp=/run/vm1.qmp", {"qmp": QMPSocket("/run/vm1.qmp")}),
        ("prefetch=on", {"prefetch": "on"}),
        ("prefetch=recorded", {"prefetch": "recorded"}),
        ("prefetch=off", {}),
        ("image_offset=4k", {"image_offset": 4096}),
        ("image-offset=4k", {"image_offset": 4096}),
        (
            "allow_other,uid=1000,gid=100,umask=022",
            {"allow_other": True, "uid": "1000", "gid": "100", "umask": 0o022},
        ),
        ("uid=joe,gid=kvm", {"uid": "joe", "gid": "kvm"}),
        ("umask=0", {"umask": 0}),
        ("foreground,debug,log=syslog", {"foreground": True, "debug": True, "log": "syslog"}),
        ("log=/var/log/a\\,b", {"log": "/var/log/a,b"}),
        ("log=/a=b", {"log": "/a=b"}),
        ("log=/a\\\\b", {"log": "/a\\b"}),
        ("backends=m0:m1,backends=m2", {"backends": ["m0", "m1", "m2"]}),
        ("uuid=550e8400-E29B-41d4-a716-446655440000", {"uuid": UUID("550e8400-e29b-41d4-a716-446655440000")}),
        ("shared=pc.ram:/dev/shm/a:b", {"shared": {"pc.ram": "/dev/shm/a:b"}}),
        ("shared=0000:00:02.0/vga.vram:/x", {"shared": {"0000:00:02.0/vga.vram": "/x"}}),
        ("fdset=1:5:6,fdset=2:7", {"fdset": {1: [5, 6], 2: [7]}}),
        ("fd=mig:5", {"fd": {"mig": 5}}),
        ("exclusive", {"exclusive": True}),
        ("qmp=/a,qmp=/b", {"qmp": QMPSocket("/b")}),
        (
            "qmp=libvirt:vm1,libvirt_uri=qemu:///session",
            {"qmp": LibvirtDomain("vm1"), "libvirt_uri": "qemu:///session"},
        ),
        (
            "endpoint=https://s3.example.com:9000/,region=eu-1,part_size=16M,cache=/var/cache/vm,cache_size=10G",
            {"store": StoreOptions("https://s3.example.com:9000", "eu-1", 16 * MiB, "/var/cache/vm", 10 << 30)},
        ),
    ],
)
def test_an_option(text: str, expected: dict[str, Any]) -> None:
    assert changes(text) == expected


@pytest.mark.parametrize("name", ["multifd_channels", "multifd-channels"])
def test_parameters_are_options(name: str) -> None:
    assert parse_options([f"{name}=8"]).parameters.multifd_channels == 8


def test_a_bandwidth_counts_bytes_and_direct_io_was_asked_for() -> None:
    parameters = parse_options(["max_bandwidth=100,direct_io=on"]).parameters
    assert parameters.max_bandwidth == 100
    assert parameters.direct_io_required
    assert not parse_options([""]).parameters.direct_io_required


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_is_an_option(name: str) -> None:
    value = MigrationParameters().get(name)
    if value:
        assert parse_options([f"{name}={value}"]).parameters.get(name) == value


@pytest.mark.parametrize("name", CAPABILITIES)
def test_every_capability_is_an_option(name: str) -> None:
    assert not parse_options([f"{name.replace('-', '_')}=off"]).capabilities.get(name)


@pytest.mark.parametrize(
    "text",
    [
        "_netdev,nofail,noauto,auto,user,nouser,users,owner,group,exec,noexec,suid,nosuid,dev,nodev,defaults",
        "async,sync,dirsync,atime,noatime,diratime,nodiratime,relatime,norelatime,strictatime,silent,loud",
        "x-systemd.automount,x-systemd.requires=/a,X-mount.mkdir,comment=x,user=joe",
    ],
)
def test_what_is_for_mount_is_ignored(text: str) -> None:
    assert changes(text) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ram", "mount option 'ram': expects a value after '='"),
        ("ram=", "mount option 'ram=': expects a value after '='"),
        ("ram=1G", "mount option 'ram=1G': expects ID:SIZE, as in ram=pc.ram:1G"),
        ("ram=:1G", "mount option 'ram=:1G': expects ID:SIZE, as in ram=pc.ram:1G"),
        (
            "ram=pc.ram:1x",
            f"mount option 'ram=pc.ram:1x': bad size '1x': {SIZE_RULE}",
        ),
        ("ram=pc.ram:8E", "mount option 'ram=pc.ram:8E': bad size '8E': no file is that large"),
        ("ram=a:1M,ram=a:2M", "mount option 'ram=a:2M': 'a' is given twice"),
        ("ro=1", "mount option 'ro=1': takes no value"),
        ("prefetch", "mount option 'prefetch': expects a value after '='"),
        ("prefetch=1", "mount option 'prefetch=1': expects on, off or recorded"),
        ("image_offset=16E", "mount option 'image_offset=16E': bad size '16E': has to be from 0 to less than 16E"),
        (
            "multifd_channels=256",
            "mount option 'multifd_channels=256': Parameter 'multifd-channels' expects uint8_t",
        ),
        ("direct_io", "mount option 'direct_io': expects a value after '='"),
        (
            "xbzrle=on",
            "mount option 'xbzrle=on': Multifd is not compatible with xbzrle",
        ),
        ("uid=4294967295", "mount option 'uid=4294967295': expects a name, or a number below 4294967295"),
        ("gid=٣", "mount option 'gid=٣': expects a name, or a number below 4294967295"),
        (
            "ram=pc.ram:0",
            "mount option 'ram=pc.ram:0': a block can't be empty: give it a size, as in ram=pc.ram:1G",
        ),
        (
            "rw,relatime,user_id=0,remount,ro",
            "mount option 'remount': a mount can't be remounted: write to its ctl, parameters/ and capabilities/ "
            "instead, or `umount` it and mount it again",
        ),
        (
            "uuid={550e8400-e29b-41d4-a716-446655440000}",
            "mount option 'uuid={550e8400-e29b-41d4-a716-446655440000}': expects a UUID, "
            "as in uuid=550e8400-e29b-41d4-a716-446655440000",
        ),
        ("umask=9", "mount option 'umask=9': expects an octal number up to 0777, as in umask=0027"),
        ("fdset=1", "mount option 'fdset=1': expects ID:FD[:FD...], as in fdset=1:5:6"),
        ("fdset=1:x", "mount option 'fdset=1:x': 'x' is not a number"),
        ("fd=5", "mount option 'fd=5': expects NAME:FD, as in fd=checkpoint:5"),
        (
            "ram=pc.ram:1M,shared=pc.ram:/x",
            "mount option 'shared=pc.ram:/x': it names RAM that a checkpoint leaves out, but a new guest (ram=)"
            " has no checkpoint: use one of the two",
        ),
        (
            "ram=pc.ram:1M,ro",
            "mount option 'ro': nobody could write to a new guest (ram=), or save it: leave out ro",
        ),
        (
            "shared=pc.ram:x",
            "mount option 'shared=pc.ram:x': expects ID:PATH with an absolute path, as in "
            "shared=pc.ram:/dev/shm/vm1",
        ),
        ("multifd-chanels=1", "mount option 'multifd-chanels=1': no such option (did you mean multifd_channels?)"),
        ("offset=4k", "mount option 'offset=4k': mount(8) keeps it for loop devices: say image_offset=4k"),
        (
            "max_bandwidth=x",
            "mount option 'max_bandwidth=x': Invalid size x: expects bytes (4096, 0x1000), or a suffix k, M, G, T,"
            " P or E (512M, 1.5G)",
        ),
        ("rma=pc.ram:1G", "mount option 'rma=pc.ram:1G': no such option (did you mean ram?)"),
        ("fail", "mount option 'fail': no such option"),
        ("=x", "mount option '=x': no such option"),
        (
            "map=dimm0",
            "mount option 'map=dimm0': map: 'dimm0' is not ID@ADDRESS[+LENGTH][:OFFSET], as in "
            "pc.ram@0x100000000+1G:3G",
        ),
    ],
)
def test_an_error_names_option_and_value(text: str, words: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_options([text])
    assert str(caught.value) == words


def test_mount_s_passes_over_what_is_unknown_only() -> None:
    assert parse_options(["rma=x,ro"], sloppy=True).read_only
    with pytest.raises(CommandError):
        parse_options(["ram=x"], sloppy=True)


def test_several_o_arguments_are_one() -> None:
    options = parse_options(["ram=a:1M", "ram=b:2M,debug"])
    assert list(options.ram) == ["a", "b"]
    assert options.debug


values = st.text(st.characters(codec="utf-8"), min_size=1)


@given(st.lists(st.tuples(st.from_regex(r"[a-z_-]+", fullmatch=True), st.none() | values)))
def test_escaped_values_are_split_back(pairs: list[tuple[str, str | None]]) -> None:
    def escaped(value: str) -> str:
        return value.replace("\\", "\\\\").replace(",", "\\,")

    text = ",".join(name if value is None else f"{name}={escaped(value)}" for name, value in pairs)
    assert split_options(text) == pairs


@given(
    st.text(),
    st.sampled_from(["ram", "fdset", "fd", "shared", "umask", "uid", "image_offset", "direct_io", "backends"]),
)
def test_any_text_is_options_or_a_command_error(text: str, name: str) -> None:
    for option in (text, f"{name}={text}"):
        try:
            parse_options([option])
        except CommandError as error:
            assert str(error).startswith("mount option '")  # noqa: PT017 either way is right
