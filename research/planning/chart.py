"""A plan as a figure: speed and waiting times against the arrival rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from research import figures
from research.figures import BLUE, RED
from research.planning.plan import PlanPoint
from research.planning.simulation import quantiles


def save(points: Sequence[PlanPoint], path: Path) -> None:
    """Draw points of one number of machines at several rates. Raises ConfigError for a file that is no figure."""
    figures.require(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    with rc_context(figures.STYLE):
        figure = Figure(figsize=(11.0, 3.6), layout="constrained")
        speed, wait = figure.subplots(1, 2)
        rates = [point.rate or 0.0 for point in points]
        speed.plot(rates, [point.seen.tokens_per_second for point in points], color=BLUE, marker="o")
        speed.set_ylim(bottom=0)
        speed.set_ylabel("tokens/s")
        looks = (("first", 0.5, "-"), ("first", 0.95, "--"), ("whole", 0.5, "-"), ("whole", 0.95, "--"))
        for what, share, line in looks:
            values = [quantiles(getattr(point.seen, what), [share])[0] for point in points]
            word = "first token" if what == "first" else "whole completion"
            color = BLUE if what == "first" else RED
            wait.plot(rates, values, color=color, linestyle=line, marker="o", label=f"{word}, {share:.0%} within")
        wait.set_ylabel("seconds")
        wait.set_yscale("log")
        wait.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        wait.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        wait.minorticks_off()
        wait.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        for axes in (speed, wait):
            axes.set_xlabel("requests per second")
        machines = ", ".join(f"{name} × {count}" for name, count in points[0].replicas.items())
        figure.suptitle(f"Predicted: {machines}", fontsize=10)
        figures.save(figure, path)
