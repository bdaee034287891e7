"""Reports as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research import figures
from research.figures import BLUE, CONVENTIONAL, GREEN, MIXTURE, ORANGE, PINK, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOKS: Mapping[str, Mapping[str, Any]] = {
    "mixture": MIXTURE,
    "conventional": CONVENTIONAL,
    "speculative": {"color": GREEN, "linestyle": "-", "marker": "^"},
    "auto": {"color": SKY, "linestyle": "-.", "marker": "v"},
    "greedy": {"color": ORANGE, "linestyle": "--", "marker": "P"},
    "drafted": {"color": PINK, "linestyle": "-", "marker": "X"},
}
_SINGLES = (
    {"color": "#555555", "linestyle": ":", "marker": "D"},
    {"color": "#999999", "linestyle": "-.", "marker": "d", "markerfacecolor": "white"},
    {"color": "#333333", "linestyle": (0, (1, 3)), "marker": "<"},
)
_TITLES = {
    "batch": "Speed against completions at once",
    "context": "Speed against the length of the prompt",
    "members": "Speed against the number of members",
    "weights": "Speed against the weight of a member",
    "devices": "Speed by device",
}


def save(form: Mapping[str, Any], path: Path) -> None:
    """Draw a report of `bench` or of a sweep, in the form that `as_dict` gives, and write it as PNG or SVG."""
    figures.require(path)
    from matplotlib import rc_context

    with rc_context(figures.STYLE):
        figures.save(draw(form), path)


def draw(form: Mapping[str, Any]) -> Figure:
    """Return the figure: lines along the axis of a sweep, bars where there are no numbers to order by."""
    from matplotlib.figure import Figure

    kind = form.get("sweep")
    panels = 2 if kind == "context" else 1
    figure = Figure(figsize=(5.6 * panels, 3.7), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if kind is None:
        _bars(axes[0], [(run["label"], run, BLUE) for run in form["runs"]])
    elif kind == "devices":
        shade = {"one for all": BLUE, "one for each": ORANGE}
        _bars(axes[0], [(f"{point['series']}\n{point['x']}", point, shade[point["x"]]) for point in form["points"]])
    else:
        _lines(axes[0], form, "tokens_per_second", "tokens/s")
        if panels > 1:
            _lines(axes[1], form, "ms_a_token", "milliseconds a token")
        axes[0].legend()
    figure.suptitle(f"{_TITLES.get(kind or '', 'Speed of every method')}\n{machine(form['environment'])}", fontsize=10)
    about = [_about(form["environment"], weighted=kind not in ("weights", "members")), *form.get("notes", [])]
    figure.supxlabel("\n".join(text for text in about if text), fontsize=7, color="#444444")
    return figure


def machine(environment: Mapping[str, Any]) -> str:
    """Return what a speed was measured on, in words."""
    return str(environment.get("accelerator") or f"{environment['processor']}, {environment['cores']} cores")


def _about(environment: Mapping[str, Any], *, weighted: bool) -> str:
    settings = environment.get("settings", {})
    members = settings.get("weights", {}).items()
    weights = " + ".join(f"{name} ({weight:.2g})" if weighted else name for name, weight in members)
    kinds = sorted({str(engine.get("dtype", "")) for engine in environment.get("engines", {}).values()} - {""})
    amount = f"medians of {settings.get('repeats')} runs of {settings.get('tokens')} tokens"
    return " · ".join(text for text in (weights, ", ".join(kinds), amount) if text)


def _lines(axes: Axes, form: Mapping[str, Any], value: str, unit: str) -> None:
    points = [point for point in form["points"] if point["x"] != "alone"]
    series = list(dict.fromkeys(point["series"] for point in points))
    singles = [name for name in series if name.startswith("single")]
    for name in series:
        mine = sorted((point for point in points if point["series"] == name), key=lambda point: point["x"])
        look = _LOOKS[name] if name in _LOOKS else _SINGLES[singles.index(name) % len(_SINGLES)]
        xs = [point["x"] for point in mine]
        axes.plot(xs, [_value(point, value) for point in mine], label=name, **look)
        if value == "tokens_per_second":
            low, high = [point["slowest"] for point in mine], [point["fastest"] for point in mine]
            axes.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)
            expected = [point["predicted"] for point in mine]
            if form["sweep"] in ("weights", "members") and all(point is not None for point in expected):
                axes.plot(xs, expected, color=look["color"], linestyle=":", linewidth=1, label=f"{name}, predicted")
    for number, point in enumerate(point for point in form["points"] if point["x"] == "alone"):
        look = _SINGLES[number % len(_SINGLES)]
        axes.axhline(
            point["tokens_per_second"],
            color=look["color"],
            linestyle=look["linestyle"],
            linewidth=1,
            label=point["series"],
        )
    if form["sweep"] in ("batch", "context"):
        places = sorted({point["x"] for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(form["axis"])
    axes.set_ylabel(unit)


def _value(point: Mapping[str, Any], name: str) -> float:
    return float(point["more"][name] if name in point["more"] else point[name])


def _bars(axes: Axes, runs: Sequence[tuple[str, Mapping[str, Any], str]]) -> None:
    """Draw a bar a run, the slowest and the fastest of its repeats as a whisker, what was predicted as a mark."""
    speeds = [report["tokens_per_second"] for _, report, _ in runs]
    ends = [_ends(report) for _, report, _ in runs]
    low = [speed - end for speed, (end, _) in zip(speeds, ends, strict=True)]
    high = [end - speed for speed, (_, end) in zip(speeds, ends, strict=True)]
    places = range(len(runs))
    axes.barh(places, speeds, color=[shade for _, _, shade in runs], height=0.6)
    axes.errorbar(speeds, places, xerr=[low, high], fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    for i, (speed, (_, fastest)) in enumerate(zip(speeds, ends, strict=True)):
        axes.annotate(f"{speed:.1f}", (fastest, i), (5, 0), textcoords="offset points", va="center", fontsize=7)
    expected = [report.get("predicted_tokens_per_second", report.get("predicted")) for _, report, _ in runs]
    known = [(speed, i) for i, speed in enumerate(expected) if speed is not None]
    if known:
        marks: dict[str, Any] = {"color": RED, "marker": "D", "linestyle": "none", "label": "by the cost model"}
        axes.plot([speed for speed, _ in known], [place for _, place in known], **marks)
        axes.legend(loc="lower right")
    axes.set_yticks(list(places), [name for name, _, _ in runs])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("tokens/s")
    axes.margins(x=0.12)


def _ends(run: Mapping[str, Any]) -> tuple[float, float]:
    if "slowest" in run:
        return run["slowest"], run["fastest"]
    return run["slowest_tokens_per_second"], run["fastest_tokens_per_second"]
