"""What a benchmark prints: a figure of ckptfs beside the figure of something known, measured in the same run."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

MiB = 1 << 20
GiB = 1 << 30

Samples = list[float]

_LAYOUT = "| {:<69} | {:>5} | {:>24} | {:>24} | {:>6} | {:<51} |"


@dataclass(frozen=True)
class Row:
    """Samples of one thing, in `unit`; `reference` are those of `against`, taken in turn with ours, or empty."""

    what: str
    unit: str
    ckptfs: Samples
    reference: Samples
    against: str

    def __str__(self) -> str:
        ratio = f"{median(self.ckptfs) / median(self.reference):.3g}" if self.reference else ""
        figures = (_figure(samples) for samples in (self.ckptfs, self.reference))
        return _LAYOUT.format(self.what, self.unit, *figures, ratio, self.against)


def heading() -> str:
    """The first two lines of the table."""
    titles = _LAYOUT.format(
        "what", "unit", "ckptfs (min to max)", "reference (min to max)", "ratio", "the reference is"
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
