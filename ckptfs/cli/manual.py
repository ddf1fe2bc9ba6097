"""The manual pages, made from the tables that the programs are made from: mount.ckptfs(8), ckptfs(1), ckptfs(5).

``python -m ckptfs.cli.manual DIRECTORY`` writes them below DIRECTORY, as a man path has them. What is in no table
is written here.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ckptfs import __version__
from ckptfs.cli import ckptfs, mount
from ckptfs.cli.commands import COMMANDS, Argument, Command
from ckptfs.cli.roff import Page
from ckptfs.fuse.daemon import EXIT_INTERRUPTED
from ckptfs.guest.block import PageState
from ckptfs.migration.capabilities import CAPABILITIES, Capability, format_state
from ckptfs.migration.parameters import PARAMETERS, Parameter
from ckptfs.namespace.ctl import GRAMMAR, INTRODUCTION
from ckptfs.namespace.events import EVENTS
from ckptfs.namespace.options import OPTIONS
from ckptfs.namespace.status import BLOCK_KEYS, KEYS, MIGRATION_KEYS
from ckptfs.namespace.tree import FILES, XATTR_PREFIX, XATTRS
from ckptfs.physical.look import MAKERS

PAGE_STATES = {
    PageState.ZERO: "Zeros, which are stored nowhere.",
    PageState.IN_CHECKPOINT: "In the checkpoint, and not read yet.",
    PageState.READ: "Read from the checkpoint.",
    PageState.WRITTEN: "Written since.",
}

MOUNT_EXITS = (
    (0, "It is mounted, and the mount answers."),
    (mount.EXIT_USAGE, "Wrong usage, or no permission."),
    (mount.EXIT_SYSTEM, "A system error."),
    (EXIT_INTERRUPTED, "Interrupted while it waited: nothing is mounted, now or later."),
    (mount.EXIT_MOUNT, "It can't be mounted. One line on the standard error says why."),
)

EXITS = (
    (0, "Done."),
    (
        ckptfs.EXIT_FAILED,
        "What you asked for failed or was cancelled, or what was examined is not sound. Standard error says why.",
    ),
    (ckptfs.EXIT_USAGE, "Wrong usage."),
)


def mount_page() -> Page:
    """mount.ckptfs(8)."""
    page = _page("mount.ckptfs", 8, "mount the memory of a virtual machine")
    page.section("SYNOPSIS")
    page.text(
        "`mount.ckptfs` SPEC DIR [`-sfnv`] [`-N` NAMESPACE] [`-o` OPT[,OPT...]] [`-t` TYPE]",
        "`mount -t ckptfs` SPEC DIR [`-o` OPT[,OPT...]]",
    )
    page.section("DESCRIPTION")
    page.text(
        "Mounts a guest's RAM on the directory DIR; ckptfs(5) describes the files there. SPEC is the storage"
        " behind it, as a device is the storage behind a file system:"
    )
    page.item(
        "PATH or `file:`PATH[`,offset=`SIZE]",
        "A checkpoint: a file in QEMU's mapped-ram migration format. Its RAM is restored lazily: a page is read"
        " when somebody touches it. `save` replaces the file once the new checkpoint is complete.",
        "If there is no such file, `-o ram=` makes a new guest whose RAM is zeros, and `-o qmp=` is for a running"
        " machine that has its own RAM. The first `save` creates the file. Without either option the mount is"
        " refused.",
    )
    page.item(
        "`s3://`BUCKET/KEY, `gs://`BUCKET/KEY, `az://`CONTAINER/KEY, `https://`HOST/PATH",
        "A checkpoint in an object store, or on a web server, which can only be read. The mount keeps to the"
        " version that it finds. Keys come from the environment (AWS_ACCESS_KEY_ID ...) and from AWS profiles."
        " Needs the Python packages of `ckptfs[remote]`.",
    )
    page.item(
        "`none`",
        "No storage. `save` needs a target, and `migrate_incoming` fills the mount, as with QEMU's `-incoming"
        " defer`.",
    )
    page.text(
        "`umount` DIR ends the daemon and drops what was not saved. `ckptfs umount` says how much that is, and"
        " saves first if you add `--save`. If the daemon dies, the mount point stays dead (ENOTCONN) until it is"
        " unmounted; it never turns into an empty directory. You need not be root: fusermount3 mounts for other"
        " users."
    )
    page.section("OPTIONS")
    _arguments(page, _actions(mount.parser()))
    page.section("MOUNT OPTIONS")
    page.text(
        "In names, `_` and `-` are the same. Write `\\,` for a comma in a value. If an option is given twice, the"
        " last one counts, unless the option can be repeated."
    )
    for option in OPTIONS:
        page.item(f"`{option.name}`" + (f"`=`{option.value}" if option.value else ""), option.meaning)
    page.subsection("Migration parameters and capabilities")
    page.text(
        "These are mount options, too, as in `multifd_channels=8`, `max_bandwidth=100M` or `direct_io=off`."
        " ckptfs(5) explains them. Bandwidths are in bytes per second."
    )
    page.item("`" + "=`VALUE, `".join(_option_names(PARAMETERS)) + "=`VALUE", "The first value of the parameter.")
    page.item(
        "`" + "=`on|off, `".join(_option_names(CAPABILITIES)) + "=`on|off", "The first state of the capability."
    )
    page.subsection("Options of mount(8)")
    page.text(
        "`_netdev`, `nofail`, `noauto`, `user`, `x-systemd.automount` and their like are accepted and ignored."
    )
    page.section("SIGNALS")
    page.item("SIGTERM, SIGINT", "End the mount and its daemon. A running save is cancelled.")
    page.item("SIGHUP", "Reopen the log (for logrotate).")
    _exits(page, MOUNT_EXITS)
    page.section("FILES")
    page.item("`/sbin/mount.ckptfs`, `/sbin/mount.fuse.ckptfs`", "The helper that mount(8) runs.")
    page.item(
        "`/sbin/umount.fuse.ckptfs`",
        "The helper that umount(8) runs: it returns when the daemon has ended and the storage is free.",
    )
    page.section("EXAMPLES")
    page.text("A new guest of 1 GiB, and a line for /etc/fstab that mounts a checkpoint at boot:")
    page.example(
        "mount.ckptfs /ckpt/vm1 /mnt/vm1 -o ram=pc.ram:1G,qmp=/run/vm1.qmp\n"
        "/ckpt/vm2  /mnt/vm2  ckptfs  nofail  0 0"
    )
    _see_also(page, "ckptfs(1)", "ckptfs(5)", "mount(8)", "umount(8)", "fstab(5)", "fusermount3(1)")
    return page


def commands_page() -> Page:
    """ckptfs(1)."""
    page = _page("ckptfs", 1, "save, restore and examine virtual machines' memory")
    page.section("SYNOPSIS")
    page.text("`ckptfs` COMMAND [ARGUMENT...]", "`ckptfs --version`", "`ckptfs` COMMAND `--help`")
    page.section("DESCRIPTION")
    page.text(
        "Saves, restores and examines the memory of virtual machines. For a guest that is mounted"
        " (mount.ckptfs(8)), it does whatever you can write to the mount's `ctl` (ckptfs(5)), with progress on a"
        " terminal. Other commands work on a checkpoint file or a running QEMU, without a mount. You can"
        " interrupt or kill a command at any time.",
    )
    page.section("COMMANDS")
    for command in COMMANDS:
        page.subsection(command.name)
        page.text(_usage(command), command.description)
        _arguments(page, command.arguments)
    page.section("OUTPUT")
    page.text(
        "The answer goes to standard output, progress and errors go to standard error: a bar if that is a terminal,"
        " otherwise a line for every tenth. With `--json`, progress and answer are JSON objects on standard"
        " output, one per line. With `--quiet`, only errors are printed.",
    )
    page.section("SIGNALS")
    page.item(
        "SIGINT (Ctrl-C), SIGTERM",
        "`save`, `restore`, `prefetch` and `umount --save` cancel what they have started, and wait until it has"
        " ended. The guest runs on, the former checkpoint is intact, and nothing is left of the new one. The exit"
        " code is 1. A second signal ends the waiting. All other commands simply end.",
    )
    page.item(
        "SIGKILL, SIGHUP",
        "The command ends. What it started on a mount goes on, and `ckptfs wait` waits for it. `save --qmp` has"
        " no mount: SIGHUP cancels it, and SIGKILL leaves at most a temporary file, which the next save to the"
        " same place removes.",
    )
    _exits(page, EXITS)
    page.section("EXAMPLES")
    page.text("Save a running machine, wherever its memory is, and run three clones of it:")
    page.example("ckptfs save --qmp /run/vm1.qmp /ckpt/vm1\nckptfs run --count 3 /ckpt/vm1")
    page.text("Save a mount, look at the checkpoint, unmount:")
    page.example("ckptfs save /mnt/vm1\nckptfs info /ckpt/vm1\nckptfs umount /mnt/vm1")
    _see_also(page, "mount.ckptfs(8)", "ckptfs(5)", "qemu-system-x86_64(1)")
    return page


def tree_page() -> Page:
    """ckptfs(5)."""
    page = _page("ckptfs", 5, "the files of a mounted virtual machine's memory")
    page.section("DESCRIPTION")
    page.text(
        "These files are below DIR once mount.ckptfs(8) has mounted a guest there. NAME is QEMU's name of a RAM"
        " block, with `/`, `%` and a leading `.` percent-encoded (`%2From@etc%2Facpi%2Ftables`). RAM is full of"
        " secrets, so the files belong to whoever mounted them, and nobody else can read them, unless mount"
        " options say otherwise."
    )
    for path, access, meaning in FILES:
        page.item(f"`{path}` ({access})", meaning)
    page.section("CTL")
    page.text(*INTRODUCTION)
    for grammar in GRAMMAR:
        usages = (f"`{name}` {grammar.usage}".rstrip() for name in grammar.names)
        page.item(", ".join(usages), grammar.meaning)
    page.section("STATUS")
    page.text(
        "All keys are always present, in this order. A value that is unknown or does not exist is `none`. In"
        " `status.json`, `none` is null, and `yes` and `no` are true and false."
    )
    for key in KEYS:
        _key(page, key.name, key.unit, key.meaning)
    page.subsection("The newest save or restore")
    page.text("`status.json` has QEMU's answer of query-migrate instead, under `migration`.")
    for key in MIGRATION_KEYS:
        _key(page, key.name, key.unit, key.meaning)
    page.subsection("In status.json alone")
    page.item("`base-devices`", "The device sections in the checkpoint.")
    page.item("`bad-pages`", "The pages that can't be read: `block`, `page` and `error` of each.")
    page.item("`blocks`", "Each RAM block:")
    for block_key in BLOCK_KEYS:
        _key(page, block_key.name, block_key.unit, block_key.meaning)
    page.section("EVENTS")
    page.text(
        "Each line is an event in QMP's form: `timestamp`, `event` and `data`. A read never waits; it returns"
        " what has happened since the last one. To follow a mount from a shell:",
        "    tail -n +1 -f DIR/events",
    )
    for event in EVENTS:
        page.item(f"`{event.name}` (data: `{event.member}`)", event.meaning)
    page.section("PARAMETERS")
    page.text(
        "QEMU's migration parameters, under QEMU's names. You can set those without effect, too, so that scripts"
        " for QEMU work."
    )
    for parameter in PARAMETERS.values():
        page.item(f"`{parameter.name}` {_default(parameter)}", _meaning(parameter))
    page.section("CAPABILITIES")
    page.text("QEMU's migration capabilities, under QEMU's names.")
    for capability in CAPABILITIES.values():
        page.item(f"`{capability.name}` (default: {format_state(capability.default)})", _meaning(capability))
    page.section("PAGES")
    page.text("Each byte of `pages/NAME` is the state of one page:")
    for state, meaning in PAGE_STATES.items():
        page.item(f"`{state.value}`", meaning)
    page.section("VIEWS")
    page.text("Views show the checkpoint. Once RAM has been written, reading memory in them fails with EPERM.")
    for name, make in MAKERS.items():
        page.item(f"`{name}`", " ".join((make.__doc__ or "").split("\n\n")[0].split()))
    page.section("EXTENDED ATTRIBUTES")
    page.text("Of `ram/NAME` and `pages/NAME`:")
    for attribute in XATTRS:
        _key(page, f"{XATTR_PREFIX.decode()}{attribute.name}", attribute.unit, attribute.meaning)
    page.section("EXAMPLES")
    page.example(
        "echo save >DIR/ctl; cat DIR/ctl\n"
        "grep pages DIR/status\n"
        "getfattr -d -m ckptfs DIR/ram/*\n"
        "echo 100M >DIR/parameters/max-bandwidth"
    )
    _see_also(page, "mount.ckptfs(8)", "ckptfs(1)")
    return page


PAGES = {"man8/mount.ckptfs.8": mount_page, "man1/ckptfs.1": commands_page, "man5/ckptfs.5": tree_page}
"""All pages by their place in a man path."""


def main(directory: str) -> None:
    """Write all pages below ``directory``."""
    for place, make in PAGES.items():
        path = Path(directory, place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(make()))


def _page(name: str, section: int, summary: str) -> Page:
    built = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    return Page(name, section, summary, version=__version__, date=time.strftime("%Y-%m-%d", built))


def _actions(parser: argparse.ArgumentParser) -> list[Argument]:
    """A parser's arguments as our table of commands has them."""
    return [
        Argument(tuple(action.option_strings) or (action.dest,), {"metavar": action.metavar, "help": action.help})
        for action in parser._actions
    ]


