"""A plan as a figure: speed and waiting times against the arrival rate. Needs matplotlib (the extra `paper`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlm.figures import STYLE, require
from mixlm.planning.plan import Point
from mixlm.planning.simulation import quantiles


def save(points: Sequence[Point], path: Path) -> None:
    """Draw points of one number of machines at several rates. Raises ConfigError for a file that is no figure."""
    require(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        speed, wait = figure.subplots(1, 2)
        rates = [point.rate or 0.0 for point in points]
        speed.plot(rates, [point.seen.tokens_per_second for point in points], color="#0072B2", marker="o")
        speed.set_ylabel("tokens/s")
        looks = (("first", 0.5, "-"), ("first", 0.95, "--"), ("whole", 0.5, "-"), ("whole", 0.95, "--"))
        for what, share, line in looks:
            values = [quantiles(getattr(point.seen, what), [share])[0] for point in points]
            word = "first token" if what == "first" else "whole reply"
            color = "#0072B2" if what == "first" else "#D55E00"
            wait.plot(rates, values, color=color, linestyle=line, marker="o", label=f"{word}, {share:.0%} within")
        wait.set_ylabel("seconds")
        wait.set_yscale("log")
        wait.legend()
        for axes in (speed, wait):
            axes.set_xlabel("replies that come in a second")
        machines = ", ".join(f"{name} × {count}" for name, count in points[0].replicas.items())
        figure.suptitle(f"Predicted: {machines}", fontsize=10)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, bbox_inches="tight", metadata=metadata)
