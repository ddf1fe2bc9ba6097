"""The grammar of ctl: every command, every way to get it wrong, and the document made from it."""

from errno import EINVAL
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckptfs.errors import CommandError
from ckptfs.migration.address import FdAddress, FileMigrationArgs, LibvirtDomain, QMPSocket
from ckptfs.migration.parameters import MigrationParameters
from ckptfs.migration.size import SIZE_RULE, MiB
from ckptfs.namespace import ctl
from ckptfs.namespace.ctl import (
    COMMANDS,
    Cancel,
    Command,
    Cont,
    Help,
    Info,
    InfoTopic,
    Level,
    LockSteal,
    LogLevel,
    MigrateContinue,
    MigrateIncoming,
    Prefetch,
    Qmp,
    Reset,
    Restore,
    Save,
    SetCapability,
    SetParameter,
    Stop,
    help_text,
    markdown,
    parse_command,
)

P = FileMigrationArgs("/p")


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("save", Save()),
        ("save /p", Save(P)),
        ("save file:/p,offset=4k", Save(FileMigrationArgs("/p", 4096))),
        ("save file:p", Save(FileMigrationArgs("p"))),
        ("save fd:5", Save(FdAddress("5"))),
        ("save ./nowait", Save(FileMigrationArgs("./nowait"))),
        ("save nowait", Save(nowait=True)),
        ("save ram-only", Save(ram_only=True)),
        ("save /p nowait ram-only", Save(P, nowait=True, ram_only=True)),
        ("save ram-only /p nowait", Save(P, nowait=True, ram_only=True)),
        ('save "/my vm"', Save(FileMigrationArgs("/my vm"))),
        ("save '/my vm' nowait", Save(FileMigrationArgs("/my vm"), nowait=True)),
        ("save /my\\ vm", Save(FileMigrationArgs("/my vm"))),
        ("  save\t/p  ", Save(P)),
        ("migrate file:migfile", Save(FileMigrationArgs("migfile"))),
        ("migrate -d file:/p,offset=1", Save(FileMigrationArgs("/p", 1), nowait=True)),
        ("migrate file:/p -d", Save(P, nowait=True)),
        ('migrate {"uri": "file:/p"}', Save(P)),
        (
            'migrate {"channels": [{"channel-type": "main",'
            ' "addr": {"transport": "file", "filename": "/a b", "offset": 1}}]}',
            Save(FileMigrationArgs("/a b", 1)),
        ),
        ('migrate {"execute": "migrate", "arguments": {"uri": "file:/p"}}', Save(P)),
        ('migrate -d {"uri": "file:/p"}', Save(P, nowait=True)),
        ("""migrate '{"uri": "file:/p"}'""", Save(P)),
        ("migrate file:/{p", Save(FileMigrationArgs("/{p"))),
        ("migrate_incoming file:/p", MigrateIncoming(P)),
        ("""migrate_incoming '{"uri": "file:/p"}'""", MigrateIncoming(P)),
        ('migrate_incoming {"uri": "file:/p"}', MigrateIncoming(P)),
        ("migrate_cancel", Cancel()),
        ("cancel", Cancel()),
        ("migrate_continue pre-switchover", MigrateContinue()),
        ("lock steal", LockSteal()),
        ("restore", Restore()),
        ("prefetch", Prefetch()),
        ("prefetch pc.ram", Prefetch("pc.ram")),
        ("prefetch pc.ram 1M 0x1000", Prefetch("pc.ram", MiB, 4096)),
        ("reset", Reset()),
        ("migrate_set_capability multifd on", SetCapability("multifd", True)),
        ("migrate_set_capability xbzrle off", SetCapability("xbzrle", False)),
        ("migrate_set_parameter max-bandwidth 100", SetParameter("max-bandwidth", 100 * MiB)),
        ("migrate_set_parameter max-bandwidth 100b", SetParameter("max-bandwidth", 100)),
        ("migrate_set_parameter direct-io on", SetParameter("direct-io", True)),
        ('migrate_set_parameter tls-hostname "a b"', SetParameter("tls-hostname", "a b")),
        ("info migrate", Info(InfoTopic.MIGRATE)),
        ("info migrate_parameters", Info(InfoTopic.MIGRATE_PARAMETERS)),
        ("info migrate_capabilities", Info(InfoTopic.MIGRATE_CAPABILITIES)),
        ("stop", Stop()),
        ("cont", Cont()),
        ("qmp /run/vm1.qmp", Qmp(QMPSocket("/run/vm1.qmp"))),
        ("qmp libvirt:vm1", Qmp(LibvirtDomain("vm1"))),
        ("qmp none", Qmp(None)),
        ("loglevel debug", LogLevel(Level.DEBUG)),
        ("help", Help()),
        ("help save", Help("save")),
    ],
)
def test_a_command(line: str, command: Command) -> None:
    for text in (line, line + "\n", line + "\r\n", "\n" + line + "\n\n"):
        assert parse_command(text.encode()) == command


