"""Comparable runs: the same prompt and number of tokens for every method, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from mixlm.benchmark.report import BenchReport, MethodRun, environment
from mixlm.benchmark.timing import DEFAULT, Contestant, EnsembleContestant, TimedRun, contestants
from mixlm.core.options import Options
from mixlm.decoding.cost_model import (
    DraftPlan,
    ForwardCosts,
    conventional_seconds,
    drafted_greedy_seconds,
    fit_forward_costs,
    mixture_seconds,
    speculative_seconds,
)
from mixlm.engines.requests import Forward
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.terminal import Progress

PROMPT = "Explain how a suspension bridge carries its load, and why the towers are so tall."
_WARM_UP = 8  # tokens
_PLAIN = ("conventional", "mixture")


@dataclass(frozen=True)
class BenchPlan:
    """What is measured: runs of so many tokens of each method, after one to warm up.

    methods: out of `timing.KINDS`; `single` stands for each member alone.
    """

    tokens: int = 64
    repeats: int = 5
    prompt: str = PROMPT
    methods: Sequence[str] = DEFAULT

    def __post_init__(self) -> None:
        for name, value, least in (("tokens", self.tokens, 4), ("repeats", self.repeats, 1)):
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be {least} or more")


def bench(
    ensemble: Ensemble,
    plan: BenchPlan | None = None,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
    rivals: Sequence[Contestant] = (),
) -> BenchReport:
    """Measure the speed of methods: by default each member alone, conventional and mixture. End-of-text is masked.

    Ratios are medians over repeats of the ratio within a repeat.

    Args:
        ensemble: The ensemble.
        plan: What is measured.
        options: Generation options of every run.
        progress: Called with the label of a run, the number of finished runs, and the number of all runs.
        rivals: Measured interleaved with the methods, such as another library with the same models.

    Raises:
        ConfigError: The plan or the options are invalid.
    """
    plan = plan or BenchPlan()
    full_options: dict[str, Any] = {"seed": 0, **(options or {})}
    methods = contestants(ensemble, plan.methods, plan.prompt, full_options)
    measured: list[Contestant] = [*methods, *rivals]
    runs = run_interleaved(measured, plan, progress)
    costs = measured_costs(ensemble, measured, runs)
    by_label = {contestant.label: repeats for contestant, repeats in zip(measured, runs, strict=True)}
    return BenchReport(
        tuple(
            _summarize(contestant, repeats, predicted_speed(ensemble, contestant, repeats, costs))
            for contestant, repeats in zip(measured, runs, strict=True)
        ),
        {
            **speed_ratios(ensemble, {method.label: by_label[method.label] for method in methods}),
            **rival_ratios(by_label, [rival.label for rival in rivals]),
        },
        environment([member.engine for member in ensemble.members], settings_record(ensemble, plan, full_options)),
    )


def run_interleaved(
    contestants: Sequence[Contestant], plan: BenchPlan, progress: Progress | None = None
) -> list[list[TimedRun]]:
    """Run every contestant once, then again, and so on, so that changes of the machine affect all of them."""
    runs: list[list[TimedRun]] = [[] for _ in contestants]
    total = (plan.repeats + 1) * len(contestants)
    for repeat in range(plan.repeats + 1):
        for i, contestant in enumerate(contestants):
            if progress is not None:
                progress(contestant.label, repeat * len(contestants) + i, total)
            run = contestant.measure(repeat, plan.tokens if repeat else min(_WARM_UP, plan.tokens))
            if repeat:  # the first round only warms up
                runs[i].append(run)
    if progress is not None:
        progress("", total, total)
    return runs


def settings_record(ensemble: Ensemble, plan: BenchPlan, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the runs, as `BenchReport` holds them."""
    resolved = ensemble.settings(**{name: value for name, value in options.items() if name != "draft"})
    return {
        "tokens": plan.tokens,
        "repeats": plan.repeats,
        "prompt": plan.prompt,
        "unit": ensemble.unit.name,
        "weights": dict(zip(ensemble.names, ensemble.weights.tolist(), strict=True)),
        "sampling": dict(resolved.sampling),
        "block": resolved.block,
        "seed": resolved.seed,
    }


