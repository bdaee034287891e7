"""What an ensemble is like when its members run: how far they agree on a text, and what their forwards cost.

    single        1 / c_i(1)
    conventional  1 / Σ_i c_i(1)
    mixture       1 / Σ_i λ_i c_i(1 / λ_i)

are the tokens a second that forwards alone allow, where `c_i(q)` are the seconds of a forward of q tokens behind a
cache: member i is drawn every 1/λ_i tokens on average, and then reads as many. What mixlm itself costs is not in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import median

import numpy as np

from mixlm.config import supported_methods
from mixlm.core.sampling import softmax
from mixlm.engines import Engine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.inspection.report import Cost, PairReport, Speed
from mixlm.inspection.static import having
from mixlm.scoring.passages import beginning
from mixlm.scoring.score import spelling
from mixlm.types import Floats, Ids, Logits
from mixlm.units.piece import PieceUnit

Progress = Callable[[str, int, int], None]
LENGTHS = (1, 2, 4, 8, 16)
_CACHED = 128  # tokens behind which forwards are timed
_REPEATS = 3
_WINDOW = 96  # bytes of text whose distributions lie in memory at once


def agreement(
    ensemble: Ensemble, data: bytes, found: Sequence[PairReport], progress: Progress | None = None
) -> tuple[PairReport, ...]:
    """Let every member read a text once, and measure masses and distances between them.

    found: the pairs as they were counted. Raises ConfigError for a text that a member's tokens do not spell.
    """
    engines = [one.engine for one in ensemble.members]
    unit = PieceUnit([one.vocabulary for one in engines], [one.encoder for one in engines])
    symbols = [unit.symbols(i) for i in range(len(engines))]
    readers = [_Reader(engine, own, unit.end + 1, data) for engine, own in zip(engines, symbols, strict=True)]
    has = having(symbols, unit.end + 1)
    count = len(engines)
    masses = np.zeros((count, count))
    distances: dict[tuple[int, int], list[float]] = {pair: [] for pair in combinations(range(count), 2)}
    windows = range(0, len(data) + 1, _WINDOW)
    for number, start in enumerate(windows):
        laws = [one.laws(start, start + _WINDOW) for one in readers]
        for i, mine in enumerate(laws):
            for law in mine.values():
                masses[i] += [law[other].sum() for other in has]
        for i, j in distances:
            both = laws[i].keys() & laws[j].keys()
            distances[i, j] += [0.5 * float(np.abs(laws[i][at] - laws[j][at]).sum()) for at in sorted(both)]
        if progress is not None:
            progress("reading the sample text", number + 1, len(windows))
    masses /= [[len(one.ends)] for one in readers]
    return tuple(
        replace(
            pair,
            mass=(float(masses[i, j]), float(masses[j, i])),
            distance=float(np.mean(distances[i, j])),
            places=len(distances[i, j]),
        )
        for pair, (i, j) in zip(found, distances, strict=True)
    )


class _Reader:
    """One member reading a text. ends: where in it, in bytes, each of its distributions stands; the first is 0."""

    def __init__(self, engine: Engine, symbols: Ids, size: int, data: bytes) -> None:
        own, bounds = spelling(engine, data)
        before = beginning(engine)
        self._ids = np.array([*before, *own], dtype=np.int64)
        if len(self._ids) > engine.context_length:
            raise ConfigError(
                f"the sample text has {len(self._ids)} tokens for {engine.name}, whose context holds "
                f"{engine.context_length}",
                "give a shorter one",
            )
        self.ends = np.array([0, *bounds], dtype=np.int64)
        self._before = len(before)
        self._drawable = np.flatnonzero(symbols >= 0)
        self._symbols = symbols[self._drawable]
        self._size = size
        self._session = engine.session()

    def laws(self, start: int, end: int) -> dict[int, Floats]:
        """Return the distributions over shared symbols that stand in data[start:end], each float64 (size,)."""
        first, last = (int(at) for at in np.searchsorted(self.ends, [start, end]))
        if first == last:
            return {}
        logits = self._session.logits(self._ids[: self._before + last - 1], last - first)
        return {int(at): self._law(row) for at, row in zip(self.ends[first:last].tolist(), logits, strict=True)}

    def _law(self, logits: Logits) -> Floats:
        law: Floats = np.zeros(self._size)
        np.add.at(law, self._symbols, softmax(logits[self._drawable]))
        return law


def costs(ensemble: Ensemble, data: bytes, progress: Progress | None = None) -> tuple[Cost, ...]:
    """Time forwards of 1, 2, 4, 8 and 16 tokens of each member behind a cache; a shared engine is timed once."""
    known: dict[int, Cost] = {}
    out = []
    for i, one in enumerate(ensemble.members):
        if id(one.engine) not in known:
            known[id(one.engine)] = _cost(one.engine, data)
        out.append(replace(known[id(one.engine)], member=one.name))
        if progress is not None:
            progress("timing forwards", i + 1, len(ensemble.members))
    return tuple(out)


def _cost(engine: Engine, data: bytes) -> Cost:
    cached = min(_CACHED, engine.context_length - LENGTHS[-1])
    if cached < 2:
        raise ConfigError(f"the context of {engine.name} holds {engine.context_length} tokens, too few to time it")
    # What is read does not matter here, only how much.
    ids = np.resize(spelling(engine, data)[0], cached + LENGTHS[-1]).astype(np.int64)
    session = engine.session()
    seconds: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for repeat in range(_REPEATS + 1):
        for length in LENGTHS:
            session.logits(ids[:cached])
            session.logits(ids[: cached + length])
            if repeat:  # the first round only warms up
                seconds[length].append(session.stats.forwards[-1].seconds)
    return Cost(engine.name, cached, {length: median(taken) for length, taken in seconds.items()})


def forward_seconds(cost: Cost, tokens: float) -> float:
    """Return what a forward of `tokens` tokens should take: between measured lengths and beyond them, a straight line.

    A line that falls, which is noise, is taken as level.
    """
    lengths = np.array(sorted(cost.seconds), dtype=np.float64)
    taken = np.array([cost.seconds[int(length)] for length in lengths])
    if tokens <= lengths[-1] or len(lengths) == 1:
        return float(np.interp(tokens, lengths, taken))
    slope = max(float(taken[-1] - taken[0]) / float(lengths[-1] - lengths[0]), 0.0)
    return float(taken[-1] + slope * (tokens - lengths[-1]))


def predicted(names: Sequence[str], weights: Floats, found: Sequence[Cost], unit: str = "piece") -> tuple[Speed, ...]:
    """Return the speeds that forwards alone allow: each member alone, conventional, mixture.

    As far as the unit has them. In `word` a token is taken for one forward, which it is but for what guesses of the
    ends of words lose; how many forwards a token takes in `byte` depends on the text, and nothing is promised.
    """
    once = [forward_seconds(one, 1) for one in found]
    drawn = [i for i, weight in enumerate(weights) if weight > 0]
    mixture = sum(float(weights[i]) * forward_seconds(found[i], 1 / float(weights[i])) for i in drawn)
    singles = [Speed("single", (name,), _per_second(seconds)) for name, seconds in zip(names, once, strict=True)]
    together = {"conventional": sum(once[i] for i in drawn)} if "conventional" in supported_methods(unit) else {}
    if unit != "byte":
        together["mixture"] = mixture
    return (*singles, *(Speed(name, tuple(names), _per_second(cost)) for name, cost in together.items()))


def _per_second(seconds: float) -> float:
    return 1 / max(seconds, 1e-9)


def with_measured(speeds: Sequence[Speed], measured: Mapping[tuple[str, tuple[str, ...]], float]) -> tuple[Speed, ...]:
    """Return predictions with what was measured beside them."""
    return tuple(replace(one, measured=measured.get((one.method, one.members))) for one in speeds)
