"""The laws of published rules, written down once more as plain sums: what their strategies are checked against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mixlm.config import Rule
from mixlm.core.sampling import dense
from mixlm.decoding.gac import strings
from mixlm.engines import Engine
from mixlm.errors import TokenizerError
from mixlm.types import Floats, Ids, Sampling


class Part(NamedTuple):
    """A member at one position: its weight, its distribution over its own ids, float64 (vocab,), and their symbols."""

    weight: float
    probs: Floats
    symbols: Ids
    engine: Engine


def law(rule: Rule, parts: Sequence[Part], size: int, after: Sampling) -> Floats:
    """Return a rule's law over shared symbols, float64 (size,). after: what is applied to its average."""
    return (_gac if rule == "gac" else _unite)(parts, size, after)


def _gac(parts: Sequence[Part], size: int, after: Sampling) -> Floats:
    average: dict[str, float] = {}
    stands: dict[str, int] = {}
    for one in parts:
        spelled = strings(one.engine.vocabulary)
        for i in np.flatnonzero(one.symbols >= 0).tolist():
            stands.setdefault(spelled[i], int(one.symbols[i]))
            average[spelled[i]] = average.get(spelled[i], 0.0) + one.weight * float(one.probs[i])
    out = np.zeros(size)
    chosen = _after(np.array(list(average.values())), after)
    np.add.at(out, [stands[one] for one in average], chosen)
    return out


def _unite(parts: Sequence[Part], size: int, after: Sampling) -> Floats:
    laws = []
    for one in parts:
        mine = np.zeros(size)
        np.add.at(mine, one.symbols[one.symbols >= 0], one.probs[one.symbols >= 0])
        laws.append(mine)
    union: set[int] = set()
    for one, mine in zip(parts, laws, strict=True):
        if one.weight > 0:
            least = np.sort(mine)[-min(after.top_k, size)]
            union |= {u for u in range(size) if mine[u] >= max(least, 1e-300)}
    average = np.zeros(size)
    for one, mine in zip(parts, laws, strict=True):
        own = {int(u) for u in one.symbols if u >= 0}
        read = {u: float(mine[u]) if u in own else _first(one, mine, _data(parts, u)) for u in union}
        for u in union:
            average[u] += one.weight * read[u] / sum(read.values())
    return _after(average, replace(after, top_k=0))


def _data(parts: Sequence[Part], symbol: int) -> bytes:
    return next(
        one.engine.vocabulary.tokens[i] for one in parts for i in np.flatnonzero(one.symbols == symbol).tolist()
    )


def _first(part: Part, mine: Floats, data: bytes) -> float:
    """Return the probability of the first token that a member spells some bytes with."""
    try:
        ids = part.engine.encoder.encode(data).ids
    except TokenizerError:
        return 0.0
    return float(mine[part.symbols[ids[0]]]) if ids and part.symbols[ids[0]] >= 0 else 0.0


def _after(average: Floats, after: Sampling) -> Floats:
    if after.temperature == 0:
        chosen = np.zeros(len(average))
        chosen[int(np.argmax(average))] = 1.0
        return chosen
    with np.errstate(divide="ignore"):
        return dense(np.log(average), after, np.zeros(0, dtype=np.int64))
