"""What a forward of each member costs, and what a token costs by each strategy: the model behind `auto`.

A forward of q tokens takes c·(1 + s·(q - 1)) seconds: at these lengths the weights are what has to be read, and a
further token costs little. With weights λ and the draft d, whose guesses are right with probability β, a block of m
checked positions yields (1 - β^(m+1)) / (1 - β) / (1 - λ_d) tokens, for (m + 1) / (1 - λ_d) - 1 forwards of the draft
and one forward of each member that has a position in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from mixlm.engines.base import Forward
from mixlm.types import Floats

_SLOPE = 0.02  # of a further token, until forwards of several lengths have been seen
_LOOKED_AT = 64  # forwards, the latest of each member
_SHORT = 16  # tokens; longer forwards are prompts and tell little about decoding


class Costs:
    """Seconds of a forward of each member, from its own log; from the size of its weights until it has run.

    logs: called for the members' logs as they stand. sizes: bytes of weights.
    """

    def __init__(self, logs: Callable[[], Sequence[Sequence[Forward]]], sizes: Sequence[int]) -> None:
        self._logs = logs
        self._sizes = [max(size, 1) for size in sizes]

    def measure(self) -> tuple[Floats, Floats]:
        """Return each member's c and s, float64 (members,). Only their proportions mean something at first."""
        logs = [[one for one in log[-_LOOKED_AT:] if one.cached and one.tokens <= _SHORT] for log in self._logs()]
        slopes = np.array([_slope(log) for log in logs])
        known = [
            median(one.seconds / (1 + slope * (one.tokens - 1)) for one in log) if log else None
            for log, slope in zip(logs, slopes, strict=True)
        ]
        rates = [one / size for one, size in zip(known, self._sizes, strict=True) if one is not None]
        rate = median(rates) if rates else 1.0
        seconds = [rate * size if one is None else one for one, size in zip(known, self._sizes, strict=True)]
        return np.array(seconds), slopes


def _slope(log: Sequence[Forward]) -> float:
    """Fit s to forwards of several lengths; a value between nothing and a token's full price."""
    short = [one.seconds for one in log if one.tokens == 1]
    long = [one for one in log if one.tokens > 1]
    if len(short) < 4 or len(long) < 4:
        return _SLOPE
    base = median(short)
    return float(np.clip(median((one.seconds / base - 1) / (one.tokens - 1) for one in long), 0.0, 1.0))


def mixture_cost(weights: Floats, seconds: Floats, slopes: Floats) -> float:
    """Return the expected seconds of a token by `mixture`: a member of weight λ catches up with 1/λ tokens."""
    live = weights > 0
    missed = 1 / weights[live]
    return float((weights[live] * seconds[live] * (1 + slopes[live] * (missed - 1))).sum())


def speculative_cost(weights: Floats, seconds: Floats, slopes: Floats, plan: tuple[int, int, float]) -> float:
    """Return the expected seconds of a token by `speculative`. plan: the draft, checked positions, acceptance."""
    draft, checks, right = plan
    foreign = 1 - weights[draft]
    if foreign <= 0:
        return float(seconds[draft])
    reached = checks + 1 if right == 1 else (1 - right ** (checks + 1)) / (1 - right)
    tokens = reached / foreign
    length = (checks + 1) / foreign
    cost = (length - 1) * seconds[draft]
    for i, weight in enumerate(weights):
        if i != draft and weight > 0:
            asked = 1 - (1 - weight / foreign) ** (checks + 1)
            # What it missed since it was last asked: this block's part of the text, and what it sat out.
            cost += asked * seconds[i] * (1 + slopes[i] * (tokens / asked - 1 + length - tokens))
    return float(cost / tokens)
