"""Weighted power means, `C(u) ∝ M(q(u))`, `M(x) = (Σ_i λ_i x_i^r)^(1/r)`: `power`, and its limits `max` and `min`.

Source: power means as opinion pools (Cooke, 1991); r = 1 is the average, r → 0 the geometric mean. Defined for every
unit; for r < 0 a symbol needs every member, so temperature and truncation apply to the mean then.

Below, `c_i = λ_i^(1/r)` and `K = Σ c_i`; u has x = (q_1(u), …, q_n(u)).

r ≥ 1. Envelope: `L_I(u) = M_I(u) / (Σ_v M_I(v) + Σ_{j ∉ I} c_j)`, M_I with 0 for the missing: M is subadditive, so a
missing member adds at most c_j to the sum, and does so where it shares no symbol; mass on u instead only raises
C(u). Coin first: `π = λ`, `S_i = q_i ψ(q_i)`, `ψ(x) = 1 / (K − (κ − 1) y)` for `(2κ − 1) y ≤ K`, else `4κy / (y +
K)²`, where `y = x min c` and `κ = min_i c_i / λ_i`. Proof: `C(u) ≥ M / (M + Σ c_i (1 − x_i)) ≥ M / (M + K − κs)`, `s
= Σ λ_i x_i`. This grows with M, and `M ≥ max(s, y)` for the largest of the x_i; over s, C(u)/s is then least at ψ of
the largest, and ψ grows, so `Σ λ_i x_i ψ(x_i) ≤ C(u)`. (With ψ = 1/K alone it is 1 / Σ λ_i^(1/r).)

0 < r < 1. Envelope: `L_I(u) = M_I(u) / (M_I(u) + ((Σ_{v≠u} M_I(v))^r + Σ_{j ∉ I} λ_j)^(1/r))`: M is superadditive,
so the sum over the other symbols is at most M of the sums, which is attained where the missing are proportional to
M_I. Coin first: `π_i S_i = L_{i}`, `π_i ∝ c_i / (c_i + (1 − λ_i)^(1/r))`. Proof: with `B = M(1 − x)`, the
denominator of L_{i} is `c_i x_i + M(1 − x_i e_i) ≥ B + Σ_j c_j x_j`; hence `Σ L_{i} ≤ Σ c_i x_i / (B + Σ c_i x_i) ≤
M(x) / (B + M(x)) ≤ C(u)`.

Engines that report their likeliest tokens: for r ≥ 1, `Σ c_i m_i` more in the denominator, m_i the unreported masses;
below 1, once all have reported, `log_linear.reports_bound`: unreported symbols add at most `M(m)` for 0 < r < 1, and
`min c_i m_i` for r < 0, where `M(x) ≤ c_i x_i`.

r < 0. No bound, since a missing member can make any symbol impossible; one that is the only one left is certain.

r = ±∞. `c_i = 1` for members of positive weight, and weights say nothing else. Coin first, for the maximum of n: `π`
equal and ψ as above. For two members `S_i = q_i / (2 − q_i)` is valid and larger: with x ≥ y, `C(u) ≥ x / (2 − y)`,
and `2x/(2 − y) − y/(2 − y) − x/(2 − x)` has the sign of `(x − y)(1 − x) ≥ 0`; x = y attains it. Two members stop
after one at least half of the time, nearly always where one token is likely.

Cost: r = 2 and equal weights of two members stop after one at least 71 % of the time; below 0, drafts are verified.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mixlm.core.combinations.base import (
    TOLERANCE,
    Combination,
    Unreported,
    check_parameter,
    normalized,
    positive_members,
    ran_mask,
    winner_by_bounds,
)
from mixlm.core.combinations.log_linear import leaves_several, only_symbol, reports_bound
from mixlm.errors import ConfigError
from mixlm.types import Candidates, Floats

_LARGE = 16.0  # probabilities below 1e-18 vanish in powers up to this one
_SMALL = 1e-3  # below it, roots are of numbers near 1, which rounding would change, and bounds are nearly 0
_TINY = float(np.finfo(np.float64).tiny)


class PowerMean(Combination):
    """The normalised power mean of the members' probabilities."""

    takes_reports: ClassVar[bool] = True
    strength: float

    @property
    def common_options(self) -> bool:  # type: ignore[override]
        """Below 0, a symbol that one member's truncation drops would be impossible."""
        return self.strength < 0

    @property
    def speculates(self) -> bool:  # type: ignore[override]
        """Near and below 0, little is known early."""
        return self.strength < _SMALL

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the normalised power mean."""
        return normalized(self._mean(probs, weights, positive_members(weights)), self.name)

    def is_open(self, parts: Mapping[int, Candidates], weights: Floats) -> bool:
        """Whether below 0, several symbols are left."""
        return self.strength < 0 and leaves_several(parts, positive_members(weights))

    def bound(self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None) -> Floats:
        """Return the bound of the range that the exponent is in."""
        if unreported is not None and self.strength < 1 and len(ran) == len(weights):
            return self._reports_bound(probs, weights, unreported)
        if self.strength < 0:
            return only_symbol(probs, ran, positive_members(weights), unreported)
        if self.strength < _SMALL:
            return np.zeros(probs.shape[1])
        done, active = ran_mask(weights, ran), positive_members(weights)
        mean = self._mean(probs, weights, active & done)
        if self.strength >= 1:
            largest = np.where(active, weights ** (1 / self.strength), 0.0)
            left = np.where(done, 0.0 if unreported is None else unreported.mass, 1.0)
            lower: Floats = mean / max(mean.sum() + largest @ left, _TINY)
            return lower
        missing = weights * ~done
        if unreported is None:
            total = _sum_of_others(mean) ** self.strength + missing.sum()
        else:
            # Rows are lower bounds: all that they do not give u may be proportional elsewhere.
            total = missing.sum() + (weights * done) @ (np.maximum(1 - probs, 0.0) + TOLERANCE) ** self.strength
        lower = mean / np.maximum(mean + total ** (1 / self.strength), _TINY)
        return lower

    def first_member(self, weights: Floats) -> Floats | None:
        """Return the weights for r ≥ 1; below 1, in proportion to the most that each member can emit."""
        if self.strength < _SMALL:
            return None
        if self.strength >= 1:
            return weights
        largest = self._single_share(np.ones(len(weights)), np.zeros(len(weights)), weights)
        total = largest.sum()
        return largest / total if total > 0 else None  # near exponent 0 all powers underflow

    def first_distribution(
        self, row: Floats, weights: Floats, member: int, unreported: Unreported | None = None
    ) -> Floats:
        """Return `S_i`; it looks at each symbol alone, so unreported symbols just have none."""
        coin = self.first_member(weights)
        assert coin is not None
        if coin[member] == 0:
            return np.zeros_like(row)
        if self.strength < 1:
            others = _sum_of_others(row) + (0.0 if unreported is None else float(unreported.mass[0]))
            lower: Floats = self._single_share(row, others, weights[member]) / coin[member]
            return lower
        positive = weights[weights > 0]
        return row * _least_share(row, positive, positive ** (1 / self.strength))

    def _reports_bound(self, probs: Floats, weights: Floats, unreported: Unreported) -> Floats:
        active = positive_members(weights)
        if self.strength > 0:
            elsewhere = float(self._mean(unreported.mass[:, None], weights, active)[0])
        else:
            elsewhere = float((weights[active] ** (1 / self.strength) * unreported.mass[active]).min())
        return reports_bound(lambda rows: self._mean(rows, weights, active), probs, unreported, elsewhere)

    def certain_winner(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> int | None:
        """Compare the sums of powers; a missing member can give all its weight to one symbol."""
        if unreported is not None or len(ran) == len(weights) or not 0 < self.strength < math.inf:
            return super().certain_winner(probs, weights, ran, unreported)
        done = ran_mask(weights, ran)
        lower = (weights * done) @ np.where(done[:, None], probs, 0.0) ** self.strength
        missing = float(weights[~done].sum())
        return winner_by_bounds(lower, lower + missing, missing)

    def _mean(self, probs: Floats, weights: Floats, members: npt.NDArray[np.bool_]) -> Floats:
        """Return `M` over some members, 0 for the others."""
        if not members.any():
            return np.zeros(probs.shape[1])
        rows, shares = probs[members], weights[members]
        if abs(self.strength) < _SMALL:
            with np.errstate(divide="ignore", over="ignore"):
                sums = shares @ np.expm1(self.strength * np.log(rows))
                return np.asarray(np.exp(np.log1p(np.maximum(sums, -1.0)) / self.strength))
        if 0 < self.strength <= _LARGE:
            return np.asarray((shares @ rows**self.strength) ** (1 / self.strength))
        # Powers may overflow or vanish: they are taken of ratios.
        scale: Floats = rows.max(axis=0) if self.strength > 0 else rows.min(axis=0)
        if math.isinf(self.strength):
            return scale
        out = np.zeros(probs.shape[1])
        some = scale > 0
        powers = shares @ (rows[:, some] / scale[some]) ** self.strength
        out[some] = scale[some] * powers ** (1 / self.strength)
        return out

    def _single_share(self, x: Floats, others: Floats, weight: Floats) -> Floats:
        """Return `L_{i}` of a symbol of probability x, where member i, of this weight, gives `others` elsewhere."""
        own = weight ** (1 / self.strength) * x
        rest = (weight * others**self.strength + (1 - weight)) ** (1 / self.strength)
        return own / np.maximum(own + rest, _TINY)


@dataclass(frozen=True)
class Power(PowerMean):
    """`power`: `strength` is r, any but 0."""

    name: ClassVar[str] = "power"
    strength: float = 2.0

    def __post_init__(self) -> None:
        check_parameter(self.name, "strength", self.strength, minimum=-1e6, maximum=1e6)
        if self.strength == 0:
            raise ConfigError("strength is 0, and the power mean of exponent 0 is geometric", "use --rule geometric")


@dataclass(frozen=True)
class Min(PowerMean):
    """`min`: the smallest of the members' probabilities (the minimum rule of Kittler et al., 1998)."""

    name: ClassVar[str] = "min"
    strength = -math.inf


