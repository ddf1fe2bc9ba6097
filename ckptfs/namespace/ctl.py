"""The grammar of ctl: one table of commands, from which parsing, ``help`` and docs/ctl.md follow.

Words are separated by spaces and quoted as in a shell (``save "/ckpt/my vm"``). A command becomes a typed
dataclass; nothing below looks at its text again.
"""

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum
from textwrap import fill

from ckptfs.errors import CommandError, likely
from ckptfs.migration.address import (
    MonitorAddress,
    SeekableAddress,
    parse_migrate_json,
    parse_monitor,
    parse_target,
    parse_uri,
    seekable_file,
)
from ckptfs.migration.capabilities import find_capability, parse_state
from ckptfs.migration.parameters import ParameterValue, find_parameter
from ckptfs.migration.size import MiB, parse_size_of

COMMAND_LENGTH_MAX = 4096
"""Bytes of one command."""


@dataclass(frozen=True)
class Save:
    """``save`` and ``migrate``. ``target`` None is the mount's own file; ``nowait``: go on in the background.

    ``force``: the mount's own file may be replaced though it is not the one that the mount knows. ``libvirt``: as a
    save image of libvirt.
    """

    target: SeekableAddress | None = None
    nowait: bool = False
    ram_only: bool = False
    force: bool = False
    libvirt: bool = False


@dataclass(frozen=True)
class MigrateIncoming:
    """Fill an empty mount from ``source``."""

    source: SeekableAddress


@dataclass(frozen=True)
class Cancel:
    """End the running save or restore."""


@dataclass(frozen=True)
class MigrateContinue:
    """Go on after a pause before the switchover, which no save makes."""


@dataclass(frozen=True)
class Restore:
    """Bring in everything."""


@dataclass(frozen=True)
class Prefetch:
    """Warm a part: all blocks, one (``name`` is its file name), or bytes of it; ``length`` None is to its end."""

    name: str | None = None
    start: int = 0
    length: int | None = None


@dataclass(frozen=True)
class Record:
    """Keep, beside the checkpoint, which of its pages were read."""


@dataclass(frozen=True)
class LockSteal:
    """Take the lease, whoever has it."""


@dataclass(frozen=True)
class Reset:
    """Drop every written page."""


@dataclass(frozen=True)
class SetCapability:
    """Switch a capability; the name is known to be one."""

    name: str
    state: bool


@dataclass(frozen=True)
class SetParameter:
    """Set a parameter; the name is known to be one, and the value fits it."""

    name: str
    value: ParameterValue


class InfoTopic(Enum):
    """What ``info`` can tell."""

    MIGRATE = "migrate"
    MIGRATE_PARAMETERS = "migrate_parameters"
    MIGRATE_CAPABILITIES = "migrate_capabilities"


@dataclass(frozen=True)
class Info:
    """Report."""

    topic: InfoTopic


@dataclass(frozen=True)
class Stop:
    """Stop the guest, or hold back writers."""


@dataclass(frozen=True)
class Cont:
    """Let the guest, or writers, go on."""


@dataclass(frozen=True)
class Qmp:
    """Bind to the QEMU whose monitor is at ``address``; None lets go of it."""

    address: MonitorAddress | None


