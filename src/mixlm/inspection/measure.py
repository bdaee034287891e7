"""Measure an ensemble: how far its members agree on a text, and what their forward passes cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from mixlm.decoding.cost_model import conventional_seconds, fit_forward_costs, mixture_seconds
from mixlm.engines import Engine
from mixlm.engines.requests import Forward
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.generation.prompt_logprobs import symbol_probabilities
from mixlm.inspection.static import PairReport, RuleReport
from mixlm.scoring.passages import text_prefix
from mixlm.terminal import Progress
from mixlm.tokenization.segments import common_boundaries, encode_exactly
from mixlm.types import Floats, Ids, Usage
from mixlm.units.piece import PieceUnit

LENGTHS = (1, 2, 4, 8, 16)
_CACHED = 128  # tokens in the KV cache when forward passes are timed
_REPEATS = 3
_RULE_TOKENS = 32
_WINDOW = 96  # bytes of text whose distributions are in memory at once


@dataclass(frozen=True, slots=True)
class ForwardCost:
    """Median seconds of a member's forward pass, by its number of tokens, after `cached` tokens."""

    member: str
    cached: int
    seconds: Mapping[int, float]

    @classmethod
    def of(cls, member: str, forwards: Sequence[Forward]) -> ForwardCost:
        """Return the medians of a member's timed forwards."""
        lengths = sorted({forward.tokens for forward in forwards})
        seconds = {n: median(forward.seconds for forward in forwards if forward.tokens == n) for n in lengths}
        return cls(member, forwards[0].cached, seconds)


@dataclass(frozen=True, slots=True)
class SpeedEstimate:
    """Tokens per second of a method: predicted from forward passes alone, and measured if there was a run."""

    method: str
    members: tuple[str, ...]
    predicted: float
    measured: float | None = None


def measure_agreement(
    ensemble: Ensemble, data: bytes, pairs: Sequence[PairReport], progress: Progress | None = None
) -> tuple[PairReport, ...]:
    """Run every member on a text once, and compare their distributions.

    Returns:
        The pairs, which `compare_vocabularies` made, with the shared probability mass and the distance.

    Raises:
        ConfigError: A member's tokens cannot spell the text, or its context is too short.
    """
    engines = [member.engine for member in ensemble.members]
    unit = PieceUnit([engine.vocabulary for engine in engines], [engine.encoder for engine in engines])
    symbols = [unit.symbols(i) for i in range(len(engines))]
    readers = [
        _TextDistributions(engine, ids, unit.end + 1, data) for engine, ids in zip(engines, symbols, strict=True)
    ]
    present = np.array([np.isin(np.arange(unit.end + 1), ids) for ids in symbols])  # bool (members, symbols)
    count = len(engines)
    masses = np.zeros((count, count))
    distances: dict[tuple[int, int], list[float]] = {pair: [] for pair in combinations(range(count), 2)}
    common = {(i, j): common_boundaries([readers[i].ends, readers[j].ends]) for i, j in distances}
    windows = range(0, len(data) + 1, _WINDOW)
    for number, start in enumerate(windows):
        rows = [reader.distributions(start, start + _WINDOW) for reader in readers]
        for i, row in enumerate(rows):
            for distribution in row.values():
                masses[i] += present @ distribution
        for i, j in distances:
            first, last = np.searchsorted(common[i, j], [start, start + _WINDOW])
            distances[i, j] += [
                0.5 * float(np.abs(rows[i][end] - rows[j][end]).sum()) for end in common[i, j][first:last].tolist()
            ]
        if progress is not None:
            progress("reading the sample text", number + 1, len(windows))
    masses /= [[len(reader.ends)] for reader in readers]
    return tuple(
        replace(
            pair,
            mass=(float(masses[i, j]), float(masses[j, i])),
            distance=float(np.mean(distances[i, j])),
            places=len(distances[i, j]),
        )
        for pair, (i, j) in zip(pairs, distances, strict=True)
    )


