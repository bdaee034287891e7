"""`mixlm bench`: how fast each method writes with the user's own models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from mixlm.cli.display import console, dim, json_text, print_json, print_table
from mixlm.cli.inputs import check_writable
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, flag, with_shared
from mixlm.errors import ConfigError, UsageError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.core.options import Options

_HEADS = ("method", "tokens/s", "predicted", "bytes/s", "first token", "outside forwards", "forwards", "accepted")
_NUMBERS = frozenset(_HEADS[1:])

TokensOption = Annotated[int, flag("--tokens N", "How many tokens each run writes.")]
RepeatsOption = Annotated[int, flag("--repeats N", "How often each method runs.")]
PromptOption = Annotated[str | None, flag("--prompt TEXT", "What the completions answer.")]
MethodsOption = Annotated[
    str | None,
    flag(
        "--methods A,B",
        "What to measure: single (each member alone), conventional, mixture, speculative, auto, greedy, "
        "drafted (greedy with a draft), layered, or all. Default: single, conventional and mixture; with a rule, "
        "layered in place of mixture.",
    ),
]
OutputOption = Annotated[
    str | None,
    flag("--output --json FILE", "Write the report to FILE as JSON; '-' prints it in place of the tables."),
]


@with_shared(
    unused=("method", "max_tokens", "stop"), reason="it measures --methods, for --tokens tokens whatever they are"
)
def bench(
    shared: Shared,
    tokens: TokensOption = 64,
    repeats: RepeatsOption = 5,
    prompt: PromptOption = None,
    methods: MethodsOption = None,
    output: OutputOption = None,
    moved: Annotated[str | None, Option("--sweep", "--at", "--agreement", "--plot", hidden=True)] = None,
    moved_flag: Annotated[bool, Option("--each", "--rivals", hidden=True)] = False,
) -> int:
    """Measure the speed of every method."""
    if moved is not None or moved_flag:
        raise UsageError(
            "mixlm bench measures methods; sweeps, rivals, agreement and figures are run from a clone of mixlm now",
            "there: python -m research.benchmark, with the same options",
        )
    if output not in (None, "-"):
        check_writable("--output", Path(output))
    from mixlm.benchmark import BenchPlan
    from mixlm.benchmark import bench as measure

    plan = BenchPlan(tokens=tokens, repeats=repeats, **prompt_and_methods(prompt, methods))
    options = shared.options()
    ensemble = open_ensemble(shared, without_draft(options))
    with progress_bars(single=True) as progress:
        report = measure(ensemble, plan, options=options, progress=progress).as_dict()
    show(report, output, show_runs)
    return 0


def prompt_and_methods(prompt: str | None, methods: str | None) -> dict[str, Any]:
    """Return the fields of a plan that are given. Raises ConfigError before anything is loaded."""
    from mixlm.benchmark.timing import KINDS, checked_kinds

    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty", "leave --prompt out to take the default")
    fields: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
    if methods is not None:
        names = [name.strip() for name in methods.split(",") if name.strip()]
        fields["methods"] = KINDS if names == ["all"] else checked_kinds(names)
    return fields


def without_draft(options: Options) -> Options:
    """Return the options that every method takes: a draft is for some of them."""
    common = options.copy()
    common.pop("draft", None)
    return common


def show(report: Mapping[str, Any], output: str | None, tables: Callable[[Mapping[str, Any]], None]) -> None:
    """Print a report, as tables or as JSON, and write it to the file that is named."""
    if output == "-":
        print_json(report)
        return
    tables(report)
    environment = report["environment"]
    if "peak_memory_bytes" in environment:
        weights, peak = (f"{environment[name] / 1e9:.2f} GB" for name in ("weights_bytes", "peak_memory_bytes"))
        _print_dim(f"weights {weights} · peak memory {peak}")
    engines = {name: details.get("engine", "") for name, details in environment.get("engines", {}).items()}
    if any(engines.values()):
        _print_dim(" · ".join(f"{name} in {engine}" for name, engine in engines.items()))
    machine = [str(environment[name]) for name in ("accelerator", "processor", "system") if environment.get(name)]
    if machine:
        _print_dim(" · ".join(machine))
    for note in report.get("notes", []):
        _print_dim(f"note: {note}")
    if output is not None:
        Path(output).write_text(json_text(report) + "\n", encoding="utf-8")
        dim(f"written to {output}")


def show_runs(report: Mapping[str, Any]) -> None:
    """Print the speed of every method, and how many times as fast they are as each other."""
    rows = [
        (
            run["label"],
            f"{run['tokens_per_second']:.1f}",
            number_text(run["predicted_tokens_per_second"], ".1f"),
            f"{run['bytes_per_second']:.0f}",
            f"{run['seconds_to_first_token']:.3f} s",
            number_text(run["outside_forwards_share"], ".1%"),
            " + ".join(f"{number:.4g}" for number in run["forwards"].values()),  # in the order of the members
            number_text(run["acceptance"], ".0%"),
        )
        for run in report["runs"]
    ]
    print_table(_HEADS, rows, right=_NUMBERS)
    ratios = [(name, f"{ratio:.2f}") for name, ratio in report["ratios"].items()]
    print_table(("speed of", "ratio"), ratios, right={"ratio"})


def number_text(value: float | None, form: str) -> str:
    """Format a number; empty where there is none."""
    return "" if value is None else format(value, form)


def _print_dim(line: str) -> None:
    console().print(line, style="dim", soft_wrap=True)
