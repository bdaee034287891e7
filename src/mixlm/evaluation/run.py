"""The evaluation itself: every task by every method with every seed, each run resumable.

The seeds are a loop around the harness, not a setting of it: its own repeats score one text of several, and its own
seed reaches a model as part of a task's options, the same for every run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

import numpy as np

from mixlm.choices import METHODS
from mixlm.core.options import Options, without_rule
from mixlm.core.rule_options import is_average, rule_as_dict
from mixlm.ensemble import AT_ONCE, Ensemble
from mixlm.errors import ConfigError, did_you_mean
from mixlm.evaluation.catalog import load_tasks
from mixlm.evaluation.contexts import generation_options, is_greedy, unpack
from mixlm.evaluation.judging import build_requests, judge, to_scores
from mixlm.evaluation.likelihood import rule_settings
from mixlm.evaluation.results import Results, Score
from mixlm.evaluation.run_folder import locked_folder, response_log, responses_path
from mixlm.resumable_log import ResumableLog
from mixlm.routing.base import describe_router
from mixlm.terminal import Progress
from mixlm.types import Ids, Message, Tool
from mixlm.version import __version__

_FORMAT = 2  # of the files of a folder, and of what models are asked; counted up where either changes


class EvaluationOptions(TypedDict, total=False):
    """Options of `evaluate`.

    Args:
        methods: Names; `single:NAME` is one member, `single` each of them, without a rule. Default: mixture (layered
            with a rule), conventional, single.
        seeds: The seeds of the runs. Default: 0 to 4.
        limit: Only the first questions of each task.
        data: A folder with the questions of mixlm's own tasks.
        options: Generation options of every completion, over those of a task.
        out: A folder for responses and results; a run continues where an earlier one stopped. Functions (a rule, a
            router) are told apart by their names.
        chat: Whether questions are messages in each member's template. Default: for tasks that generate text.
        progress: Called with task, method and seed, the number of finished requests, and of all requests.
        at_once: Completions generated together.
    """

    methods: Sequence[str]
    seeds: Sequence[int]
    limit: int | None
    data: str | Path | None
    options: Options
    out: str | Path | None
    chat: bool | None
    progress: Progress | None
    at_once: int


def evaluate(
    ensemble: Ensemble, tasks: Sequence[str] | Mapping[str, Any], **plan: Unpack[EvaluationOptions]
) -> Results:
    """Evaluate methods on tasks, with several seeds.

    Requests without chance (given texts to score, greedy decoding) run once, and alike for all methods but `single`.

    Args:
        ensemble: The ensemble.
        tasks: Names of tasks, or what `load_tasks` returned.
        **plan: See `EvaluationOptions`.

    Raises:
        ConfigError: Tasks, methods or options do not fit, or `out` was begun with other settings or is in use. Raised
            before anything runs.
        UnsupportedError: The ensemble does not support a method, an option or a task. Raised before anything runs.
    """
    options = plan.get("options") or {}
    for name in ("method", "seed", "sequence", "raw"):
        if name in options:
            raise ConfigError(f"{name} is no option of an evaluation's completions", "give methods, seeds or chat")
    limit, seeds = plan.get("limit"), tuple(plan.get("seeds", range(5)))
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be 1 or more")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds are {list(seeds)}; give one or more, each once")
    if isinstance(tasks, str):
        tasks = [tasks]
    methods = plan.get("methods") or default_methods(rule_settings(ensemble, options).rule)
    writers = _method_ensembles(ensemble, methods, options)
    out = Path(out_given) if (out_given := plan.get("out")) is not None else None
    loaded = tasks if isinstance(tasks, Mapping) else load_tasks(tasks, data=plan.get("data"))
    requests = {name: build_requests(task, limit, plan.get("chat")) for name, task in loaded.items()}
    _check_requests(writers, requests, options)
    settings = describe(ensemble, options, plan.get("chat"))
    plan["seeds"], plan["options"] = seeds, options
    with locked_folder(out, settings) if out is not None else nullcontext():
        system = options.get("system", ensemble.defaults.system)
        scores: list[Score] = []
        notes: list[str] = []
        for name, task in loaded.items():
            if system and unpack(requests[name][0].args[0]).messages is None:
                notes.append(f"{name} puts its questions as plain text, without the system text")
            task_scores, said = _run_task(name, task, requests[name], writers, plan)
            scores += task_scores
            notes += said
        about = {
            **settings,
            "seeds": list(seeds),
            "limit": limit,
            "data": str(folder) if (folder := plan.get("data")) else None,
        }
        results = Results(tuple(scores), about, tuple(notes))
        if out is not None:
            (out / "results.json").write_text(json.dumps(results.as_dict(questions=True)) + "\n", encoding="utf-8")
    return results


def _run_task(
    name: str,
    task: Any,
    requests: Sequence[Any],
    writers: Mapping[str, tuple[Ensemble, str]],
    plan: EvaluationOptions,
) -> tuple[list[Score], list[str]]:
    """Run one task by every method, and score it. writers: an ensemble and a method by the method's name."""
    from mixlm.evaluation.lm import EnsembleLM

    out, at_once = plan.get("out"), plan.get("at_once", AT_ONCE)
    scores: list[Score] = []
    notes: dict[str, None] = {}
    logs: dict[tuple[str, int], ResumableLog] = {}
    for label, (ensemble, method) in writers.items():
        options = _method_options(method, plan["options"])
        scored = requests[0].request_type != "generate_until"
        greedy = not scored and all(is_greedy(request.args[1], options) for request in requests)
        seeds = plan["seeds"][:1] if scored or greedy else plan["seeds"]
        target = label if method == "single" or not (scored or greedy) else "mixture" if scored else "greedy"
        tables = []
        for seed in seeds:
            if (target, seed) not in logs:
                path = None if out is None else responses_path(Path(out), name, target, seed)
                logs[target, seed] = response_log(path)
            log, place = logs[target, seed], f"{name} {label} seed {seed}"
            lm = EnsembleLM(
                ensemble,
                options=cast(Options, {**options, "seed": seed}),
                log=log,
                progress=plan.get("progress"),
                label=place,
                at_once=at_once,
            )
            tables.append(judge(task, requests, getattr(lm, requests[0].request_type)(requests)))
            notes |= dict.fromkeys(_run_notes(name, label, method, log, len(requests)))
        scores += to_scores(name, label, task, seeds, tables)
    return scores, list(notes)


