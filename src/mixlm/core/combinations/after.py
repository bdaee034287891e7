"""Temperature and truncation applied to a combination: `A C(q)`, with bounds from those of the rule for `C`.

All that is used of the rule is that `C` is a distribution with `C ≥ l` for a known sub-distribution `l`, so that a
mass `ρ = 1 − Σ l` is free; `C` itself may be the average (`mean-then-truncate`, `gac`) or any other rule.

Envelope `F(l)`, for T ≤ 1 and α = 1/T:

    F(l)(u) = l(u)^α / (l(u)^α + Σ_{v ≠ u, w} l(v)^α + (l(w) + ρ)^α)   if u is kept whatever the free mass does, else 0

where w is the largest symbol beside u; for T = 1 this is l(u). The denominator is convex in the free mass, so it is
largest where all of that lies on the symbol that is the largest already; truncation only makes denominators smaller.
Which symbols are kept for certain is in `certainly_kept`. Symbols that are dropped for certain (`certainly_dropped`)
are in no denominator, so in the envelope l is 0 there.

Coin first: with the rule's own `π_i S_i = l_i`, `F(l_i)` may stop, and `π' ∝ g(π_i)`, `g(x) = x^α / (x^α + (1 −
x)^α)`. Valid: move what `C` gives u beyond l_i(u) to another symbol; the denominator of F(l_i)(u) is at least
`l_i(u)^α + Σ_{v≠u} C(v)^α + (C(u) − l_i(u))^α ≥ Σ_j l_j(u)^α + Σ_{v≠u} C(v)^α`, and so `Σ_i F(l_i)(u) ≤ C(u)^α / Σ_v
C(v)^α`. The mass of F(l_i) is at most g(π_i), and Σ g(π_i) ≤ 1.

Above T = 1 a flat completion makes denominators large: with α = 1/T < 1, a free mass ρ over V symbols adds up to `V^(1
− α) ρ^α` to a sum of powers that is mostly 1 to 3. For V = 50,000, T = 1.5 and ρ = 1/2 that is 23, and a bound below
0.1 would cost more than it decides; only min-p limits V, and then to 1/(m^T max l), hundreds of symbols. So the bound
is 0, but for a symbol that is certain. Temperature 0 is the most likely symbol, known as early as the rule knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mixlm.core.combinations.base import Combination, Unreported, is_plain, winner_by_bounds
from mixlm.core.sampling import Transform, largest_indices
from mixlm.types import Candidates, Floats, Ids, Sampling

_ROUNDING = 1e-12
_SMALL = 64.0  # an exponent to which ratios of 2 are no extremes
_LISTED = 4096  # of the largest symbols, as many are looked at one by one for top-p


@dataclass(frozen=True)
class TransformedCombination(Combination):
    """A rule with temperature, top-k, top-p and min-p applied to its combination.

    Attributes:
        rule: The rule.
        sampling: What is applied; penalties are the members' own.
    """

    rule: Combination
    sampling: Sampling

    def __post_init__(self) -> None:
        for name in ("name", "roles", "speculates", "shared_vocabulary", "alignment", "is_product"):
            object.__setattr__(self, name, getattr(self.rule, name))
        object.__setattr__(self, "takes_reports", self.rule.takes_reports and self.sampling.temperature <= 1)

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the transformed combination."""
        return transformed(self.rule.combine(probs, weights), self.sampling)

    def from_logprobs(self, rows: Sequence[Floats], weights: Floats) -> Candidates:
        """Return the transformed combination."""
        return _transformed_scores(self.rule.log_scores(rows, weights), self.sampling)

    def is_open(self, parts: Mapping[int, Candidates], weights: Floats) -> bool:
        """Return the rule's answer: where its envelope is 0, so is `F` of it."""
        return self.rule.is_open(parts, weights)

    def bound(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return `F` of the rule's envelope."""
        lower = self.rule.envelope(probs, weights, ran, unreported)
        if lower is None:
            return None
        free = max(1 - float(lower.sum()), 0.0)
        dropped = certainly_dropped(lower, free, self.sampling)
        return transformed_bound(lower, self.sampling, np.where(dropped, 0.0, lower))

    def first_member(self, weights: Floats) -> Floats | None:
        """Return `π'`; None where the rule tosses no coin, or nothing is known after one member."""
        coin = self.rule.first_member(weights)
        if coin is None or not 0 < self.sampling.temperature <= 1 or self.sampling.top_k == 1:
            return None  # with one symbol kept, what a member knows is all or nothing, whatever its weight
        with np.errstate(divide="ignore", over="ignore"):
            shares = 1 / (1 + ((1 - coin) / coin) ** (1 / self.sampling.temperature))
        total = shares.sum()
        return shares / total if total > 0 else None  # near temperature 0 all powers underflow

    def first_distribution(
        self, row: Floats, weights: Floats, member: int, unreported: Unreported | None = None
    ) -> Floats:
        """Return `F(π_i S_i) / π'_i`."""
        coin, after = self.rule.first_member(weights), self.first_member(weights)
        assert coin is not None
        assert after is not None
        if after[member] == 0:
            return np.zeros_like(row)
        inner = coin[member] * self.rule.first_distribution(row, weights, member, unreported)
        lower: Floats = transformed_bound(inner, self.sampling) / after[member]
        return lower

    def certain_winner(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> int | None:
        """Return the rule's winner: temperature and truncation keep the most likely symbol."""
        return self.rule.certain_winner(probs, weights, ran, unreported)

    def check_members(self, count: int) -> None:
        """Check as the rule does."""
        self.rule.check_members(count)


def transformed(distribution: Floats, sampling: Sampling) -> Floats:
    """Return a distribution over aligned symbols after temperature, top-k, top-p and min-p.

    Temperature 0 keeps the most likely symbol, the first of equally likely ones.
    """
    if is_plain(sampling):
        return distribution
    out = np.zeros_like(distribution)
    with np.errstate(divide="ignore"):
        kept = _transformed_scores(np.log(distribution), sampling)
    out[kept.ids] = np.exp(kept.logprobs)
    return out


def _transformed_scores(scores: Floats, sampling: Sampling) -> Candidates:
    if sampling.temperature == 0:
        return Candidates(np.array([int(np.argmax(scores))]), np.zeros(1))
    return _transform(sampling)(scores)


@lru_cache(maxsize=16)
def _transform(sampling: Sampling) -> Transform:
    return Transform(sampling, np.zeros(0, dtype=np.int64))


def transformed_bound(lower: Floats, sampling: Sampling, remaining: Floats | None = None) -> Floats:
    """Return the greatest lower bound found for the transform of any distribution that is at least `lower`: `F(l)`.

    Args:
        lower: A sub-distribution, float64 (symbols,); the distribution may give symbols that are not listed the rest.
        sampling: Temperature and truncation.
        remaining: The same with 0 for symbols that are dropped for certain, where F need not be separable.
    """
    out = np.zeros_like(lower)
    if not lower.size:
        return out
    free = max(1 - float(lower.sum()), 0.0)
    if sampling.temperature == 0 or sampling.top_k == 1 or sampling.temperature > 1:
        winner = winner_by_bounds(lower, lower + free, free)
        # Above T = 1 the smallest of masses elsewhere counts: 1e-13 to the power 1/5 is 0.0025.
        is_all = winner is not None and lower[winner] == 1 and np.count_nonzero(lower) == 1
        if winner is not None and (sampling.temperature <= 1 or sampling.top_k == 1 or is_all):
            out[winner] = 1.0
        return out
    bound = _tempered_bound(lower if remaining is None else remaining, free, 1 / sampling.temperature)
    kept = certainly_kept(lower, free, sampling)
    out[kept] = bound[kept]
    return out


def certainly_kept(lower: Floats, free: float, sampling: Sampling) -> npt.NDArray[np.bool_]:
    """Return the symbols that truncation keeps whatever happens to the free mass, bool (symbols,). Temperature ≤ 1.

    What counts against u is that it has just `lower[u]` and that the free mass lies elsewhere.

    top-k: k others must overtake it, each of them at the price `(l(u) − l(v))_+`; the k cheapest must cost more than
    there is. min-p: all the free mass lies on the largest other symbol. top-p: the mass before u is at most that of the
    symbols that are not smaller, and of those that can be raised to it, with all the free mass.
    """
    kept = lower > 0
    room = free + _ROUNDING if free > 0 else 0.0
    if sampling.top_k:
        kept &= _kept_by_top_k(lower, room, sampling.top_k)
    if sampling.top_p < 1:
        kept &= _kept_by_top_p(lower, room, sampling)
    if sampling.min_p > 0:
        kept &= _kept_by_min_p(lower, room, sampling.min_p**sampling.temperature)
    return kept


def certainly_dropped(lower: Floats, free: float, sampling: Sampling) -> npt.NDArray[np.bool_]:
    """Return the symbols that truncation drops whatever happens to the free mass, bool (symbols,). Temperature ≤ 1.

    Even with all the free mass on u: k others are larger; or the largest is by more than min-p; or those before it have
    top-p of the largest possible sum.
    """
    dropped = np.zeros(lower.size, dtype=np.bool_)
    if not lower.size or not 0 < sampling.temperature <= 1:
        return dropped
    upper, best = lower + free + _ROUNDING, float(lower.max())
    if 0 < sampling.top_k < lower.size:
        dropped |= upper < np.partition(lower, -sampling.top_k)[-sampling.top_k]
    if sampling.min_p > 0:
        dropped |= upper < sampling.min_p**sampling.temperature * best
    if sampling.top_p < 1:
        alpha, scale = 1 / sampling.temperature, best + free  # powers of small numbers underflow
        ordered = np.sort(lower)[::-1] / scale
        sums = np.concatenate([[0.0], np.cumsum(ordered**alpha)])
        largest = sums[-1] - ordered[0] ** alpha + 1
        dropped |= (
            sums[np.searchsorted(-ordered, -upper / scale, side="left")] >= (sampling.top_p + _ROUNDING) * largest
        )
    return dropped


def _two_largest(lower: Floats) -> tuple[int, float]:
    """Return the index of the largest value, and the largest of the others, 0 where there is none."""
    best = int(lower.argmax())
    second = max(float(lower[:best].max(initial=0.0)), float(lower[best + 1 :].max(initial=0.0)))
    return best, second


def _kept_by_min_p(lower: Floats, room: float, share: float) -> npt.NDArray[np.bool_]:
    """The largest other symbol may get all the free mass."""
    best, second = _two_largest(lower)
    margin = min(room, _ROUNDING)
    kept = np.asarray(lower >= share * (lower[best] + room) + margin)
    kept[best] = lower[best] >= share * (second + room) + margin
    return kept


def _tempered_bound(lower: Floats, free: float, alpha: float) -> Floats:
    best, second = _two_largest(lower)
    # Of ratios to the largest term of each denominator, since powers of small numbers underflow.
    powers = (lower / (lower[best] + free)) ** alpha
    bound: Floats = powers / (powers.sum() - powers[best] + 1)
    scale = max(float(lower[best]), second + free)
    if alpha < _SMALL:  # the same powers on another scale, at most twice as small
        powers *= ((lower[best] + free) / scale) ** alpha
    else:
        powers = (lower / scale) ** alpha
    bound[best] = powers[best] / (powers.sum() - (second / scale) ** alpha + ((second + free) / scale) ** alpha)
    return bound


def _kept_by_top_k(lower: Floats, room: float, k: int) -> npt.NDArray[np.bool_]:
    """Only the k + 1 largest can be the k cheapest rivals of any symbol; symbols that are not listed have 0."""
    top = np.sort(np.partition(lower, -k - 1)[-k - 1 :] if lower.size > k + 1 else lower)[::-1]
    top = np.concatenate([top, np.zeros(k + 1 - top.size)])
    kept = np.zeros(lower.size, dtype=np.bool_)
    # At least k others are strictly larger where u is below the k-th.
    for i in np.flatnonzero((lower >= top[k - 1]) & (lower > 0)):
        rivals = np.delete(top, int(np.argmax(top == lower[i])))
        kept[i] = np.maximum(lower[i] - rivals, 0).sum() >= room
    return kept


def _kept_by_top_p(lower: Floats, room: float, sampling: Sampling) -> npt.NDArray[np.bool_]:
    """Bound the share of the mass that comes before each symbol, after temperature and top-k.

    In descending order, a symbol is `value`; `level` symbols are not smaller. The free mass `room` may raise some of
    the smaller ones to it: the next ones are the cheapest and bring the most, so they are a prefix, up to `reach`.
    """
    alpha, plain = 1 / sampling.temperature, sampling.temperature == 1 and not sampling.top_k
    top = largest_indices(np.where(lower > 0, lower, -np.inf), _LISTED)
    order = top[np.argsort(-lower[top], kind="stable")]
    values = lower[order]
    scale = 1.0 if plain or not values.size else values[0]  # powers of small numbers underflow
    powers = (values / scale) ** alpha
    sums, power_sums = (np.concatenate([[0.0], np.cumsum(x)]) for x in (values, powers))
    unlisted = (
        max(float(((lower / scale) ** alpha).sum() - power_sums[-1]), 0.0)
        if top.size < np.count_nonzero(lower)
        else 0.0
    )
    level = np.searchsorted(-values, -values, side="right")
    before = power_sums[level] - powers
    # The others are not kept for certain, even where nothing is raised.
    near = before + room < sampling.top_p if plain else before * (1 - sampling.top_p) < sampling.top_p * powers
    near |= level == 1
    values, powers, level, before = values[near], powers[near], level[near], before[near]
    reach = _prefix(level, values, sums, room)
    after = np.minimum(reach + 1, sums.size - 1)  # one more, in place of a part of it
    raised = power_sums[after] - power_sums[level] + np.where(reach >= sums.size - 1, unlisted, 0.0)
    ordered = np.append(lower[order], 0.0)
    if plain:
        share = before + room + raised
    else:
        # The free mass does the most on the largest of those before u.
        largest = np.where(level > 1, ordered[0], ordered[min(1, ordered.size - 1)])
        with np.errstate(over="ignore", invalid="ignore"):  # where it overflows, nothing is kept
            before = before + ((largest + room) / scale) ** alpha - (largest / scale) ** alpha + raised
            share = before / (before + powers)
    # Nothing comes before the largest where the free mass cannot raise any other to it.
    unreachable = (level == 1) & (room < values - ordered[level])
    kept = np.zeros(lower.size, dtype=np.bool_)
    kept[order[near]] = unreachable | (share < sampling.top_p - (_ROUNDING if room > 0 else 0.0))
    return kept


def _prefix(level: Ids, values: Floats, sums: Floats, room: float) -> Ids:
    """Return, for each value, how many of the largest symbols are not smaller or can all be raised to it: int64 (n,).

    sums: the cumulated values in descending order, with a 0 in front. Found by bisection, since prices grow.
    """
    low, high = level.copy(), np.full_like(level, sums.size - 1)
    while (low < high).any():
        middle = (low + high + 1) // 2
        affordable = (middle - level) * values - (sums[middle] - sums[level]) <= room
        low, high = np.where(affordable, middle, low), np.where(affordable, high, middle - 1)
    return low
