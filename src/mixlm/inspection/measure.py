"""Measure an ensemble: how far its members agree on a text, and what their forward passes cost.

    single        1 / c_i(1)
    conventional  1 / Σ_i c_i(1)
    mixture       1 / Σ_i λ_i c_i(1 / λ_i)

are the tokens per second that forward passes alone allow, where `c_i(q)` is the time of a forward pass of q tokens
after a cached prefix: member i is sampled every 1/λ_i tokens on average, and then has to catch up on as many. The
overhead of mixlm itself is not included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from statistics import median

import numpy as np

from mixlm.decoding.cost_model import conventional_seconds, mixture_seconds
from mixlm.engines import Engine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.generation.rule_prompt_logprobs import symbol_probabilities
from mixlm.inspection.report import ForwardCost, PairReport, SpeedEstimate
from mixlm.inspection.static import shared_symbols
from mixlm.scoring.passages import text_prefix
from mixlm.terminal import Progress
from mixlm.tokenization.segments import common_boundaries, encode_exactly
from mixlm.types import Floats, Ids
from mixlm.units.base import PIECE_TRAITS, UnitTraits
from mixlm.units.piece import PieceUnit

LENGTHS = (1, 2, 4, 8, 16)
_CACHED = 128  # tokens in the KV cache when forward passes are timed
_REPEATS = 3
_WINDOW = 96  # bytes of text whose distributions are in memory at once


def measure_agreement(
    ensemble: Ensemble, data: bytes, pairs: Sequence[PairReport], progress: Progress | None = None
) -> tuple[PairReport, ...]:
    """Run every member on a text once, and compare their distributions.

    Args:
        ensemble: The members.
        data: The text.
        pairs: The pairs of members with their shared vocabulary, from `compare_vocabularies`.
        progress: Called with the progress.

    Returns:
        The pairs with the shared probability mass and the distance between their distributions.

    Raises:
        ConfigError: A member's tokens cannot spell the text, or its context is too short.
    """
    engines = [member.engine for member in ensemble.members]
    unit = PieceUnit([engine.vocabulary for engine in engines], [engine.encoder for engine in engines])
    symbols = [unit.symbols(i) for i in range(len(engines))]
    readers = [
        _TextDistributions(engine, ids, unit.end + 1, data) for engine, ids in zip(engines, symbols, strict=True)
    ]
    present = shared_symbols(symbols, unit.end + 1)
    count = len(engines)
    masses = np.zeros((count, count))
    distances: dict[tuple[int, int], list[float]] = {pair: [] for pair in combinations(range(count), 2)}
    common = {(i, j): common_boundaries([readers[i].ends, readers[j].ends]) for i, j in distances}
    windows = range(0, len(data) + 1, _WINDOW)
    for number, start in enumerate(windows):
        rows = [reader.distributions(start, start + _WINDOW) for reader in readers]
        for i, row in enumerate(rows):
            for distribution in row.values():
                masses[i] += [distribution[symbols_of_other].sum() for symbols_of_other in present]
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


def measure_costs(ensemble: Ensemble, data: bytes, progress: Progress | None = None) -> tuple[ForwardCost, ...]:
    """Time forward passes of 1, 2, 4, 8 and 16 tokens of each member; a shared engine is timed once."""
    costs: dict[int, ForwardCost] = {}
    for i, member in enumerate(ensemble.members):
        if id(member.engine) not in costs:
            costs[id(member.engine)] = _measure_cost(member.engine, data)
        if progress is not None:
            progress("timing forward passes", i + 1, len(ensemble.members))
    return tuple(replace(costs[id(member.engine)], member=member.name) for member in ensemble.members)


def _measure_cost(engine: Engine, data: bytes) -> ForwardCost:
    cached = min(_CACHED, engine.context_length - LENGTHS[-1])
    if cached < 2:
        raise ConfigError(f"the context length of {engine.name} is {engine.context_length}, too short to time it")
    # The time depends on the number of tokens, not on which they are.
    text_ids, _ = encode_exactly(engine.encoder, engine.vocabulary, data, engine.name)
    ids = np.resize(text_ids, cached + LENGTHS[-1]).astype(np.int64)
    session = engine.session()
    seconds: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for repeat in range(_REPEATS + 1):
        for length in LENGTHS:
            session.logits(ids[:cached])
            session.logits(ids[: cached + length])
            if repeat:  # the first round is a warm-up
                seconds[length].append(session.stats.forwards[-1].seconds)
    return ForwardCost(engine.name, cached, {length: median(times) for length, times in seconds.items()})


def forward_seconds(cost: ForwardCost, tokens: float) -> float:
    """Predict the time of a forward pass of `tokens` tokens, by linear interpolation and extrapolation.

    A negative slope, which is noise, counts as zero.
    """
    lengths = np.array(sorted(cost.seconds), dtype=np.float64)
    seconds = np.array([cost.seconds[int(length)] for length in lengths])
    if tokens <= lengths[-1] or len(lengths) == 1:
        return float(np.interp(tokens, lengths, seconds))
    slope = max(float(seconds[-1] - seconds[0]) / float(lengths[-1] - lengths[0]), 0.0)
    return float(seconds[-1] + slope * (tokens - lengths[-1]))


def predict_speeds(
    names: Sequence[str], weights: Floats, costs: Sequence[ForwardCost], traits: UnitTraits = PIECE_TRAITS
) -> tuple[SpeedEstimate, ...]:
    """Predict the speeds that forward passes alone allow: each member alone, conventional, mixture.

    Covers the methods that the unit supports. In `word`, a token counts as one forward pass, which ignores rejected
    drafts of word ends; in `byte`, the number of forward passes depends on the text, so `mixture` is not predicted.
    """

    def seconds(member: int, tokens: float = 1) -> float:
        return forward_seconds(costs[member], tokens)

    singles = [SpeedEstimate("single", (name,), _per_second(seconds(i))) for i, name in enumerate(names)]
    together = {}
    if "conventional" in traits.methods:
        together["conventional"] = conventional_seconds(weights, seconds)
    if not traits.counts_bytes:
        together["mixture"] = mixture_seconds(weights, seconds)
    return (*singles, *(SpeedEstimate(name, tuple(names), _per_second(cost)) for name, cost in together.items()))


def _per_second(seconds: float) -> float:
    return 1 / max(seconds, 1e-9)
