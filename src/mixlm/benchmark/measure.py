"""Runs that can be compared: the same prompt and number of tokens for every method, taken in turns.

A run first reads the prompt (time to first token), then lets every member read it, so that what follows is decoding
alone; of that, the time inside forwards is known from the sessions, and the rest is what mixlm itself costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from mixlm.benchmark.report import BenchReport, Run, environment
from mixlm.config import Method, methods_of
from mixlm.engines.base import Forward
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.noise import Noise
from mixlm.settings import Options

Progress = Callable[[str, int, int], None]
PROMPT = "Explain how a suspension bridge carries its load, and why the towers are so tall."


@dataclass(frozen=True, slots=True)
class _Sample:
    """One timed run: seconds of decoding, of the first token, and each step's time outside forwards."""

    seconds: float
    first: float
    bytes: int
    outside: list[float]
    forwards: list[list[Forward]]

    @property
    def inside(self) -> float:
        return sum(one.seconds for member in self.forwards for one in member)


def bench(
    ensemble: Ensemble,
    *,
    tokens: int = 64,
    repeats: int = 5,
    prompt: str = PROMPT,
    options: Options | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure each member alone, conventional and mixture. End-of-text is masked, so that every run is as long.

    Ratios are medians over repeats of the ratio within a repeat. progress: called with the method, runs done, runs.
    """
    for name, value, least in (("tokens", tokens, 4), ("repeats", repeats, 1)):
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be {least} or more")
    given: dict[str, Any] = {"seed": 0, **(options or {}), "ignore_end": True}
    kinds: list[tuple[Method, int | None]] = [("single", i) for i in range(len(ensemble.members))]
    kinds += [(one, None) for one in ("conventional", "mixture") if one in methods_of(ensemble.unit.name)]
    samples: list[list[_Sample]] = [[] for _ in kinds]
    for repeat in range(repeats + 1):
        for at, (method, member) in enumerate(kinds):
            if progress is not None:
                progress(_label(ensemble, method, member), repeat * len(kinds) + at, (repeats + 1) * len(kinds))
            one = ensemble if member is None else _alone(ensemble, member)
            sample = _measure(one, method, prompt, {**given, "sequence": repeat}, tokens if repeat else 4)
            if repeat:  # the first round only warms up
                samples[at].append(sample)
    if progress is not None:
        progress("", (repeats + 1) * len(kinds), (repeats + 1) * len(kinds))
    runs = [
        _run(method, [ensemble.names[member]] if member is not None else list(ensemble.names), taken, tokens)
        for (method, member), taken in zip(kinds, samples, strict=True)
    ]
    ratios = _ratios(ensemble, samples)
    settings = ensemble.settings(**given)
    recorded = {
        "tokens": tokens,
        "repeats": repeats,
        "prompt": prompt,
        "unit": ensemble.unit.name,
        "weights": dict(zip(ensemble.names, ensemble.weights.tolist(), strict=True)),
        "sampling": dict(settings.sampling),
        "seed": settings.seed,
    }
    return BenchReport(tuple(runs), ratios, environment([one.engine for one in ensemble.members], recorded))


def _alone(ensemble: Ensemble, member: int) -> Ensemble:
    """Return one member as an ensemble of its own."""
    return Ensemble([ensemble.members[member]], defaults=ensemble.defaults)


def _label(ensemble: Ensemble, method: str, member: int | None) -> str:
    return method if member is None else f"{method} {ensemble.names[member]}"


def _measure(ensemble: Ensemble, method: Method, prompt: str, options: dict[str, Any], tokens: int) -> _Sample:
    settings = ensemble.settings(**{**options, "method": method})
    prompts = ensemble.prompts(prompt, settings)
    sessions = [one.engine.session() for one in ensemble.members]
    writer = ensemble.writer(settings, sessions)
    start = time.perf_counter()
    writing = writer.begin(prompts)
    [choice] = writer.choose(writing, Noise(settings.seed, settings.sequence, 0))
    first = time.perf_counter() - start
    for i, session in enumerate(sessions):
        session.logits(writing.state.ids(i))
    writing.append(choice)
    before = [len(one.work.log) for one in sessions]
    size, outside = 0, []
    begin = step = time.perf_counter()
    position = 1
    while position <= tokens:
        seen = [len(one.work.log) for one in sessions]
        noise = Noise(settings.seed, settings.sequence, position)
        for choice in writer.choose(writing, noise, tokens + 1 - position):
            writing.append(choice)
            size += len(ensemble.unit.data(choice.symbol))
            position += 1
        now = time.perf_counter()
        inside = sum(f.seconds for one, n in zip(sessions, seen, strict=True) for f in one.work.log[n:])
        outside.append(now - step - inside)
        step = now
    forwards = [one.work.log[n:] for one, n in zip(sessions, before, strict=True)]
    return _Sample(step - begin, first, size, outside, forwards)


def _run(method: Method, members: list[str], taken: list[_Sample], tokens: int) -> Run:
    outside = [one for sample in taken for one in sample.outside]
    quarter = max(tokens // 4, 1)
    logs = [[f for sample in taken for f in sample.forwards[i]] for i in range(len(members))]
    return Run(
        method=method,
        members=tuple(members),
        tokens_per_second=median(tokens / one.seconds for one in taken),
        bytes_per_second=median(one.bytes / one.seconds for one in taken),
        seconds_to_first_token=median(one.first for one in taken),
        forwards={name: len(log) / len(taken) for name, log in zip(members, logs, strict=True)},
        seconds_by_forward_length={name: _by_length(log) for name, log in zip(members, logs, strict=True)},
        outside_forwards_share=median(1 - one.inside / one.seconds for one in taken),
        outside_forwards_ms=1e3 * median(outside),
        outside_forwards_ms_first_quarter=1e3 * median(one for s in taken for one in s.outside[:quarter]),
        outside_forwards_ms_last_quarter=1e3 * median(one for s in taken for one in s.outside[-quarter:]),
    )


def _by_length(log: list[Forward]) -> dict[int, float]:
    """Return the mean seconds of a forward by the number of tokens it ran."""
    lengths = sorted({one.tokens for one in log})
    return {n: float(np.mean([one.seconds for one in log if one.tokens == n])) for n in lengths}


def _ratios(ensemble: Ensemble, samples: list[list[_Sample]]) -> dict[str, float]:
    """Return mixture's speed over conventional's, over the members' weighted own, and over what forwards allow.

    Those that mean nothing in the ensemble's unit are left out: bytes are not as long as members' own tokens.
    """
    singles, conventional, mixture = samples[: len(ensemble.members)], samples[len(ensemble.members)], samples[-1]
    at_once, alone, alone_bytes, forwards = [], [], [], []
    for at, mixed in enumerate(mixture):
        at_once.append(conventional[at].seconds / mixed.seconds)
        weighted = sum(w * own[at].seconds for w, own in zip(ensemble.weights, singles, strict=True))
        alone.append(weighted / mixed.seconds)
        by_byte = sum(
            w * own[at].seconds / max(own[at].bytes, 1) for w, own in zip(ensemble.weights, singles, strict=True)
        )
        alone_bytes.append(by_byte * mixed.bytes / mixed.seconds)
        forwards.append(mixed.inside / mixed.seconds)
    return {
        **({} if conventional is mixture else {"mixture/conventional": median(at_once)}),
        **({} if ensemble.unit.name == "byte" else {"mixture/single": median(alone)}),
        "mixture/single (bytes)": median(alone_bytes),
        "mixture/forwards": median(forwards),
    }
