"""`mixlm eval`: tasks by every method and several seeds, with what is sure about the differences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Option

from mixlm.cli.display import dim, print_json
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.cli.tables import console, print_table
from mixlm.errors import ConfigError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.core.options import Options
    from mixlm.evaluation.results import Results, Score
    from mixlm.evaluation.statistics import Interval

_METHODS = ("mixture", "conventional", "single")
_DIFFERENCES = ("task", "comparison", "difference", "95 % interval", "p-value", "questions", "better", "worse")


@with_shared
def evaluate(
    shared: Shared,
    tasks: Annotated[
        str | None,
        Option("--tasks", metavar="A,B", help="Tasks: mixlm's own, lm-eval's, or a YAML file.", show_default=False),
    ] = None,
    methods: Annotated[
        str | None,
        Option(
            "--methods",
            metavar="A,B",
            help="Methods to compare; single:NAME is one member, single each. Default: mixture,conventional,single.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, Option("--limit", metavar="N", help="Only the first N questions of a task.", show_default=False)
    ] = None,
    seeds: Annotated[int, Option("--seeds", metavar="N", help="Runs of each method, from --seed or 0 on.")] = 5,
    data: Annotated[
        Path | None,
        Option(
            "--data",
            metavar="DIR",
            help="A folder with gsm8k.jsonl and the like, in place of the hub.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        Option("--out", metavar="DIR", help="Keep every answer here; a run that stopped goes on.", show_default=False),
    ] = None,
    batch: Annotated[int, Option("--batch", metavar="N", help="Texts that are written together.")] = 16,
    raw: Annotated[bool, Option("--raw", help="Put questions as plain text, without the members' templates.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the results as one JSON object.")] = False,
    listed: Annotated[bool, Option("--list", help="List mixlm's own tasks and exit.")] = False,
) -> int:
    """Evaluate methods on tasks, and compare them on the same questions.

    A task's sampling options take precedence over an ensemble file, and options given here over both. With
    --temperature, tasks that use greedy decoding sample instead.
    """
    if listed:
        return _list(as_json)
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; it must be 1 or more")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; it must be 1 or more")
    if batch < 1:
        raise ConfigError(f"--batch is {batch}; it must be 1 or more")
    names = _names("--methods", methods) if methods is not None else (shared.method or ",".join(_METHODS)).split(",")
    options: dict[str, Any] = {**shared.options()}
    first = options.pop("seed", 0)
    from mixlm.evaluation import evaluate as run
    from mixlm.evaluation.catalog import load_tasks

    # Questions are read before models: what is wrong with them is said at once.
    loaded = load_tasks(_names("--tasks", tasks or ""), data=data)
    ensemble = open_ensemble(shared, cast("Options", {**options, "method": names[0].partition(":")[0]}))
    with progress_bars(single=True) as progress:
        results = run(
            ensemble,
            loaded,
            methods=names,
            seeds=range(first, first + seeds),
            limit=limit,
            data=data,
            options=cast("Options", options),
            out=out,
            chat=False if raw else None,
            progress=progress,
            at_once=batch,
        )
    for note in results.notes:
        dim(f"note: {note}")
    if as_json:
        print_json(results.as_dict())
    else:
        _show(results)
    return 0


def _names(option: str, given: str) -> list[str]:
    names = [one.strip() for one in given.split(",") if one.strip()]
    if not names:
        raise ConfigError(f"{option} names nothing", "mixlm eval --list shows mixlm's own tasks")
    return list(dict.fromkeys(names))


def _list(as_json: bool) -> int:
    from mixlm.evaluation.catalog import own_tasks

    tasks = own_tasks()
    if as_json:
        print_json({"tasks": [{"name": name, "about": about} for name, about in tasks.items()]})
    else:
        print_table(("task", "about"), list(tasks.items()))
    return 0


def _show(results: Results) -> None:
    rows = []
    for method in results.methods:
        scores = [results.score(task, method) for task in results.tasks]
        rows.append((method, *(_cell(one) for one in scores)))
    first = [results.score(task, results.methods[0]) for task in results.tasks]
    heads = ("method", *(f"{one.task}\n{one.metric}, {one.count} questions" for one in first))
    print_table(heads, rows, right=frozenset(heads[1:]))
    console().print(
        "± is half of a 95 % interval: over seeds, or over questions (*) where one run was made.", style="dim"
    )
    found = [
        (
            one.task,
            f"{one.left} - {one.right}",
            f"{one.difference:+.4f}",
            _interval(one.interval),
            f"{one.p_value:.3g}",
            str(one.questions),
            str(one.better),
            str(one.worse),
        )
        for one in results.comparisons()
    ]
    if found:
        print_table(_DIFFERENCES, found, right=frozenset(_DIFFERENCES[2:]))


def _cell(score: Score) -> str:
    mark, interval = "", score.interval
    if interval is None:
        mark, interval = "*", score.question_interval
    return f"{score.mean:.4f}" + (f" ± {(interval[1] - interval[0]) / 2:.4f}{mark}" if interval is not None else "")


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
