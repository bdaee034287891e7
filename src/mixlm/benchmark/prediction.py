"""What the cost model says of a run, from what its forwards took: set beside what was measured.

A forward of q tokens takes c·(1 + s·(q - 1)) seconds. Each member's c and s are fitted to all forwards of a benchmark;
how often guesses were right is counted. What remains is arithmetic on forwards: the time outside them is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from mixlm.benchmark.timing import Contestant, EnsembleContestant, TimedRun
from mixlm.decoding.cost_model import mixture_cost, speculative_cost
from mixlm.engines.base import Forward
from mixlm.ensemble import Ensemble
from mixlm.types import Floats

_SHORT = 16  # tokens; longer forwards read prompts
_FEW = 4  # forwards of a kind below which they say nothing
_SLOPE = 0.02  # of a further token, where nothing was measured


@dataclass(frozen=True)
class ForwardCosts:
    """Each member's c in seconds and s, float64 (members,); NaN where it never ran one token alone."""

    seconds: Floats
    slopes: Floats

    @classmethod
    def of(cls, ensemble: Ensemble, those: Sequence[Contestant], samples: Sequence[Sequence[TimedRun]]) -> ForwardCosts:
        """Fit to all forwards of mixlm's runs."""
        logs: dict[str, list[Forward]] = {name: [] for name in ensemble.names}
        for one, taken in zip(those, samples, strict=True):
            for sample in taken if isinstance(one, EnsembleContestant) else ():
                for name, log in zip(one.members, sample.forwards, strict=True):
                    logs[name] += log
        pairs = [fit_forwards(logs[name]) for name in ensemble.names]
        return cls(np.array([c for c, _ in pairs]), np.array([s for _, s in pairs]))


def fit_forwards(log: Sequence[Forward]) -> tuple[float, float]:
    """Return c and s of one member's forwards; c is NaN where none ran one token alone."""
    short = [one for one in log if one.cached and one.tokens <= _SHORT and one.batch_size == 1]
    ones = [one.seconds for one in short if one.tokens == 1]
    more = [one for one in short if one.tokens > 1]
    if not ones:
        return float("nan"), _SLOPE
    base = median(ones)
    if len(more) < _FEW or base <= 0:
        return base, _SLOPE
    # Least squares through c: long forwards say most about what a further token costs. Of each length the median, since
    # the first of a length may take many times as long (on a GPU, until it is captured).
    lengths, counts = np.unique([one.tokens for one in more], return_counts=True)
    dearer = np.array([median(one.seconds for one in more if one.tokens == n) / base - 1 for n in lengths])
    extra = lengths - 1.0
    return base, float(np.clip((counts * extra * dearer).sum() / (counts * extra**2).sum(), 0.0, 1.0))


def predicted_speed(ensemble: Ensemble, one: Contestant, taken: Sequence[TimedRun], fit: ForwardCosts) -> float | None:
    """Return the tokens a second that the cost model expects of a run; None where it has no formula.

    Of `speculative` and `drafted` with a member as the draft, given the share of guesses that were right; not of
    guesses by looking back, whose number depends on the text, nor of `auto` and `greedy`, which decide as they go.
    """
    live = ensemble.weights > 0
    if not isinstance(one, EnsembleContestant) or np.isnan(fit.seconds[live]).any():
        return None
    checked = sum(sample.checked for sample in taken)
    right = sum(sample.accepted for sample in taken) / checked if checked else None
    draft = ensemble.names.index(one.draft) if one.draft in ensemble.names else None
    seconds: float | None = None
    match one.method:
        case "single":
            seconds = float(fit.seconds[ensemble.names.index(one.members[0])])
        case "conventional":
            seconds = float(fit.seconds[live].sum())
        case "mixture":
            seconds = mixture_cost(ensemble.weights, fit.seconds, fit.slopes)
        case "speculative" if draft is not None and right is not None:
            plan = (draft, one.settings.block, right)
            seconds = speculative_cost(ensemble.weights, fit.seconds, fit.slopes, plan)
        case "drafted" if draft is not None and right is not None:
            seconds = drafted_cost(ensemble.weights, fit, (draft, one.settings.block, right))
        case _:
            pass
    return 1 / seconds if seconds else None


def drafted_cost(weights: Floats, fit: ForwardCosts, plan: tuple[int, int, float]) -> float:
    """Return the expected seconds of a token by drafted greedy. plan: the draft, guesses a block, share that are right.

    A block of m guesses yields (1 - β^(m+1)) / (1 - β) tokens, for m + 1 forwards of the draft, whose law the last
    token needs too, and one of m + 1 tokens by each other member.
    """
    draft, guesses, right = plan
    tokens = sum(right**k for k in range(guesses + 1))
    cost = (guesses + 1) * fit.seconds[draft]
    for i, weight in enumerate(weights):
        if i != draft and weight > 0:
            cost += fit.seconds[i] * (1 + fit.slopes[i] * guesses)
    return float(cost / tokens)