def test_qemus_own_example_works_as_it_stands() -> None:
    lines = """\
stop
migrate_set_capability multifd on
migrate_set_capability mapped-ram on
migrate_set_parameter max-bandwidth 0
migrate_set_parameter multifd-channels 8
migrate file:migfile
"""
    parameters = MigrationParameters()
    commands = [parse_command(line.encode()) for line in lines.splitlines(keepends=True)]
    for command in commands:
        if isinstance(command, SetParameter):
            parameters = parameters.set(command.name, command.value)
    assert (parameters.max_bandwidth, parameters.multifd_channels) == (0, 8)
    assert commands[-1] == Save(FileMigrationArgs("migfile"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "an empty command: 'help' lists all"),
        (b" \n", "an empty command: 'help' lists all"),
        (b"save\nsave\n", "one command per write: this has several lines, write them one by one"),
        (b"save\0", "a command can't contain a NUL byte"),
        (b"save /\xff", "a command has to be UTF-8 text: byte 6 is not"),
        (b"save " + b"/" * 4092, "a command is at most 4096 bytes, not 4097"),
        (b"sav", "unknown command 'sav' (did you mean 'save'?): 'help' lists all"),
        (b"SAVE", "unknown command 'SAVE' (did you mean 'save'?): 'help' lists all"),
        (b"quit", "'quit' is a command of QEMU's monitor, not of ctl: umount ends the mount"),
        (b"savevm x", "'savevm' is a command of QEMU's monitor, not of ctl: save writes a checkpoint"),
        (
            b"migrate_pause",
            "'migrate_pause' is a command of QEMU's monitor, not of ctl: pages are always restored as they are"
            " read",
        ),
        (b"xyzzy 1", "unknown command 'xyzzy': 'help' lists all"),
        (b"save nowiat", "save does not know 'nowiat' (did you mean 'nowait'?)"),
        (b"save disks", "save does not know 'disks': a file of that name is './disks'"),
        (b"save /a b/c", "save takes one target: quote a path with spaces, as in a shell"),
        (b"save ''", "save does not know '': a file of that name is './'"),
        (b"save 'a", 'No closing quotation in "\'a": quote as in a shell'),
        (b"save tcp:h:1", "transport 'socket' is not supported: a checkpoint needs a seekable file (file: or fd:)"),
        (b"save nosuch:x", "unknown migration protocol: nosuch:x (if it is the name of a file, write ./nosuch:x)"),
        (b"migrate", "usage: migrate [-d] URI"),
        (b"migrate /p", "unknown migration protocol: /p (did you mean file:/p?)"),
        (
            b"migrate_incoming ./p,offset=1",
            "unknown migration protocol: ./p,offset=1 (did you mean file:./p,offset=1?)",
        ),
        (b"migrate -r file:/p", "Cannot resume if there is no paused migration"),
        (b"migrate -d -r file:/p", "Cannot resume if there is no paused migration"),
        (b"migrate -dr file:/p", "migrate: unsupported option -dr"),
        (b"migrate -z file:/p", "migrate: unsupported option -z"),
        (b"migrate file:/a b", "migrate takes one URI: quote a path with spaces, as in a shell"),
        (b"migrate_incoming file:/a b", "usage: migrate_incoming URI"),
        (b"migrate file:/p,offset=0x20M", "file URI has bad offset 0x20M: Invalid argument"),
        (b"migrate {}", "need either 'uri' or 'channels' argument"),
        (b"migrate_incoming", "usage: migrate_incoming URI"),
        (b"migrate_incoming defer", "unknown migration protocol: defer"),
        (
            b"migrate_incoming main,addr.transport=file,addr.filename=/p,addr.offset=0",
            "unknown migration protocol: main,addr.transport=file,addr.filename=/p,addr.offset=0",
        ),
        (b"migrate_continue", "usage: migrate_continue pre-switchover"),
        (b"migrate_continue nosuch", "usage: migrate_continue pre-switchover"),
        (b"cancel now", "usage: migrate_cancel or cancel"),
        (b"restore all", "usage: restore"),
        (b"prefetch pc.ram 0", "usage: prefetch [NAME [START LENGTH]]"),
        (
            b"prefetch pc.ram x 1",
            f"bad START 'x': {SIZE_RULE}",
        ),
        (
            b"prefetch pc.ram 0 1.5",
            f"bad LENGTH '1.5': {SIZE_RULE}",
        ),
        (b"migrate_set_capability", "usage: migrate_set_capability NAME on|off"),
        (b"migrate_set_capability multifd maybe", "Expected 'on' or 'off'"),
        (b"migrate_set_capability multfid on", "invalid parameter value: multfid (did you mean multifd?)"),
        (b"migrate_set_parameter multifd-channels", "usage: migrate_set_parameter NAME VALUE"),
        (
            b"migrate_set_parameter multifd-channels 0",
            "Parameter 'multifd_channels' expects a value between 1 and 255",
        ),
        (b"migrate_set_parameter max-bandwidth 1x", "Invalid size 1x"),
        (b"info", "usage: info migrate|migrate_parameters|migrate_capabilities"),
        (b"info status", "info does not know 'status': it knows migrate, migrate_parameters, migrate_capabilities"),
        (
            b"info migrate_parameter",
            "info does not know 'migrate_parameter' (did you mean 'migrate_parameters'?): it knows migrate,"
            " migrate_parameters, migrate_capabilities",
        ),
        (b"qmp", "usage: qmp SOCKET|libvirt:NAME|none"),
        (b"loglevel verbose", "usage: loglevel debug|info|warning|error"),
    ],
)
def test_no_command(text: bytes, words: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_command(text)
    assert str(caught.value) == words
    assert caught.value.errno == EINVAL


@given(st.binary(max_size=5000) | st.text().map(str.encode))
@example(b"migrate " + b"[" * 4000)
@example(b'migrate {"a":' + b"[" * 4000)
def test_any_bytes_are_a_command_or_a_command_error(text: bytes) -> None:
    try:
        parse_command(text)
    except CommandError as error:
        assert "\n" not in str(error)  # noqa: PT017 either way is right


words = st.sampled_from([*COMMANDS, "file:/p", "{", "-d", "on", "max-bandwidth", "1k", "none", "'", "\\", "\u2028"])


@given(st.lists(words | st.text(max_size=5), max_size=6).map(" ".join))
def test_any_words_are_a_command_or_one_line_of_error(line: str) -> None:
    try:
        parse_command(line.encode("utf-8", "replace"))
    except CommandError as error:
        assert len(str(error).split("\n")) == 1  # noqa: PT017 either way is right


def test_help_lists_every_command_and_explains_each() -> None:
    listed = help_text().splitlines()
    for name in COMMANDS:
        assert any(name in line.split() for line in listed)
        assert help_text(name).splitlines()[0] in listed
    with pytest.raises(CommandError, match="did you mean 'save'"):
        help_text("sav")


def test_the_document_is_up_to_date() -> None:
    document = Path(ctl.__file__).parents[2] / "docs" / "ctl.md"
    assert document.read_text() == markdown(), "write docs/ctl.md anew from ckptfs.namespace.ctl.markdown()"


def test_every_command_is_in_the_document() -> None:
    assert all(f"`{name}" in markdown() for name in COMMANDS)