class _TextDistributions:
    """One member's next-token distributions along a text.

    Attributes:
        ends: The byte offset in the text at which each distribution applies; the first is 0.
    """

    def __init__(self, engine: Engine, symbols: Ids, size: int, data: bytes) -> None:
        ids, bounds = encode_exactly(engine.encoder, engine.vocabulary, data, engine.name)
        prefix = text_prefix(engine)
        self._ids = np.array([*prefix, *ids], dtype=np.int64)
        if len(self._ids) > engine.context_length:
            raise ConfigError(
                f"the sample text has {len(self._ids)} tokens for {engine.name}, whose context length is "
                f"{engine.context_length}",
                "give a shorter text",
            )
        self.ends = np.array([0, *bounds], dtype=np.int64)
        self._prefix = len(prefix)
        self._symbols = symbols
        self._size = size
        self._session = engine.session()

    def distributions(self, start: int, end: int) -> dict[int, Floats]:
        """Return the distributions over shared symbols in data[start:end] by byte offset, each float64 (size,)."""
        first, last = (int(index) for index in np.searchsorted(self.ends, [start, end]))
        if first == last:
            return {}
        logits = self._session.logits(self._ids[: self._prefix + last - 1], last - first)
        ends = self.ends[first:last].tolist()
        rows = (symbol_probabilities(row, self._symbols, self._size) for row in logits)
        return dict(zip(ends, rows, strict=True))


def time_forwards(ensemble: Ensemble, data: bytes, progress: Progress | None = None) -> list[list[Forward]]:
    """Time forward passes of 1, 2, 4, 8 and 16 tokens of each member; a shared engine is timed once."""
    logs: dict[int, list[Forward]] = {}
    for i, member in enumerate(ensemble.members):
        if id(member.engine) not in logs:
            logs[id(member.engine)] = _time_engine(member.engine, data)
        if progress is not None:
            progress("timing forward passes", i + 1, len(ensemble.members))
    return [logs[id(member.engine)] for member in ensemble.members]


def _time_engine(engine: Engine, data: bytes) -> list[Forward]:
    cached = min(_CACHED, engine.context_length - LENGTHS[-1])
    if cached < 2:
        raise ConfigError(f"the context length of {engine.name} is {engine.context_length}, too short to time it")
    # The time depends on the number of tokens, not on which they are.
    text_ids, _ = encode_exactly(engine.encoder, engine.vocabulary, data, engine.name)
    ids = np.resize(text_ids, cached + LENGTHS[-1]).astype(np.int64)
    session = engine.session()
    forwards = []
    for repeat in range(_REPEATS + 1):
        for length in LENGTHS:
            session.logits(ids[:cached])
            session.logits(ids[: cached + length])
            if repeat:  # the first round is a warm-up
                forwards.append(Forward(length, cached, session.stats.forwards[-1].seconds))
    return forwards


def predict_speeds(
    ensemble: Ensemble, weights: Floats, forwards: Sequence[Sequence[Forward]]
) -> tuple[SpeedEstimate, ...]:
    """Predict the speeds that timed forward passes alone allow: each member alone, conventional, mixture.

    Covers the methods that the unit supports. In `word`, a token counts as one forward pass, which ignores rejected
    drafts of word ends; in `byte`, the number of forward passes depends on the text, so `mixture` is not predicted.
    """
    names, traits, costs = ensemble.names, ensemble.unit.traits, fit_forward_costs(forwards)
    seconds: list[tuple[str, tuple[str, ...], float]] = [("single", (name,), costs(i)) for i, name in enumerate(names)]
    if "conventional" in traits.methods:
        seconds.append(("conventional", names, conventional_seconds(weights, costs)))
    if not traits.counts_bytes:
        seconds.append(("mixture", names, mixture_seconds(weights, costs)))
    return tuple(SpeedEstimate(method, members, 1 / max(cost, 1e-9)) for method, members, cost in seconds)


def measure_rule(ensemble: Ensemble, report: RuleReport, prompt: str, options: Mapping[str, Any]) -> RuleReport:
    """Return the report with the forwards and the speed of `layered`, beside `conventional`, in one short run each.

    The first run of each warms up. `layered` runs with drafts where they promise more, and once more without any.
    """
    written = {"seed": 0, **options, "stop": (), "max_tokens": _RULE_TOKENS, "ignore_end": True}

    def measure(method: str, draft: str | None = None) -> Usage:
        for _ in range(2):
            usage: Usage = ensemble.generate(prompt, **{**written, "method": method, "draft": draft}).usage
        return usage

    conventional, layered, without_drafts = measure("conventional"), measure("layered"), measure("layered", "none")
    others = max(len(ensemble.members) - 1, 1)
    return replace(
        report,
        tokens=_RULE_TOKENS,
        stopped=float(np.clip((len(ensemble.members) - _forwards(without_drafts)) / others, 0, 1)),
        forwards=_forwards(layered),
        drafted=layered.drafted,
        accepted=layered.accepted,
        tokens_per_second=layered.tokens_per_second,
        conventional_tokens_per_second=conventional.tokens_per_second,
    )


def _forwards(usage: Usage) -> float:
    """Return the forwards of a token, of all members."""
    return sum(member.forwards for member in usage.members.values()) / max(usage.tokens, 1)