class Level(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class LogLevel:
    """Log from ``level`` on."""

    level: Level


@dataclass(frozen=True)
class Help:
    """Explain ``word``, or list all commands."""

    word: str | None = None


Command = (
    Save
    | MigrateIncoming
    | Cancel
    | MigrateContinue
    | Restore
    | Prefetch
    | Record
    | LockSteal
    | Reset
    | SetCapability
    | SetParameter
    | Info
    | Stop
    | Cont
    | Qmp
    | LogLevel
    | Help
)


@dataclass(frozen=True)
class Grammar:
    """One command of the table. ``names``: the first is the command, the others are the same."""

    names: tuple[str, ...]
    usage: str
    meaning: str
    parse: Callable[[str], Command]


def parse_command(text: bytes) -> Command:
    """The command in one write to ctl, with or without a newline at its end.

    Raises CommandError (EINVAL) for whatever is no command, saying what is wrong and what was probably meant.
    """
    line = _line(text)
    name, _, rest = line.partition(" ")
    grammar = COMMANDS.get(name)
    if name in _ONLY_QEMUS:
        raise CommandError(f"{name!r} is a command of QEMU's monitor, not of ctl: {_ONLY_QEMUS[name]}")
    if grammar is None:
        raise CommandError(f"unknown command {name!r}{_did_you_mean(name, COMMANDS)}: 'help' lists all")
    try:
        return grammar.parse(rest.strip())
    except _UsageError:
        raise CommandError(f"usage: {_usage(grammar)}") from None


def help_text(word: str | None = None) -> str:
    """The answer of ``help`` and ``help WORD``, a line for each command."""
    if word is None:
        return "".join(f"{_usage(grammar)}\n" for grammar in GRAMMAR)
    if word not in COMMANDS:
        raise CommandError(f"unknown command {word!r}{_did_you_mean(word, COMMANDS)}: 'help' lists all")
    grammar = COMMANDS[word]
    return f"{_usage(grammar)}\n{grammar.meaning}\n"


def markdown() -> str:
    """The table of commands as docs/ctl.md holds it."""
    rows = "".join(
        f"| {'<br>'.join(f'`{_escaped(usage)}`' for usage in _usages(grammar))} | {grammar.meaning} |\n"
        for grammar in GRAMMAR
    )
    paragraphs = (
        text if text.startswith(" ") else fill(text, 116, break_long_words=False, break_on_hyphens=False)
        for text in ("# ctl", *INTRODUCTION, "This file is made by `ckptfs.namespace.ctl.markdown()`.")
    )
    return "\n\n".join(paragraphs) + f"\n\n| command | meaning |\n|---|---|\n{rows}"


class _UsageError(Exception):
    """The words do not fit the command's pattern."""


def _line(text: bytes) -> str:
    if len(text) > COMMAND_LENGTH_MAX:
        raise CommandError(f"a command is at most {COMMAND_LENGTH_MAX} bytes, not {len(text)}")
    if b"\0" in text:
        raise CommandError("a command can't contain a NUL byte")
    try:
        line = text.decode().strip()
    except UnicodeDecodeError as error:
        raise CommandError(f"a command has to be UTF-8 text: byte {error.start} is not") from None
    if not line:
        raise CommandError("an empty command: 'help' lists all")
    if "\n" in line:
        raise CommandError("one command per write: this has several lines, write them one by one")
    return line.replace("\t", " ")


def _words(rest: str) -> list[str]:
    try:
        return shlex.split(rest)
    except ValueError as error:
        raise CommandError(f"{error} in {rest!r}: quote as in a shell") from None


def _did_you_mean(word: str, words: Iterable[str]) -> str:
    found = likely(word.lower(), words)
    return f" (did you mean {found!r}?)" if found else ""


def _usage(grammar: Grammar) -> str:
    return " or ".join(_usages(grammar))


def _usages(grammar: Grammar) -> list[str]:
    return [f"{name} {grammar.usage}".rstrip() for name in grammar.names]


def _escaped(usage: str) -> str:
    return usage.replace("|", "\\|")


# ---- one parser for each pattern of words ------------------------------------------------------------


def _alone(command: Command) -> Callable[[str], Command]:
    def parse(rest: str) -> Command:
        if rest:
            raise _UsageError
        return command

    return parse


_SAVE_SWITCHES = ("nowait", "ram-only", "force", "libvirt")


def _parse_save(rest: str) -> Command:
    targets, switches = [], set()
    for word in _words(rest):
        if word in _SAVE_SWITCHES:
            switches.add(word)
        else:
            targets.append(_save_target(word))
    if len(targets) > 1:
        raise CommandError("save takes one target: quote a path with spaces, as in a shell")
    target = targets[0] if targets else None
    return Save(
        target, "nowait" in switches, "ram-only" in switches, "force" in switches, libvirt="libvirt" in switches
    )


def _save_target(word: str) -> SeekableAddress:
    """A URI or a path; a path has a slash, so that a misspelt word does not become a file's name."""
    if "/" not in word and ":" not in word:
        hint = _did_you_mean(word, _SAVE_SWITCHES) or f": a file of that name is './{word}'"
        raise CommandError(f"save does not know {word!r}{hint}")
    return seekable_file(parse_target(word))


def _parse_migrate(rest: str) -> Command:
    words = _words_or_json(rest)
    options = [word for word in words if word.startswith("-")]
    uris = [word for word in words if not word.startswith("-")]
    if "-r" in options:
        raise CommandError("Cannot resume if there is no paused migration")
    for option in options:
        if option != "-d":
            raise CommandError(f"migrate: unsupported option {option}")
    if not uris:
        raise _UsageError
    if len(uris) > 1:
        raise CommandError("migrate takes one URI: quote a path with spaces, as in a shell")
    return Save(_address(uris[0]), nowait=bool(options))


def _parse_migrate_incoming(rest: str) -> Command:
    match _words_or_json(rest):
        case [uri]:
            return MigrateIncoming(_address(uri))
    raise _UsageError


def _words_or_json(rest: str) -> list[str]:
    """Words, of which the last may be JSON as it stands: its own quotes are not a shell's."""
    options, brace, json = rest.partition("{")
    if brace and all(word.startswith("-") for word in options.split()):
        return [*options.split(), brace + json]
    return _words(rest)


def _address(word: str) -> SeekableAddress:
    return seekable_file(parse_migrate_json(word) if word.startswith("{") else parse_uri(word))


def _parse_migrate_continue(rest: str) -> Command:
    if rest != "pre-switchover":
        raise _UsageError
    return MigrateContinue()


def _parse_lock(rest: str) -> Command:
    if rest != "steal":
        raise _UsageError
    return LockSteal()


def _parse_prefetch(rest: str) -> Command:
    match _words(rest):
        case []:
            return Prefetch()
        case [name]:
            return Prefetch(name)
        case [name, start, length]:
            return Prefetch(name, parse_size_of("START", start), parse_size_of("LENGTH", length))
    raise _UsageError


def _parse_set_capability(rest: str) -> Command:
    match _words(rest):
        case [name, state]:
            return SetCapability(find_capability(name).name, parse_state(state))
    raise _UsageError


def _parse_set_parameter(rest: str) -> Command:
    match _words(rest):
        case [name, text]:
            return SetParameter(name, find_parameter(name).parse(text, MiB))
    raise _UsageError


def _parse_info(rest: str) -> Command:
    topics = {topic.value: topic for topic in InfoTopic}
    if not rest:
        raise _UsageError
    if rest not in topics:
        raise CommandError(
            f"info does not know {rest!r}{_did_you_mean(rest, topics)}: it knows {', '.join(topics)}"
        )
    return Info(topics[rest])


def _parse_qmp(rest: str) -> Command:
    socket = _one(rest)
    return Qmp(None if socket == "none" else parse_monitor(socket))


def _parse_loglevel(rest: str) -> Command:
    if rest not in list(Level):
        raise _UsageError
    return LogLevel(Level(rest))


def _parse_help(rest: str) -> Command:
    return Help(rest or None)


def _one(rest: str) -> str:
    match _words(rest):
        case [word] if word:
            return word
    raise _UsageError


GRAMMAR = (
    Grammar(
        ("save",),
        "[URI or PATH] [nowait] [ram-only] [force] [libvirt]",
        "Write a checkpoint to the mounted file, or to the given place. The write returns when the checkpoint is"
        " on disk under its final name; with `nowait`, at once (follow it in `status`). `ram-only` leaves out the"
        " device state. The mounted file is replaced only if it is still the one that this mount came from or"
        " last wrote (otherwise ESTALE); `force` replaces it anyway. `libvirt` makes a save image for `virsh"
        " restore`; so does a save over one.",
        _parse_save,
    ),
    Grammar(
        ("migrate",),
        "[-d] URI",
        "The same in QEMU's words. `-d` returns at once. In place of `URI`, JSON with QAPI's `uri` or `channels`"
        " works, too.",
        _parse_migrate,
    ),
    Grammar(
        ("migrate_incoming",),
        "URI",
        "Fill an empty mount (SPEC `none`) from a checkpoint.",
        _parse_migrate_incoming,
    ),
    Grammar(
        ("migrate_cancel", "cancel"),
        "",
        "Cancel the running save, restore or prefetch. Nothing unfinished stays under a final name.",
        _alone(Cancel()),
    ),
    Grammar(
        ("migrate_continue",),
        "pre-switchover",
        "Always refused: a save does not pause before a switchover, because there is none.",
        _parse_migrate_continue,
    ),
    Grammar(
        ("restore",),
        "",
        "Read all of RAM into memory. Afterwards the file is no longer needed.",
        _alone(Restore()),
    ),
    Grammar(
        ("prefetch",),
        "[NAME [START LENGTH]]",
        "Read ahead, into the page cache: everything, the block `ram/NAME`, or `LENGTH` bytes of it from byte"
        " `START` on.",
        _parse_prefetch,
    ),
    Grammar(
        ("record",),
        "",
        "Write down which pages have been read so far, in `FILE.working-set` beside the checkpoint, be it a file or"
        " an object. A later mount with `prefetch=recorded` reads those first.",
        _alone(Record()),
    ),
    Grammar(
        ("reset",),
        "",
        "Drop all written pages: RAM is the checkpoint again. Refused (EBUSY) while a program has a `ram/` file"
        " open for writing.",
        _alone(Reset()),
    ),
    Grammar(
        ("lock",),
        "steal",
        "Take the lease of the mounted checkpoint (`-o exclusive`), whoever has it: for those who know that its"
        " holder does not run any more. It is kept from then on.",
        _parse_lock,
    ),
    Grammar(
        ("migrate_set_capability",),
        "NAME on|off",
        "Switch a capability. Writing to its file in `capabilities/` does the same.",
        _parse_set_capability,
    ),
    Grammar(
        ("migrate_set_parameter",),
        "NAME VALUE",
        "Set a parameter. Writing to its file in `parameters/` does the same, but bandwidths count in MiB here"
        " and in bytes there.",
        _parse_set_parameter,
    ),
    Grammar(
        ("info",),
        "migrate|migrate_parameters|migrate_capabilities",
        "Report as QEMU's monitor does. Read the answer from the same open file.",
        _parse_info,
    ),
    Grammar(
        ("stop",),
        "",
        "Pause the guest behind `qmp=`; without one, hold back programs that write to `ram/`.",
        _alone(Stop()),
    ),
    Grammar(("cont",), "", "Let the guest, or those programs, go on.", _alone(Cont())),
    Grammar(
        ("qmp",),
        "SOCKET|libvirt:NAME|none",
        "Connect to the QEMU that runs on this RAM, by its socket or as a domain of libvirt, or let go of it.",
        _parse_qmp,
    ),
    Grammar(
        ("loglevel",),
        "|".join(Level),
        "Log messages of this level and above.",
        _parse_loglevel,
    ),
    Grammar(
        ("help",),
        "[COMMAND]",
        "List the commands, or explain one.",
        _parse_help,
    ),
)
"""All of ctl, in the order of docs/ctl.md."""

COMMANDS = {name: grammar for grammar in GRAMMAR for name in grammar.names}
"""The table by command name."""

_ALWAYS_LAZY = "pages are always restored as they are read"

_ONLY_QEMUS = {
    "migrate_start_postcopy": _ALWAYS_LAZY,
    "migrate_pause": _ALWAYS_LAZY,
    "migrate_recover": _ALWAYS_LAZY,
    "savevm": "save writes a checkpoint",
    "loadvm": "reset goes back to the checkpoint",
    "quit": "umount ends the mount",
}
"""What else a user of QEMU's monitor might try, and what to know or to do instead."""

INTRODUCTION = (
    "Write one command at a time. The write returns when the command has ended. If the command fails, so does the"
    " write: EINVAL (unknown or malformed command), EBUSY (a migration is running), ECANCELED (after `cancel`),"
    " EPERM (a read-only mount), ESTALE (the mounted file is not the one that this mount knows), or what the"
    " storage said. Read the full answer from the same open file:",
    "    exec 3<>ctl; echo save >&3; cat <&3",
    "A process inside that write can't be interrupted or killed. A program that must not wait there opens ctl"
    " with O_NONBLOCK: the write returns at once, and poll(2) reports POLLIN when the answer can be read, `ok"
    " ...` or `error: ...`. Until then, read and write fail with EAGAIN. The command goes on if the file is"
    " closed. `ckptfs save` works this way.",
    'Separate words with spaces, and quote them as in a shell: `save "/ckpt/my vm"`. Write SIZE, START and LENGTH'
    " as in"
    " QEMU: `4096`, `0x1000`, `4k`, `1.5G`.",
)
"""What there is to know of all commands: paragraphs, of which the indented one is a line for a shell."""
