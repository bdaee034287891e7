"""`mixlm eval`: tasks by every method with several seeds, and the significance of the differences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from mixlm.cli.display import console, dim, print_json, print_table
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, check_counts, flag, with_shared
from mixlm.errors import ConfigError, UsageError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.core.options import Options
    from mixlm.evaluation.results import Interval, Results, Score

_DIFFERENCES = ("task", "comparison", "difference", "95 % interval", "p-value", "questions", "better", "worse")


@with_shared()
def evaluate(
    shared: Shared,
    tasks: Annotated[
        str | None, flag("--tasks A,B", "Tasks: built into mixlm (--list), from lm-eval, or a YAML file.")
    ] = None,
    methods: Annotated[
        str | None,
        flag(
            "--methods A,B",
            "Methods to compare; single:NAME is one member, single is each member. Default:"
            " mixture (layered with a rule),conventional,single.",
        ),
    ] = None,
    limit: Annotated[int | None, flag("--limit N", "Use only the first N questions of each task.")] = None,
    seeds: Annotated[
        int, flag("--seeds N", "The number of runs of each method, with seeds counting up from --seed.")
    ] = 5,
    data: Annotated[
        Path | None, flag("--data DIR", "A folder with gsm8k.jsonl and similar files, instead of the Hugging Face hub.")
    ] = None,
    out: Annotated[
        Path | None, flag("--out DIR", "Save every answer in this folder; an interrupted run resumes from it.")
    ] = None,
    batch: Annotated[int, flag("--batch N", "The number of completions generated together.")] = 16,
    raw: Annotated[bool, flag("--raw", "Prompt with plain text, without chat templates.")] = False,
    as_json: Annotated[bool, flag("--json", "Print the results as one JSON object.")] = False,
    listed: Annotated[bool, flag("--list", "List the built-in tasks and exit.")] = False,
) -> int:
    """Evaluate methods on tasks, and compare them on the same questions.

    A task's sampling options take precedence over an ensemble file, and options given here over both. With
    --temperature, tasks that use greedy decoding sample instead.
    """
    if listed:
        return _list(as_json)
    check_counts(seeds=seeds, limit=limit, batch=batch)
    if methods is not None and shared.method is not None:
        raise UsageError("--method and --methods are both given", "omit --method")
    named = methods if methods is not None else shared.method
    options: dict[str, Any] = {**shared.options()}
    first = options.pop("seed", 0)
    from mixlm.evaluation import evaluate as run
    from mixlm.evaluation.catalog import load_tasks
    from mixlm.evaluation.run import default_methods

    rule = shared.config().rule_options().get("rule")
    names = _names("--methods", named) if named is not None else default_methods(rule)

    # Tasks are loaded before models, so that their errors are reported at once.
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


def _names(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"{option} is empty", "mixlm eval --list shows the built-in tasks")
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
    rows = [(method, *(_cell(results.score(task, method)) for task in results.tasks)) for method in results.methods]
    first = [results.score(task, results.methods[0]) for task in results.tasks]
    heads = ("method", *(f"{score.task}\n{score.metric}, {score.count} questions" for score in first))
    print_table(heads, rows, right=frozenset(heads[1:]))
    console().print(
        "± is half the width of a 95 % confidence interval: over seeds, or over questions (*) after a single run.",
        style="dim",
    )
    rows = [
        (
            comparison.task,
            f"{comparison.left} - {comparison.right}",
            f"{comparison.difference:+.4f}",
            _interval(comparison.interval),
            f"{comparison.p_value:.3g}",
            str(comparison.questions),
            str(comparison.better),
            str(comparison.worse),
        )
        for comparison in results.comparisons()
    ]
    if rows:
        print_table(_DIFFERENCES, rows, right=frozenset(_DIFFERENCES[2:]))


def _cell(score: Score) -> str:
    mark, interval = "", score.interval
    if interval is None:
        mark, interval = "*", score.question_interval
    return f"{score.mean:.4f}" + (f" ± {(interval[1] - interval[0]) / 2:.4f}{mark}" if interval is not None else "")


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
