"""ckptfs save, restore, prefetch, reset, cancel, wait: ctl's commands, which can be interrupted and killed here."""

import argparse
import os
import shlex

from ckptfs.cli.control import perform, wait_until_idle
from ckptfs.cli.progress import Display, Prefetching, display_for, tell
from ckptfs.errors import CommandError


def save(arguments: argparse.Namespace) -> int:
    """Write a checkpoint."""
    words = [target_of(arguments.target)] if arguments.target else []
    words += [word for word in ("ram-only", "force") if getattr(arguments, word.replace("-", "_"))]
    words += ["libvirt"] if arguments.format == "libvirt" else []
    return _run(arguments, "save", *words)


def restore(arguments: argparse.Namespace) -> int:
    """Bring in everything."""
    return _run(arguments, "restore")


def prefetch(arguments: argparse.Namespace) -> int:
    """Warm the kernel's cache."""
    if arguments.start is not None and arguments.length is None:
        raise CommandError("prefetch: how much of it? LENGTH goes with START, as in pc.ram 4k 1M")
    words = [str(word) for word in (arguments.name, arguments.start, arguments.length) if word is not None]
    display = display_for(arguments)
    if len(words) < 2:  # how much of a part is read, status does not tell
        display = Prefetching(display, arguments.name)
    return _run(arguments, "prefetch", *words, display=display)


def reset(arguments: argparse.Namespace) -> int:
    """Drop every written page."""
    return _run(arguments, "reset")


def cancel(arguments: argparse.Namespace) -> int:
    """End what runs."""
    return _run(arguments, "cancel")


def wait(arguments: argparse.Namespace) -> int:
    """Wait until nothing runs."""
    wait_until_idle(arguments.directory, display_for(arguments))
    return 0


def _run(arguments: argparse.Namespace, *words: str, display: Display | None = None) -> int:
    tell(arguments, perform(arguments.directory, shlex.join(words), display or display_for(arguments)))
    return 0


def target_of(text: str) -> str:
    """A target as ctl and migrate take it: a URI, or a path from where we stand, with or without a slash."""
    return text if ":" in text else os.path.abspath(text)
