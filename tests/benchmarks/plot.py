"""The picture of docs/benchmarks.md: pause, time to tick, save time and memory by the size of RAM."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.benchmarks.rows import GiB, Row


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw what has a size of RAM: seconds by powers on the left, MiB from 0 on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.at:
            points.setdefault((row.what.removeprefix("by size: "), row.unit), []).append(
                (row.at / GiB, median(row.ckptfs))
            )
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for (what, unit), line in points.items():
        axes[int(unit == "MiB")].plot(*zip(*sorted(line), strict=True), marker="o", label=what)
    axes[0].set(yscale="log", ylabel="seconds")
    axes[1].set(ylim=(0, None), ylabel="MiB")
    for axis in axes:
        axis.set(xscale="log", xlabel="RAM in GiB")
        axis.set_xticks([0.25, 1, 4, 16, 64, 256, 1024], ["0.25", "1", "4", "16", "64", "256", "1024"])
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.3)
        axis.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
