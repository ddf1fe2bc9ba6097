"""What people see on a terminal while something runs. rich draws it; importing that takes a tenth of a second."""

from collections.abc import Callable
from typing import Self

from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ckptfs.api.status import Status
from ckptfs.cli.progress import MiB, extent


class Terminal(Console):
    """Never hides the cursor, as nobody shows it again after SIGKILL, or after Ctrl-C in `ckptfs wait`.

    Lines end where the ``^C`` that a terminal echoes has room: a bar that it breaks can't be wiped.
    """

    @property  # type: ignore[misc] # nobody sets it
    def size(self) -> ConsoleDimensions:
        width, height = super().size
        return ConsoleDimensions(max(width - len("^C "), 1), height)

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _Percent(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.percentage:3.0f}%")


class _Done(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f} MiB")


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.0f} MiB/s")


class Bar:
    """A bar with the state, what is done, the speed, and the time left."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            _Percent(),
            _Done(),
            _Speed(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Terminal(stderr=True), transient=True, expand=True)
        self._task = self._progress.add_task("", total=None, visible=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, words: str) -> None:
        """Say a line above the bar."""
        self._progress.console.print(words, markup=False, highlight=False)

    def show(self, status: Status) -> None:
        """Move the bar."""
        if status["state"] == "idle":
            return
        done, total = extent(status) or (0, None)
        description = f"{status['state']} ({status['migration']['status']})"
        self._progress.update(
            self._task,
            description=description,
            completed=done / MiB,
            total=None if total is None else total / MiB,
            visible=True,
        )


class Screen:
    """Shows a text over the former one."""

    def __init__(self) -> None:
        self._live = Live(console=Terminal(), auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def __enter__(self) -> Callable[[str], None]:
        self._live.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _show(self, text: str) -> None:
        self._live.update(Text(text, overflow="fold"), refresh=True)