def _summarize(contestant: Contestant, repeats: Sequence[TimedRun], predicted: float | None) -> MethodRun:
    outside = [seconds for run in repeats for seconds in run.outside]
    quarter = max(repeats[0].tokens // 4, 1)
    logs = [[forward for run in repeats for forward in run.forwards[i]] for i in range(len(contestant.members))]
    return MethodRun(
        method=contestant.method,
        label=contestant.label,
        tokens=sum(run.tokens for run in repeats) / len(repeats),
        members=contestant.members,
        tokens_per_second=median(run.speed for run in repeats),
        bytes_per_second=median(run.bytes / run.seconds for run in repeats),
        seconds_to_first_token=median(run.first for run in repeats),
        forwards={name: len(log) / len(repeats) for name, log in zip(contestant.members, logs, strict=True)},
        seconds_by_forward_length={name: _by_length(log) for name, log in zip(contestant.members, logs, strict=True)},
        outside_forwards_share=median(1 - run.inside / run.seconds for run in repeats) if outside else None,
        outside_forwards_ms=_milliseconds(outside),
        outside_forwards_ms_first_quarter=_milliseconds(
            [seconds for run in repeats for seconds in run.outside[:quarter]]
        ),
        outside_forwards_ms_last_quarter=_milliseconds(
            [seconds for run in repeats for seconds in run.outside[-quarter:]]
        ),
        draft=contestant.draft,
        drafted=sum(run.drafted for run in repeats),
        accepted=sum(run.accepted for run in repeats),
        plan=repeats[-1].plan,
        predicted_tokens_per_second=predicted,
        memory_bytes=max((run.memory for run in repeats if run.memory is not None), default=None),
        slowest_tokens_per_second=min(run.speed for run in repeats),
        fastest_tokens_per_second=max(run.speed for run in repeats),
    )


def _milliseconds(seconds: Sequence[float]) -> float | None:
    return 1e3 * median(seconds) if seconds else None


def _by_length(log: Sequence[Forward]) -> dict[int, float]:
    """Return the mean seconds of a forward by its number of tokens, of the forwards whose time is known."""
    lengths = sorted({forward.tokens for forward in log if forward.seconds})
    return {n: float(np.mean([forward.seconds for forward in log if forward.tokens == n])) for n in lengths}


def measured_costs(
    ensemble: Ensemble, contestants: Sequence[Contestant], runs: Sequence[Sequence[TimedRun]]
) -> ForwardCosts:
    """Fit the costs of the ensemble's members to all forwards of mixlm's own runs."""
    logs: dict[str, list[Forward]] = {name: [] for name in ensemble.names}
    for contestant, repeats in zip(contestants, runs, strict=True):
        for run in repeats if isinstance(contestant, EnsembleContestant) else ():
            for name, log in zip(contestant.members, run.forwards, strict=True):
                logs[name] += log
    return fit_forward_costs([logs[name] for name in ensemble.names])


def predicted_speed(
    ensemble: Ensemble, contestant: Contestant, runs: Sequence[TimedRun], costs: ForwardCosts
) -> float | None:
    """Return the tokens per second that the cost model predicts, without time outside forwards; None without a formula.

    `speculative` and `drafted` have one for the acceptance rate that was measured, if a member drafts. There is none
    for prompt lookup, where the number of drafts depends on the text, nor for `auto` and `greedy`.
    """
    if not isinstance(contestant, EnsembleContestant) or np.isnan(costs.seconds[ensemble.weights > 0]).any():
        return None
    plan = None
    if contestant.draft in ensemble.names and (drafted := sum(run.drafted for run in runs)):
        draft = ensemble.names.index(contestant.draft)
        plan = DraftPlan(draft, contestant.settings.block, sum(run.accepted for run in runs) / drafted)
    match contestant.method:
        case "single":
            seconds = costs(ensemble.names.index(contestant.members[0]))
        case "conventional":
            seconds = conventional_seconds(ensemble.weights, costs)
        case "mixture":
            seconds = mixture_seconds(ensemble.weights, costs)
        case "speculative" if plan is not None:
            seconds = speculative_seconds(ensemble.weights, costs, plan)
        case "drafted" if plan is not None:
            seconds = drafted_greedy_seconds(ensemble.weights, costs, plan)
        case _:
            return None
    return 1 / seconds if seconds else None


def speed_ratios(ensemble: Ensemble, runs: Mapping[str, Sequence[TimedRun]]) -> dict[str, float]:
    """Return speed ratios by name, such as "mixture/conventional". runs: by label.

    Each method of the whole ensemble is compared with `conventional`, `mixture` and each "single NAME", and drafted
    with greedy. `mixture` is also compared with the members' own speeds, weighted by how often each is sampled
    ("mixture/single", also by bytes), and with the speed that its forwards alone would allow ("mixture/forwards").
    """
    singles = [f"single {name}" for name in ensemble.names]
    ratios: dict[str, float] = {}
    if "mixture" in runs:
        ratios |= _of_mixture(ensemble, runs, singles)
    for label, repeats in runs.items():
        if label in singles:
            continue
        bases = [plain for plain in _PLAIN if label not in (plain, "conventional")]
        bases += ["greedy"] if label == "drafted" else []
        for base in [*bases, *singles]:
            if base in runs:
                ratios[f"{label}/{base}"] = speed_ratio(repeats, runs[base])
    return ratios


def rival_ratios(runs: Mapping[str, Sequence[TimedRun]], rivals: Sequence[str]) -> dict[str, float]:
    """Return the ratio of each method to each rival, and of each member alone to its own rival.

    runs: by label, the rivals' included.
    """
    methods = [label for label in runs if label not in rivals]
    return {
        f"{label}/{rival}": speed_ratio(runs[label], runs[rival])
        for rival in rivals
        for label in methods
        if not label.startswith("single ") or label.removeprefix("single ") == rival.removeprefix("transformers ")
    }


def speed_ratio(runs: Sequence[TimedRun], base_runs: Sequence[TimedRun]) -> float:
    """Return the median ratio of tokens per second."""
    return median(run.speed / base_run.speed for run, base_run in zip(runs, base_runs, strict=True))


def _of_mixture(ensemble: Ensemble, runs: Mapping[str, Sequence[TimedRun]], singles: Sequence[str]) -> dict[str, float]:
    mixture = runs["mixture"]
    ratios: dict[str, float] = {}
    if "conventional" in runs:
        ratios["mixture/conventional"] = speed_ratio(mixture, runs["conventional"])
    if all(single in runs for single in singles):
        members = [runs[single] for single in singles]

        def weighted(cost: Callable[[TimedRun], float]) -> float:
            """Return the mixture's speed over the members' weighted speeds. cost: seconds per unit of text."""
            weights: list[float] = ensemble.weights.tolist()
            return median(
                sum(w * cost(member[i]) for w, member in zip(weights, members, strict=True)) / cost(mixed)
                for i, mixed in enumerate(mixture)
            )

        if not ensemble.unit.traits.counts_bytes:  # a byte is not as long as the members' own tokens
            ratios["mixture/single"] = weighted(lambda run: run.seconds / run.tokens)
        ratios["mixture/single (bytes)"] = weighted(lambda run: run.seconds / max(run.bytes, 1))
    ratios["mixture/forwards"] = median(run.inside / run.seconds for run in mixture)
    return ratios