def default_methods(rule: object) -> tuple[str, ...]:
    """Return what is evaluated by default. rule: the combination rule, None for the average."""
    return ("mixture" if is_average(rule) else "layered", "conventional", "single")


def _method_ensembles(ensemble: Ensemble, methods: Iterable[str], options: Options) -> dict[str, tuple[Ensemble, str]]:
    """Return an ensemble and a method for each name. Raises ConfigError for an unknown one, or options it refuses."""
    alone = {f"single:{member.name}": Ensemble([member], defaults=ensemble.defaults) for member in ensemble.members}
    out: dict[str, tuple[Ensemble, str]] = {}
    for name in methods:
        if name == "single":
            out |= {label: (single, "single") for label, single in alone.items()}
        elif name in alone:
            out[name] = alone[name], "single"
        elif name in METHODS:
            out[name] = ensemble, name
        else:
            known = [*METHODS, *alone]
            hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
            raise ConfigError(f"there is no method {name!r}", hint)
    for evaluated, method in out.values():
        evaluated.context(evaluated.settings(**cast(Options, {**_method_options(method, options), "seed": 0})))
    return out


def _method_options(method: str, options: Options) -> dict[str, Any]:
    """Return the options of a method's completions; those of a rule are not for a member alone."""
    return {**(without_rule(options) if method == "single" else options), "method": method}


def _check_requests(
    writers: Mapping[str, tuple[Ensemble, str]], requests: Mapping[str, Sequence[Any]], options: Options
) -> None:
    """Raise ConfigError for a task's options that mixlm has not, UnsupportedError for texts that cannot be scored."""
    from mixlm.evaluation.lm import EnsembleLM

    for request in (request for task in requests.values() for request in task):
        if request.request_type == "generate_until":
            generation_options(request.args[1], options)
    if any(task[0].request_type != "generate_until" for task in requests.values()):
        # All methods of an ensemble score alike; `single` has an ensemble of its own.
        for ensemble, method in {id(writer[0]): writer for writer in writers.values()}.values():
            _ = EnsembleLM(ensemble, options=cast(Options, _method_options(method, options))).scorer


def describe(ensemble: Ensemble, options: Options, chat: bool | None) -> dict[str, Any]:
    """Return all that answers depend on, besides task, method and seed."""
    probe = [Message("user", "probe")]
    members = [
        {
            "name": member.name,
            "model": member.engine.name,
            "weight": float(weight),
            "sampling": dict(member.sampling),
            "dtype": member.engine.details.get("dtype"),
            "prompt": _digest(member.engine.prompts.chat(probe)),  # tells templates and tokenizers apart
        }
        for member, weight in zip(ensemble.members, ensemble.weights, strict=True)
    ]
    names = [field.name for field in fields(ensemble.defaults) if field.name not in ("seed", "method")]
    settings = {
        "mixlm": __version__,
        "format": _FORMAT,
        "members": members,
        "unit": ensemble.unit.name,
        "router": describe_router(ensemble.router),
        "defaults": {name: getattr(ensemble.defaults, name) for name in names},
        "options": options,
        "chat": chat,
    }
    described: dict[str, Any] = json.loads(json.dumps(settings, default=_to_json))
    return described


def _to_json(value: Any) -> Any:
    """Return an option that JSON does not know in a form that it does."""
    if isinstance(value, Tool):
        return asdict(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, set):
        return sorted(value)
    return dict(value) if isinstance(value, Mapping) else rule_as_dict(value)


def _digest(ids: Ids) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()[:16]


def _run_notes(task: str, label: str, method: str, log: ResumableLog, count: int) -> list[str]:
    """Return what a reader should know about a run."""
    entries = [log.records[i] for i in range(count)]
    notes = []
    if method not in ("greedy", "single") and any(entry.get("method") == "greedy" for entry in entries):
        notes.append(f"{task} asks for greedy decoding, so {label} wrote with method greedy; a temperature samples")
    if long := sum("error" in entry for entry in entries):
        notes.append(f"{task}, {label}: {long} of {count} requests are too long for a member and count as wrong")
    return notes
