"""`python -m research.benchmark`: `mixlm bench`, with sweeps, rivals, agreement by construction and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Option, Typer

from mixlm.cli.bench import (
    MethodsOption,
    OutputOption,
    PromptOption,
    RepeatsOption,
    TokensOption,
    number_text,
    prompt_and_methods,
    show,
    show_runs,
    without_draft,
)
from mixlm.cli.display import dim, print_table
from mixlm.cli.inputs import check_writable
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.cli.run import run_app
from mixlm.errors import ConfigError, UsageError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.choices import UnitName
    from mixlm.ensemble import Ensemble
    from research.benchmark import ComparisonPlan


@with_shared()
def benchmark(
    shared: Shared,
    tokens: TokensOption = 64,
    repeats: RepeatsOption = 5,
    prompt: PromptOption = None,
    methods: MethodsOption = None,
    sweep: Annotated[
        str | None,
        Option(
            "--sweep",
            metavar="AXIS",
            help="Vary one thing: batch, context, members, weights or devices.",
            show_default=False,
        ),
    ] = None,
    axis_places: Annotated[
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
    output: OutputOption = None,
    plot: Annotated[
        Path | None,
        Option("--plot", metavar="FILE", help="Draw the report into FILE, .png or .svg.", show_default=False),
    ] = None,
) -> int:
    """Measure the speed of every method, or along an axis."""
    if output not in (None, "-"):
        check_writable("--output", Path(output))
    if plot is not None:
        from research.figures import require

        check_writable("--plot", plot)
        require(plot)
    from research.benchmark import ComparisonPlan

    fields = _methods_of(sweep) | prompt_and_methods(prompt, methods) | _places(axis_places, sweep)
    if rivals and sweep is not None:
        raise UsageError("--rivals and --sweep are both given", "rivals are measured without a sweep")
    plan = ComparisonPlan(tokens=tokens, repeats=repeats, agreement=agreement, rivals=rivals, **fields)
    report = _measure(shared, plan, sweep, each)
    show(report, output, show_runs if sweep is None else _show_points)
    if plot is not None:
        from research.benchmark import plots

        plots.save(report, plot)
        dim(f"drawn into {plot}")
    return 0


def _methods_of(sweep: str | None) -> dict[str, Any]:
    """Return the methods that a sweep measures unless others are named. Raises ConfigError for an unknown axis."""
    from research.benchmark.sweeps import METHODS, checked_axis

    return {} if sweep is None else {"methods": METHODS[checked_axis(sweep)]}


def _places(text: str | None, sweep: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    if sweep in (None, "devices"):
        raise UsageError("--at is given, and there are no places to choose from", "name --sweep batch, for example")
    try:
        return {"places": [float(place) for place in text.split(",")]}
    except ValueError:
        raise ConfigError(f"--at is {text!r}; it must be numbers with commas between them", "such as: 1,4,16") from None


def _measure(shared: Shared, plan: ComparisonPlan, sweep: str | None, each: bool) -> dict[str, Any]:
    from mixlm.ensemble import Ensemble
    from research.benchmark import compare, sweep_along

    options = shared.options()
    apart, shared = _devices(shared) if sweep == "devices" else (None, shared)
    ensemble = open_ensemble(shared, without_draft(options))
    if each:
        members = [replace(member, engine=member.engine.replica()) for member in ensemble.members]
        unit = cast("UnitName", ensemble.unit.name)
        ensemble = Ensemble(members, ensemble.weights.tolist(), unit=unit, router=ensemble.router)
    with progress_bars(single=True) as progress:
        if sweep is None:
            return compare(ensemble, plan, options=options, progress=progress).as_dict()
        return sweep_along(sweep, ensemble, plan, options=options, progress=progress, apart=apart).as_dict()


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


def _show_points(report: Mapping[str, Any]) -> None:
    points = report["points"]
    extra = list(dict.fromkeys(name for point in points for name in point["more"]))
    heads = (report["axis"], "method", "tokens/s", "predicted", "right", *(name.replace("_", " ") for name in extra))
    rows = [
        (
            point["x"] if isinstance(point["x"], str) else f"{point['x']:g}",
            point["series"],
            f"{point['tokens_per_second']:.1f}",
            number_text(point["predicted"], ".1f"),
            number_text(point["acceptance"], ".0%"),
            *(number_text(point["more"].get(name), ".2f") for name in extra),
        )
        for point in points
    ]
    print_table(heads, rows, right={head for head in heads if head != "method"})


app = Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(benchmark)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_app(app, "python -m research.benchmark", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