def _arguments(page: Page, arguments: Sequence[Argument]) -> None:
    for argument in arguments:
        value = _value(argument)
        if argument.names[0].startswith("-"):
            term = ", ".join(f"`{name}`" for name in argument.names) + (f" {value}" if value else "")
        else:
            term = value
        help_text = argument.settings.get("help") or ""
        page.item(term, f"{help_text[:1].upper()}{help_text[1:]}.")


def _value(argument: Argument) -> str:
    """What an argument takes."""
    choices = argument.settings.get("choices")
    return argument.settings.get("metavar") or ("|".join(choices) if choices else "")


def _usage(command: Command) -> str:
    """How a command is written, as its help has it."""
    parser = argparse.ArgumentParser(
        prog=f"`ckptfs {command.name}`",
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=1000),
    )
    for argument in command.arguments:
        parser.add_argument(*argument.names, **argument.settings)
    return parser.format_usage().removeprefix("usage: ").rstrip("\n")


def _option_names(names: Sequence[str] | dict[str, Parameter] | dict[str, Capability]) -> list[str]:
    return [name.replace("-", "_") for name in names]


def _key(page: Page, name: str, unit: str, meaning: str) -> None:
    page.item(f"`{name}`" + (f" ({unit})" if unit else ""), meaning)


def _default(parameter: Parameter) -> str:
    default = parameter.format(parameter.default) or "none"
    return f"(default: {default}{' ' + parameter.unit if parameter.unit else ''})"


def _meaning(setting: Parameter | Capability) -> str:
    if isinstance(setting, Capability) and setting.unsupported:
        return f"Can't be switched on: {setting.unsupported}."
    return setting.meaning or f"Without effect: {setting.no_effect}."


def _exits(page: Page, codes: Sequence[tuple[int, str]]) -> None:
    page.section("EXIT STATUS")
    for code, meaning in codes:
        page.item(f"`{code}`", meaning)


def _see_also(page: Page, *pages: str) -> None:
    page.section("SEE ALSO")
    page.text(", ".join(pages))


if __name__ == "__main__":
    main(sys.argv[1])
