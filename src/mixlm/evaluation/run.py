"""The evaluation itself: every task by every method with every seed, each run resumable.

The seeds are a loop around the harness, not a setting of it: its own repeats score one text of several, and its own
seed reaches a model as part of a task's options, the same for every run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

import numpy as np

from mixlm.config import METHODS
from mixlm.core.options import Options
from mixlm.core.rule_options import is_average
from mixlm.ensemble import AT_ONCE, Ensemble
from mixlm.errors import ConfigError, did_you_mean
from mixlm.evaluation.catalog import load_tasks
from mixlm.evaluation.contexts import is_greedy, unpack
from mixlm.evaluation.judging import build_requests, judge, to_scores
from mixlm.evaluation.results import Results, Score
from mixlm.evaluation.run_folder import locked_folder, response_log, responses_path
from mixlm.resumable_log import ResumableLog
from mixlm.routing import Router
from mixlm.terminal import Progress
from mixlm.types import Ids, Message
from mixlm.version import __version__


class EvaluationOptions(TypedDict, total=False):
    """Options of `evaluate`.

    Args:
        methods: Names; `single:NAME` is one member, `single` each of them. Default: mixture (layered with a rule),
            conventional, single.
        seeds: The seeds of the runs. Default: 0 to 4.
        limit: Only the first questions of each task.
        data: A folder with the questions of mixlm's own tasks.
        options: Generation options of every completion, over those of a task.
        out: A folder for responses and results; a run continues where an earlier one stopped.
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
        UnsupportedError: The ensemble does not support a method or an option.
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
    methods = plan.get("methods") or default_methods(ensemble.defaults.rule or options.get("rule"))
    writers = _method_ensembles(ensemble, methods, options)
    out = Path(out_given) if (out_given := plan.get("out")) is not None else None
    loaded = tasks if isinstance(tasks, Mapping) else load_tasks(tasks, data=plan.get("data"))
    settings = describe(ensemble, options, plan.get("chat"))
    with locked_folder(out, settings) if out is not None else nullcontext():
        run = _Evaluation(writers, seeds, options, out, plan.get("progress"), plan.get("at_once", AT_ONCE))
        system = options.get("system", ensemble.defaults.system)
        scores: list[Score] = []
        notes: list[str] = []
        for name, task in loaded.items():
            requests = build_requests(task, limit, plan.get("chat"))
            if system and unpack(requests[0].args[0]).messages is None:
                notes.append(f"{name} puts its questions as plain text, without the system text")
            task_scores, said = run.task(name, task, requests)
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


@dataclass
class _Evaluation:
    """What all tasks of an evaluation have in common. writers: an ensemble and a method by the method's name."""

    writers: Mapping[str, tuple[Ensemble, str]]
    seeds: Sequence[int]
    options: Options
    out: Path | None
    progress: Progress | None
    at_once: int

    def task(self, name: str, task: Any, requests: Sequence[Any]) -> tuple[list[Score], list[str]]:
        """Run one task by every method, and score it."""
        scores: list[Score] = []
        notes: dict[str, None] = {}
        logs: dict[tuple[str, int], ResumableLog] = {}
        for label, (ensemble, method) in self.writers.items():
            options = {**self.options, "method": method}
            scored = requests[0].request_type != "generate_until"
            greedy = not scored and all(is_greedy(request.args[1], options) for request in requests)
            seeds = self.seeds[:1] if scored or greedy else self.seeds
            target = label if method == "single" or not (scored or greedy) else "mixture" if scored else "greedy"
            tables = []
            for seed in seeds:
                if (target, seed) not in logs:
                    path = responses_path(self.out, name, target, seed) if self.out is not None else None
                    logs[target, seed] = response_log(path)
                log = logs[target, seed]
                lm = self._model(ensemble, {**options, "seed": seed}, log, f"{name} {label} seed {seed}")
                tables.append(judge(task, requests, getattr(lm, requests[0].request_type)(requests)))
                notes |= dict.fromkeys(_run_notes(name, label, method, log, len(requests)))
            scores += to_scores(name, label, task, seeds, tables)
        return scores, list(notes)

    def _model(self, ensemble: Ensemble, options: Mapping[str, Any], log: ResumableLog, label: str) -> Any:
        from mixlm.evaluation.lm import EnsembleLM

        return EnsembleLM(
            ensemble,
            options=cast(Options, options),
            log=log,
            progress=self.progress,
            label=label,
            at_once=self.at_once,
        )


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
        evaluated.context(evaluated.settings(**cast(Options, {**options, "method": method, "seed": 0})))
    return out


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
    defaults = {name: value for name, value in asdict(ensemble.defaults).items() if name not in ("seed", "method")}
    return {
        "mixlm": __version__,
        "members": members,
        "unit": ensemble.unit.name,
        "router": describe_router(ensemble.router),
        "defaults": defaults,
        "options": dict(options),
        "chat": chat,
    }


def describe_router(router: Router) -> str:
    """Return a router's kind and, where it has numbers of its own, a digest of them."""
    if isinstance(digest := getattr(router, "digest", None), str):
        return f"{type(router).__name__} {digest}"
    values = [np.asarray(value) for _, value in sorted(vars(router).items())]
    numbers = [value for value in values if value.dtype.kind in "iuf"]
    digest = hashlib.sha256(b"".join(value.tobytes() for value in numbers)).hexdigest()[:16]
    return f"{type(router).__name__} {digest}" if numbers else type(router).__name__


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