@dataclass(frozen=True)
class Max(PowerMean):
    """`max`: the largest of the members' probabilities (the maximum rule of Kittler et al., 1998)."""

    name: ClassVar[str] = "max"
    strength = math.inf

    def first_member(self, weights: Floats) -> Floats | None:
        """Return equal shares for the members that take part."""
        active = positive_members(weights)
        coin: Floats = active / active.sum()
        return coin

    def first_distribution(
        self, row: Floats, weights: Floats, member: int, unreported: Unreported | None = None
    ) -> Floats:
        """Return `S_i`; it looks at each symbol alone, so unreported symbols just have none."""
        count = int(positive_members(weights).sum())
        if count == 2:
            return row / (2 - row)
        return row * _least_share(row, np.full(count, 1 / count), np.ones(count))


def _sum_of_others(values: Floats) -> Floats:
    """Return the sum of all but each value; exact where that is tiny, since roots of it are not."""
    others = np.maximum(values.sum() - values, 0.0)
    if values.size:
        best = int(values.argmax())
        others[best] = values[:best].sum() + values[best + 1 :].sum()
    return np.asarray(others)


def _least_share(x: Floats, weights: Floats, largest: Floats) -> Floats:
    """Return `ψ(x)` of the power means with r ≥ 1, float64 as x.

    Args:
        x: Probabilities.
        weights: `λ`, all greater than 0.
        largest: `c`, the mean of a symbol that one member alone is certain of, by member.
    """
    total, ratio = largest.sum(), float((largest / weights).min())
    y = x * largest.min()
    share: Floats = np.where(
        (2 * ratio - 1) * y <= total, 1 / (total - (ratio - 1) * y), 4 * ratio * y / (y + total) ** 2
    )
    return share
