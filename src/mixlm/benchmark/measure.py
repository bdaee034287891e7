"""Comparable runs: the same prompt and number of tokens for every method, interleaved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypedDict, Unpack

import numpy as np

from mixlm.benchmark.prediction import measured_costs, predicted_speed
from mixlm.benchmark.ratios import rival_ratios, speed_ratios
from mixlm.benchmark.report import BenchReport, MethodRun, environment
from mixlm.benchmark.timing import DEFAULT, Contestant, TimedRun, contestants
from mixlm.core.options import Options
from mixlm.engines.requests import Forward
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.terminal import Progress

PROMPT = "Explain how a suspension bridge carries its load, and why the towers are so tall."
_WARM_UP = 8  # tokens


class BenchFields(TypedDict, total=False):
    """The fields of a `BenchPlan` by name."""

    tokens: int
    repeats: int
    prompt: str
    methods: Sequence[str]


@dataclass(frozen=True)
class BenchPlan:
    """What is measured.

    Args:
        tokens: Tokens of each run.
        repeats: Runs of each method, after one to warm up.
        prompt: The prompt.
        methods: Methods out of `timing.KINDS`; `single` stands for each member alone.
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
    **fields: Unpack[BenchFields],
) -> BenchReport:
    """Measure the speed of methods: by default each member alone, conventional and mixture. End-of-text is masked.

    Args:
        ensemble: The ensemble.
        plan: What is measured.
        options: Generation options of every run.
        progress: Called with the label of a run, the number of finished runs, and the number of all runs.
        rivals: Measured interleaved with the methods, such as another library with the same models.
        **fields: Fields of the plan, in place of the plan's own.

    Returns:
        The report. Ratios are medians over repeats of the ratio within a repeat.

    Raises:
        ConfigError: The plan or the options are invalid.
    """
    plan = replace(plan or BenchPlan(), **fields)
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
    """Return the settings of the runs, for reports."""
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
