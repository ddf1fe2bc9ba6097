"""ckptfs map: memory as a picture, on the terminal or in a file."""

import argparse
import signal
import time
from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from ckptfs.api.memory import Memory, MountedMemory, open_memory
from ckptfs.api.picture import COLOURS, WORDS, Picture, Row, draw, parts_of
from ckptfs.cli.status import INTERVAL
from ckptfs.cli.terminal import Terminal
from ckptfs.errors import CommandError, StateError
from ckptfs.migration.size import format_size
from ckptfs.namespace.status import counted, printable

_LABEL = 14
"""Columns before the cells: an address."""

_OTHER_LINES = 4
_LETTERS = ".#rW=X "
"""Of each `Kind`, where there are no colours."""

_HEIGHT_ELSEWHERE = 48
_FILE_COLUMNS, _FILE_ROWS = 256, 512
"""Cells of a picture in a file, at the most."""


def run(arguments: argparse.Namespace) -> int:
    """Show or write a picture of one memory, or of the difference of two."""
    if arguments.output is not None and not arguments.output.endswith((".png", ".svg")):
        raise CommandError(f"{arguments.output}: name it .png or .svg")
    if arguments.watch and (arguments.b is not None or arguments.output is not None):
        raise CommandError("--watch: of one mount, on the terminal")
    if arguments.watch:
        return _watch(arguments.a, arguments.map)
    with open_memory(arguments.a, arguments.map) as a:
        if arguments.b is None:
            return _show(a, None, arguments.output)
        with open_memory(arguments.b, arguments.map) as b:
            return _show(a, b, arguments.output)


def _show(a: Memory, b: Memory | None, output: str | None) -> int:
    if output is None:
        console = Terminal()
        console.print(_fitting(console, a, b))
        return 0
    from ckptfs.channels.output import write_file
    from ckptfs.cli.picture_files import png, svg

    picture = draw(_title(a, b), parts_of(a, b), _FILE_COLUMNS, _FILE_ROWS)
    write_file(output, (png if output.endswith(".png") else svg)(picture))
    return 0


def _watch(directory: str, named: Sequence[str]) -> int:
    """Draw it again and again; it is opened each time, as an open file would keep it from being unmounted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console = Terminal()
    try:
        with Live(console=console, screen=False, auto_refresh=False) as live:
            while True:
                try:
                    with open_memory(directory, named) as memory:
                        if not isinstance(memory, MountedMemory):
                            raise CommandError(f"{directory}: --watch is for a mount")
                        live.update(_fitting(console, memory, None), refresh=True)
                except StateError as error:
                    if isinstance(error.__context__, FileNotFoundError):
                        return 0  # it was unmounted
                    raise
                time.sleep(INTERVAL)
    except KeyboardInterrupt:  # as it is meant to end
        return 0


def _title(a: Memory, b: Memory | None) -> str:
    return printable(a.path if b is None else f"{a.path} and {b.path}")


def _fitting(console: Console, a: Memory, b: Memory | None) -> Group:
    """The picture in the window; elsewhere as if that were a usual one."""
    width, height = console.size
    lines = (height if console.is_terminal else _HEIGHT_ELSEWHERE) - _OTHER_LINES
    parts, columns = parts_of(a, b), max(width - _LABEL, 8)
    lines = max(lines - len(parts), 1)
    if console.color_system is None:
        picture = draw(_title(a, b), parts, columns, lines)
        return Group(Text(picture.title), *map(_letters, picture.rows), Text(), legend(picture, letters=True))
    picture = draw(_title(a, b), parts, columns, 2 * lines)
    return Group(Text(picture.title), *_lines(picture), Text(), legend(picture))


def _letters(row: Row) -> Text:
    """A row without colours: a letter for each cell."""
    text = f"{row.address:#{_LABEL - 1}x} {''.join(_LETTERS[kind] for kind in row.kinds.tolist())}"
    return Text(text if row.name is None else f"{printable(row.name)}\n{text}", no_wrap=True, overflow="crop")


def _lines(picture: Picture) -> Iterator[Text]:
    """Two rows of cells in one line: half blocks have two colours."""
    rows = list(picture.rows)
    while rows:
        upper = rows.pop(0)
        if upper.name is not None:
            yield Text(printable(upper.name))
        lower = rows.pop(0) if rows and rows[0].name is None else None
        yield _line(upper, lower)


def _line(upper: Row, lower: Row | None) -> Text:
    line = Text(f"{upper.address:#{_LABEL - 1}x} ", no_wrap=True, overflow="crop")
    below = [] if lower is None else lower.colours.tolist()
    for index, above in enumerate(upper.colours.tolist()):
        background = f" on rgb({','.join(map(str, below[index]))})" if index < len(below) else ""
        line.append("▀", Style.parse(f"rgb({','.join(map(str, above))}){background}"))
    return line


def legend(picture: Picture, *, letters: bool = False) -> Text:
    """What the colours are, how many pages there are of each, and what a cell stands for."""
    text = Text()
    for kind, count in picture.kinds.items():
        mark = _LETTERS[kind] if letters else "■"
        text.append(f"{mark} ", Style.parse(f"rgb({','.join(map(str, COLOURS[kind]))})"))
        text.append(f"{WORDS[kind]} {count}   ")
    text.append(f"{counted(sum(picture.kinds.values()), 'page')}; a cell is {format_size(picture.cell_length)}")
    return text
