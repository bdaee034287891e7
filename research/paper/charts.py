"""Findings as figures: pure functions, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research import figures
from research.figures import BLUE, CONVENTIONAL, MIXTURE, ORANGE, SKY
from research.paper.findings import AccuracyFinding, Findings, SpeedFinding
from research.paper.tables import task_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_LINES = {"mixture": ("ME", MIXTURE, BLUE), "conventional": ("CE", CONVENTIONAL, ORANGE)}
_BARS = (
    ("single", "#DDDDDD", ""),
    ("CE (sequential)", ORANGE, "//"),
    ("CE (parallel)", SKY, ".."),
    ("ME", BLUE, ""),
)


def save(findings: Findings, folder: Path) -> list[Path]:
    """Write the figure as PNG and SVG, and return their paths."""
    figures.require()
    from matplotlib import rc_context

    paths = [folder / f"{findings.experiment}.{form}" for form in ("png", "svg")]
    with rc_context(figures.STYLE):
        figures.save(draw(findings), *paths)
    return paths


def draw(findings: Findings) -> Figure:
    """Return the figure of an experiment: bars for speeds, lines against λ for the others."""
    if findings.experiment == "figure3":
        return _bars(findings)
    return _lines(findings, with_speed=findings.experiment == "figure2")


def _lines(findings: Findings, *, with_speed: bool) -> Figure:
    """Return one column of panels an ensemble and task; under each of figure 2, the speed."""
    pairs = list(dict.fromkeys((accuracy.ensemble, accuracy.score.task) for accuracy in findings.accuracies))
    rows = 2 if with_speed else 1
    figure, axes = _panels(rows, len(pairs), findings)
    for i, (label, task) in enumerate(pairs):
        top = axes[0][i]
        mine = [
            accuracy for accuracy in findings.accuracies if (accuracy.ensemble, accuracy.score.task) == (label, task)
        ]
        for method in dict.fromkeys(finding.score.method for finding in mine):
            _curve(top, method, [finding for finding in mine if finding.score.method == method])
        top.set_title(f"{label}\n{task_name(task)}, {mine[0].score.count} questions, k = {mine[0].top_k}")
        top.set_ylabel("accuracy, %")
        if not _banded(mine):
            top.set_ylim(0, 102)  # without bands, a close view would make much of chance
        last = axes[rows - 1][i]
        last.set_xlabel(f"λ: weight of {label.partition(' + ')[0]}")
        last.set_xlim(-0.03, 1.03)
        if with_speed:
            _speed_panel(last, [speed for speed in findings.speeds if speed.ensemble == label])
        elif len({finding.score.method for finding in mine}) > 1:
            top.legend()
    return figure


def _curve(axes: Axes, method: str, scores: Sequence[AccuracyFinding]) -> None:
    name, style, shade = _LINES[method]
    look: dict[str, Any] = dict(style)
    xs = [score.weights[0] for score in scores]
    axes.plot(xs, [100 * score.score.mean for score in scores], label=name, **look)
    bands = [score.score.interval for score in scores]
    if _banded(scores):
        low = [100 * max(band[0], 0) for band in bands if band is not None]
        high = [100 * min(band[1], 1) for band in bands if band is not None]
        axes.fill_between(xs, low, high, color=shade, alpha=0.22, linewidth=0)


def _banded(scores: Sequence[AccuracyFinding]) -> bool:
    """Whether there are enough seeds for an interval that says something: of two runs, it is wider than any range."""
    return all(score.score.interval is not None and len(score.score.values) > 2 for score in scores)


def _speed_panel(axes: Axes, speeds: Sequence[SpeedFinding]) -> None:
    name, style, _ = _LINES["mixture"]
    look: dict[str, Any] = dict(style)
    xs = [speed.weights[0] for speed in speeds]
    axes.plot(xs, [speed.mixture for speed in speeds], label=name, **look)
    for number, member in enumerate(speeds[0].single):
        alone = sorted(speed.single[member] for speed in speeds)
        axes.axhline(
            alone[len(alone) // 2],
            color="#555555",
            linewidth=1,
            linestyle=(":", "-.")[number % 2],
            label=f"{member} alone",
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens/s")
    axes.legend()


def _bars(findings: Findings) -> Figure:
    """Return one panel a machine, one group of bars an ensemble."""
    from matplotlib.patches import Patch

    machines = list(dict.fromkeys(speed.machine for speed in findings.speeds))
    groups = [[speed for speed in findings.speeds if speed.machine == machine] for machine in machines]
    figure, axes = _panels(1, len(machines), findings, widths=[max(len(group), 2) for group in groups])
    for panel, machine, speeds in zip(axes[0], machines, groups, strict=True):
        for number, (_, colour, hatch) in enumerate(_BARS):
            values = [(speed.alone, speed.sequential, speed.parallel, speed.mixture)[number] for speed in speeds]
            places = [place + (number - 1.5) * 0.2 for place in range(len(speeds))]
            there = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
            look = {"color": colour, "edgecolor": "#333333", "linewidth": 0.6, "hatch": hatch}
            bars = panel.bar([x for x, _ in there], [value for _, value in there], width=0.18, **look)
            panel.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
            for x, value in zip(places, values, strict=True):
                if value is None:
                    panel.text(x, 0, " not measured", rotation=90, ha="center", va="bottom", fontsize=7)
        panel.set_xticks(range(len(speeds)), [speed.ensemble.replace(" + ", "\n+ ") for speed in speeds])
        spare = max(2 - len(speeds), 0) / 2
        panel.set_xlim(-0.6 - spare, len(speeds) - 0.4 + spare)
        panel.grid(axis="x", visible=False)
        panel.set_title(machine)
        panel.set_ylabel("tokens/s")
        panel.margins(y=0.1)
    handles = [Patch(facecolor=colour, edgecolor="#333333", hatch=hatch, label=name) for name, colour, hatch in _BARS]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def _panels(
    rows: int, columns: int, findings: Findings, widths: Sequence[int] | None = None
) -> tuple[Figure, NDArray[Any]]:
    from matplotlib.figure import Figure

    across = 4.6 * columns if widths is None else 1.6 * sum(widths) + 0.8 * columns + 1.4
    figure = Figure(figsize=(max(across, 5.2), 0.9 + 2.8 * rows), layout="constrained")
    axes: NDArray[Any] = figure.subplots(
        rows, columns, squeeze=False, sharex="col" if rows > 1 else False, width_ratios=widths
    )
    notes = [findings.reduced] if findings.reduced else []
    if findings.accuracies:
        enough = _banded(findings.accuracies)
        notes.append("bands: 95 % intervals over seeds" if enough else "too few seeds for bands")
    if findings.experiment == "figure2":
        notes.append(f"speed on {', '.join(dict.fromkeys(speed.machine for speed in findings.speeds))}")
    figure.suptitle(findings.title)
    figure.supxlabel(" · ".join(notes), fontsize=7.5, color="#444444")
    return figure, axes
