"""`max`: the largest of the members' probabilities, `C(u) = max_i q_i(u) / Z`. The weights only say who takes part.

Source: the maximum rule of classifier combination (Kittler et al., 1998); the limit of `power` for r → ∞. Defined
for every unit, for members with options of their own.

Envelope, for n members of which I ran: `L_I(u) = max_I q(u) / (Σ_v max_I q(v) + n − |I|)`. A missing member adds at
most its whole mass, 1, to Z, when it shares no symbol with the others; u gains nothing then: the bound is attained.
Coin first: `π` equal, `S_i = q_i ψ(q_i)` with ψ of `power` at r = ∞, which is `1 / (n − (n − 1) x)` for `(2n − 1) x
≤ n`, else `4nx / (x + n)²`. For two members `S_i = q_i / (2 − q_i)` is valid and larger: with x ≥ y, `C(u) ≥ x / (2
− y)`, and `2x/(2 − y) − y/(2 − y) − x/(2 − x)` has the sign of `(x − y)(1 − x) ≥ 0`; x = y attains it. Cost: two
members stop after one at least half of the time, nearly always where one token is likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mixlm.core.combinations.base import Combination, Unreported, normalized, positive_members, ran_mask
from mixlm.core.combinations.power import least_share
from mixlm.types import Floats


@dataclass(frozen=True)
class Max(Combination):
    """The members' largest probability of each symbol, normalised."""

    name: ClassVar[str] = "max"
    takes_reports: ClassVar[bool] = True

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the normalised maximum."""
        return normalized(probs[positive_members(weights)].max(axis=0), self.name)

    def bound(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return the maximum over the members that ran, over the largest possible sum."""
        active, done = positive_members(weights), ran_mask(weights, ran)
        top = np.where((active & done)[:, None], probs, 0.0).max(axis=0)
        total = top.sum() + (active & ~done).sum()
        if unreported is not None:
            total += unreported.mass[active & done].sum()
        lower: Floats = top / total if total > 0 else np.zeros_like(top)
        return lower

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
        return row * least_share(row, np.full(count, 1 / count), np.ones(count))

    def certain_winner(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> int | None:
        """Return nothing before all have run: a missing member can be certain of any symbol."""
        return super().certain_winner(probs, weights, ran, unreported) if len(ran) == len(weights) else None
