"""`mixlm bench`: how fast each method writes with the user's own models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Option

from mixlm.cli.display import dim, json_text, print_json, progress_bars
from mixlm.cli.inputs import check_writable
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.cli.tables import console, print_table
from mixlm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from mixlm.benchmark import Plan
    from mixlm.config import UnitName
    from mixlm.core.options import Options
    from mixlm.ensemble import Ensemble

_HEADS = ("method", "tokens/s", "predicted", "bytes/s", "first token", "outside forwards", "forwards", "right")
_NUMBERS = frozenset(_HEADS[1:])


@with_shared
def bench(
    shared: Shared,
    tokens: Annotated[int, Option("--tokens", metavar="N", help="How many tokens each run writes.")] = 64,
    repeats: Annotated[int, Option("--repeats", metavar="N", help="How often each method runs.")] = 5,
    prompt: Annotated[
        str | None, Option("--prompt", metavar="TEXT", help="What the replies answer.", show_default=False)
    ] = None,
    methods: Annotated[
        str | None,
        Option(
            "--methods",
            metavar="A,B",
            help="What to measure: single (each member alone), conventional, mixture, speculative, auto, greedy, "
            "drafted (greedy with a draft), or all. Default: the first three.",
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        Option(
            "--sweep",
            metavar="AXIS",
            help="Vary one thing: batch, context, members, weights or devices.",
            show_default=False,
        ),
    ] = None,
    at: Annotated[
        str | None,
        Option("--at", metavar="N,N", help="The places of the sweep. Default: its usual ones.", show_default=False),
    ] = None,
    each: Annotated[
        bool,
        Option("--each", help="Run members on one copy of weights each for itself, to stand for different models."),
    ] = False,
    rivals: Annotated[
        bool, Option("--rivals", help="Measure transformers' own generate as well, in the same run.")
    ] = False,
    agreement: Annotated[
        float | None,
        Option(
            "--agreement",
            metavar="A",
            help="Let members agree in this share of all contexts, by construction: forwards are real, texts are not.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        Option(
            "--output",
            "--json",
            metavar="FILE",
            help="Write the report to FILE as JSON; '-' prints it in place of the tables.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        Option("--plot", metavar="FILE", help="Draw the report into FILE, .png or .svg.", show_default=False),
    ] = None,
) -> int:
    """Measure the speed of every method, or along an axis."""
    if output not in (None, "-"):
        check_writable("--output", Path(output))
    if plot is not None:
        check_writable("--plot", plot)
        from research import figures

        figures.require(plot)
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty", "leave --prompt out to take the default")
    given: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
    given |= _methods(methods, sweep) | _places(at, sweep)
    if rivals and sweep is not None:
        raise UsageError("--rivals and --sweep are both given", "rivals are measured without a sweep")
    from mixlm.benchmark import Plan

    plan = Plan(tokens=tokens, repeats=repeats, agreement=agreement, rivals=rivals, **given)
    found = _measured(shared, plan, sweep, each)
    if output == "-":
        print_json(found)
    else:
        _show(found)
    if output not in (None, "-"):
        Path(output).write_text(json_text(found) + "\n", encoding="utf-8")
        dim(f"written to {output}")
    if plot is not None:
        from mixlm.benchmark import plots

        plots.save(found, plot)
        dim(f"drawn into {plot}")
    return 0


def _methods(methods: str | None, sweep: str | None) -> dict[str, Any]:
    """Return the methods that are named. Raises ConfigError before anything is loaded."""
    from mixlm.benchmark.sweeps import METHODS, checked_axis
    from mixlm.benchmark.timing import KINDS, checked_kinds

    axis = None if sweep is None else checked_axis(sweep)
    if methods is None:
        return {} if axis is None else {"methods": METHODS[axis]}
    named = [one.strip() for one in methods.split(",") if one.strip()]
    return {"methods": KINDS if named == ["all"] else checked_kinds(named)}


def _places(at: str | None, sweep: str | None) -> dict[str, Any]:
    if at is None:
        return {}
    if sweep in (None, "devices"):
        raise UsageError("--at is given, and there are no places to choose from", "name --sweep batch, for example")
    try:
        return {"places": [float(one) for one in at.split(",")]}
    except ValueError:
        raise ConfigError(f"--at is {at!r}; it must be numbers with commas between them", "such as: 1,4,16") from None


def _measured(shared: Shared, plan: Plan, sweep: str | None, each: bool) -> dict[str, Any]:
    from mixlm.benchmark import bench, sweep_along
    from mixlm.ensemble import Ensemble

    options = shared.options()
    apart, others = _devices(shared) if sweep == "devices" else (None, shared)
    ensemble = open_ensemble(others, _for_all(options))
    if each:
        those = [replace(one, engine=one.engine.replica()) for one in ensemble.members]
        unit = cast("UnitName", ensemble.unit.name)
        ensemble = Ensemble(those, ensemble.weights.tolist(), unit=unit, router=ensemble.router)
    with progress_bars(single=True) as progress:
        if sweep is None:
            return bench(ensemble, plan, options=options, progress=progress).as_dict()
        return sweep_along(sweep, ensemble, plan, options=options, progress=progress, apart=apart).as_dict()


def _for_all(options: Options) -> Options:
    """Return the options that every method takes: a draft is for some of them."""
    others = options.copy()
    others.pop("draft", None)
    return others


def _devices(shared: Shared) -> tuple[Callable[[], Ensemble] | None, Shared]:
    """Return what loads the members onto devices of their own, and the options that put them on the first of those.

    Where there are too few devices: None, and the options as they are.
    """
    from mixlm.loading import load_config
    from research.paper.loaded import apart, placed

    config, weights = shared.config(), shared.numbers()
    devices = apart(config)
    if devices is None:
        return None, shared
    return lambda: load_config(placed(config, devices), weights=weights), replace(shared, device=devices[0])


def _show(found: Mapping[str, Any]) -> None:
    if "sweep" in found:
        _show_points(found)
    else:
        _show_runs(found["runs"])
        ratios = [(name, f"{one:.2f}") for name, one in found["ratios"].items()]
        print_table(("speed of", "ratio"), ratios, right={"ratio"})
    where = found["environment"]
    if "peak_memory_bytes" in where:
        weights, peak = (f"{where[name] / 1e9:.2f} GB" for name in ("weights_bytes", "peak_memory_bytes"))
        _dimly(f"weights {weights} · peak memory {peak}")
    parts = [str(where[name]) for name in ("accelerator", "processor", "system") if where.get(name)]
    if parts:
        _dimly(" · ".join(parts))
    for note in found.get("notes", []):
        _dimly(f"note: {note}")


def _show_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (
            one["label"],
            f"{one['tokens_per_second']:.1f}",
            _number(one["predicted_tokens_per_second"], ".1f"),
            f"{one['bytes_per_second']:.0f}",
            f"{one['seconds_to_first_token']:.3f} s",
            _number(one["outside_forwards_share"], ".1%"),
            " + ".join(f"{number:.4g}" for number in one["forwards"].values()),  # in the order of the members
            _number(one["acceptance"], ".0%"),
        )
        for one in runs
    ]
    print_table(_HEADS, rows, right=_NUMBERS)


def _show_points(found: Mapping[str, Any]) -> None:
    points = found["points"]
    more = list(dict.fromkeys(name for one in points for name in one["more"]))
    heads = (found["axis"], "method", "tokens/s", "predicted", "right", *(name.replace("_", " ") for name in more))
    rows = [
        (
            one["x"] if isinstance(one["x"], str) else f"{one['x']:g}",
            one["series"],
            f"{one['tokens_per_second']:.1f}",
            _number(one["predicted"], ".1f"),
            _number(one["acceptance"], ".0%"),
            *(_number(one["more"].get(name), ".2f") for name in more),
        )
        for one in points
    ]
    print_table(heads, rows, right={one for one in heads if one != "method"})


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _dimly(line: str) -> None:
    console().print(line, style="dim", soft_wrap=True)
