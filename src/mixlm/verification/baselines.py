"""The distributions of rules over spellings, `gac` and `unite`, as plain sums, to check their strategies against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mixlm.core.sampling import dense_distribution
from mixlm.engines import Engine
from mixlm.errors import TokenizerError
from mixlm.generation.spellings import token_strings
from mixlm.types import Floats, Ids, Sampling


class BaselineMember(NamedTuple):
    """A member at one position: its weight, its distribution over its own ids, float64 (vocab,), and their symbols."""

    weight: float
    probs: Floats
    symbols: Ids
    engine: Engine


def baseline_distribution(rule: str, parts: Sequence[BaselineMember], size: int, after: Sampling) -> Floats:
    """Return the distribution of `gac` or `unite`, float64 (size,). after: what is applied to its average."""
    return (_gac if rule == "gac" else _unite)(parts, size, after)


def _gac(parts: Sequence[BaselineMember], size: int, after: Sampling) -> Floats:
    average: dict[str, float] = {}
    symbol_of: dict[str, int] = {}
    for part in parts:
        spelled = token_strings(part.engine.vocabulary)
        for i in np.flatnonzero(part.symbols >= 0).tolist():
            symbol_of.setdefault(spelled[i], int(part.symbols[i]))
            average[spelled[i]] = average.get(spelled[i], 0.0) + part.weight * float(part.probs[i])
    out = np.zeros(size)
    chosen = _after(np.array(list(average.values())), after)
    np.add.at(out, [symbol_of[text] for text in average], chosen)
    return out


def _unite(parts: Sequence[BaselineMember], size: int, after: Sampling) -> Floats:
    distributions = []
    for part in parts:
        distribution = np.zeros(size)
        np.add.at(distribution, part.symbols[part.symbols >= 0], part.probs[part.symbols >= 0])
        distributions.append(distribution)
    union: set[int] = set()
    for part, distribution in zip(parts, distributions, strict=True):
        if part.weight > 0:
            threshold = np.sort(distribution)[-min(after.top_k, size)]
            union |= {u for u in range(size) if distribution[u] >= max(threshold, 1e-300)}
    average = np.zeros(size)
    for part, distribution in zip(parts, distributions, strict=True):
        own_symbols = {int(u) for u in part.symbols if u >= 0}
        probabilities = {
            u: float(distribution[u]) if u in own_symbols else _first(part, distribution, _data(parts, u))
            for u in union
        }
        for u in union:
            average[u] += part.weight * probabilities[u] / sum(probabilities.values())
    return _after(average, replace(after, top_k=0))


def _data(parts: Sequence[BaselineMember], symbol: int) -> bytes:
    return next(
        part.engine.vocabulary.tokens[i] for part in parts for i in np.flatnonzero(part.symbols == symbol).tolist()
    )


def _first(part: BaselineMember, distribution: Floats, data: bytes) -> float:
    """Return the probability of the first token that a member spells some bytes with."""
    try:
        ids = part.engine.encoder.encode(data).ids
    except TokenizerError:
        return 0.0
    return float(distribution[part.symbols[ids[0]]]) if ids and part.symbols[ids[0]] >= 0 else 0.0


def _after(average: Floats, after: Sampling) -> Floats:
    if after.temperature == 0:
        chosen = np.zeros(len(average))
        chosen[int(np.argmax(average))] = 1.0
        return chosen
    with np.errstate(divide="ignore"):
        return dense_distribution(np.log(average), after, np.zeros(0, dtype=np.int64))
