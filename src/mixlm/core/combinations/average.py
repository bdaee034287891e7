"""`average`: the weighted arithmetic mean, `C(u) = Σ_i λ_i q_i(u)`, a mixture of experts over probabilities.

Source: the paper's target distribution; linear opinion pool (Stone, 1961). Defined for every unit, for members with
options of their own.

Coin first: `π = λ`, `S_i = q_i`; `Σ π_i S_i` is `C` itself, so one member always suffices. Envelope: `L_I` is the
sum over I, since a missing member can give a symbol nothing. Both are attained, so none is tighter. Cost: one
forward a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mixlm.core.combinations.base import Combination, Unreported, ran_mask, winner_by_bounds
from mixlm.types import Floats


@dataclass(frozen=True)
class Average(Combination):
    """The weighted mean of the members' distributions."""

    name: ClassVar[str] = "average"
    takes_reports: ClassVar[bool] = True
    minimum_members: ClassVar[int] = 1

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return `Σ λ_i q_i`."""
        return weights @ probs

    def bound(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return what the members that ran contribute."""
        members = list(ran)
        lower: Floats = weights[members] @ probs[members]
        return lower

    def first_member(self, weights: Floats) -> Floats | None:
        """Return the weights."""
        return weights

    def first_distribution(
        self, row: Floats, weights: Floats, member: int, unreported: Unreported | None = None
    ) -> Floats:
        """Return the member's distribution."""
        return row

    def certain_winner(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> int | None:
        """Return a symbol that is ahead by more than the weight of the members that have not run."""
        if unreported is not None or len(ran) == len(weights):
            return super().certain_winner(probs, weights, ran, unreported)
        lower = self.envelope(probs, weights, ran)
        assert lower is not None
        missing = float(weights[~ran_mask(weights, ran)].sum())
        return winner_by_bounds(lower, lower + missing, missing)
