"""Runs that can be compared: the same prompt and number of tokens for every method, taken in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypedDict, Unpack

import numpy as np

from mixlm.benchmark.prediction import ForwardCosts, predicted_speed
from mixlm.benchmark.ratios import rival_ratios, speed_ratios
from mixlm.benchmark.report import BenchReport, MethodRun, environment
from mixlm.benchmark.timing import DEFAULT, Contestant, TimedRun, contestants
from mixlm.core.options import Options
from mixlm.engines.base import Forward
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError

Progress = Callable[[str, int, int], None]
PROMPT = "Explain how a suspension bridge carries its load, and why the towers are so tall."
_WARM_UP = 8  # tokens


class BenchFields(TypedDict, total=False):
    """What is measured, and how much of it; see `Plan`."""

    tokens: int
    repeats: int
    prompt: str
    methods: Sequence[str]


@dataclass(frozen=True)
class BenchPlan:
    """What is measured.

    tokens: of a run. methods: of `timing.KINDS`, `single` for each member alone.
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
    **amount: Unpack[BenchFields],
) -> BenchReport:
    """Measure methods: by default each member alone, conventional and mixture. End-of-text is masked.

    plan: what is measured; or `amount`, the fields of a plan by name, over the plan's.
    Ratios are medians over repeats of the ratio within a repeat. progress: called with the method, runs done, runs.
    rivals: measured in turn with the methods, such as another library with the same models.
    Raises ConfigError for amounts and methods that cannot be.
    """
    plan = replace(plan or BenchPlan(), **amount)
    given: dict[str, Any] = {"seed": 0, **(options or {})}
    own = contestants(ensemble, plan.methods, plan.prompt, given)
    those: list[Contestant] = [*own, *rivals]
    samples = run_interleaved(those, plan, progress)
    fit = ForwardCosts.of(ensemble, those, samples)
    runs = [
        _run(one, taken, predicted_speed(ensemble, one, taken, fit)) for one, taken in zip(those, samples, strict=True)
    ]
    by_label = {one.label: taken for one, taken in zip(those, samples, strict=True)}
    return BenchReport(
        tuple(runs),
        {
            **speed_ratios(ensemble, {one.label: by_label[one.label] for one in own}),
            **rival_ratios(by_label, [one.label for one in rivals]),
        },
        environment([one.engine for one in ensemble.members], settings_record(ensemble, plan, given)),
    )


def run_interleaved(
    those: Sequence[Contestant], plan: BenchPlan, progress: Progress | None = None
) -> list[list[TimedRun]]:
    """Run all of them once, then again, and so on: what changes on the machine meanwhile meets all of them."""
    samples: list[list[TimedRun]] = [[] for _ in those]
    total = (plan.repeats + 1) * len(those)
    for repeat in range(plan.repeats + 1):
        for at, one in enumerate(those):
            if progress is not None:
                progress(one.label, repeat * len(those) + at, total)
            sample = one.measure(repeat, plan.tokens if repeat else min(_WARM_UP, plan.tokens))
            if repeat:  # the first round only warms up
                samples[at].append(sample)
    if progress is not None:
        progress("", total, total)
    return samples


def settings_record(ensemble: Ensemble, plan: BenchPlan, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured, for reports."""
    settings = ensemble.settings(**{name: value for name, value in options.items() if name != "draft"})
    return {
        "tokens": plan.tokens,
        "repeats": plan.repeats,
        "prompt": plan.prompt,
        "unit": ensemble.unit.name,
        "weights": dict(zip(ensemble.names, ensemble.weights.tolist(), strict=True)),
        "sampling": dict(settings.sampling),
        "block": settings.block,
        "seed": settings.seed,
    }


def _run(one: Contestant, taken: Sequence[TimedRun], expected: float | None) -> MethodRun:
    outside = [cost for sample in taken for cost in sample.outside]
    quarter = max(taken[0].tokens // 4, 1)
    logs = [[f for sample in taken for f in sample.forwards[i]] for i in range(len(one.members))]
    checked = sum(sample.checked for sample in taken)
    return MethodRun(
        method=one.method,
        label=one.label,
        tokens=sum(sample.tokens for sample in taken) / len(taken),
        members=one.members,
        tokens_per_second=median(sample.speed for sample in taken),
        bytes_per_second=median(sample.bytes / sample.seconds for sample in taken),
        seconds_to_first_token=median(sample.first for sample in taken),
        forwards={name: len(log) / len(taken) for name, log in zip(one.members, logs, strict=True)},
        seconds_by_forward_length={name: _by_length(log) for name, log in zip(one.members, logs, strict=True)},
        outside_forwards_share=median(1 - s.inside / s.seconds for s in taken) if outside else None,
        outside_forwards_ms=_milliseconds(outside),
        outside_forwards_ms_first_quarter=_milliseconds([cost for s in taken for cost in s.outside[:quarter]]),
        outside_forwards_ms_last_quarter=_milliseconds([cost for s in taken for cost in s.outside[-quarter:]]),
        draft=one.draft,
        checked=checked,
        accepted=sum(sample.accepted for sample in taken),
        chosen=taken[-1].chosen,
        predicted_tokens_per_second=expected,
        memory_bytes=max((sample.memory for sample in taken if sample.memory is not None), default=None),
        slowest_tokens_per_second=min(sample.speed for sample in taken),
        fastest_tokens_per_second=max(sample.speed for sample in taken),
    )


def _milliseconds(seconds: Sequence[float]) -> float | None:
    return 1e3 * median(seconds) if seconds else None


def _by_length(log: Sequence[Forward]) -> dict[int, float]:
    """Return the mean seconds of a forward by the number of tokens it ran; of those whose seconds are known."""
    lengths = sorted({one.tokens for one in log if one.seconds})
    return {n: float(np.mean([one.seconds for one in log if one.tokens == n])) for n in lengths}
