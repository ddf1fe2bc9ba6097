"""What a benchmark prints: a figure of ckptfs beside the figure of something known, measured in the same run."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

Samples = list[float]

_LAYOUT = "| {:<69} | {:>5} | {:>24} | {:>24} | {:>7} | {:>8} | {:<51} |"


@dataclass(frozen=True)
class Row:
    """Samples of one thing, in `unit`; `reference` are those of `against`, taken in turn with ours, or empty.

    `goal` is what the ratio is to be, or the figure itself if there is no reference: ">= 0.9". A ratio that misses
    it is marked.
    """

    what: str
    unit: str
    ckptfs: Samples
    reference: Samples
    against: str
    goal: str = ""
    at: int = 0
    """Bytes of RAM, of a point in the plot."""

    @property
    def ratio(self) -> float | None:
        """Of the medians, if there is a reference."""
        return median(self.ckptfs) / median(self.reference) if self.reference else None

    @property
    def missed(self) -> bool:
        """Whether there is a goal that was not reached."""
        if not self.goal:
            return False
        sign, limit = self.goal.split()
        value = median(self.ckptfs) if self.ratio is None else self.ratio
        return value < float(limit) if sign == ">=" else value > float(limit)

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        figures = (_figure(samples) for samples in (self.ckptfs, self.reference))
        what = f"{self.what}, {self.at / GiB:g} GiB" if self.at else self.what
        return _LAYOUT.format(what, self.unit, *figures, ratio + "!" * self.missed, self.goal, self.against)


def heading() -> str:
    """The first two lines of the table."""
    titles = _LAYOUT.format(
        "what", "unit", "ckptfs (min to max)", "reference (min to max)", "ratio", "goal", "the reference is"
    )
    return titles + "\n" + "|".join("-" * len(cell) for cell in titles.split("|"))


def in_turn(rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[Samples, Samples]:
    """Measure A B A B ..., so that whatever else the machine does hits both; return each one's samples."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return [mine for mine, _ in pairs], [other for _, other in pairs]


def _figure(samples: Samples) -> str:
    if not samples:
        return ""
    return f"{_round(median(samples))} ({_round(min(samples))} to {_round(max(samples))})"


def _round(value: float) -> str:
    """Three digits say all that such a measurement knows."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
