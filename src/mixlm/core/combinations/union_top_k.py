"""`union-top-k` (`unite`): the average over the union of the members' top k, each member normalised over it.

    U = ∪_i top_k(q_i),   C(u) = Σ_i λ_i q_i(u) / q_i(U)   for u ∈ U, else 0

Source: UniTE, Yao et al. (ICLR 2025, arXiv 2410.03777), k = 10 and the most likely symbol of C. A member's top k
contains what is as likely as its k-th symbol. Temperature, top-p and min-p, where given, apply to C. A symbol
that a member's vocabulary lacks has probability 0 for it. Under the name `unite`, as published, it has the probability
of the first token that the member spells it with (`alignment`): a sum over U may then count a token twice and exceed
1, so there are no bounds between different vocabularies.

Envelope: `L_I(u) = Σ_{i ∈ I} λ_i q_i(u)` for u in the top k of some member in I. Such u is in U whatever the others
say, and `q_i(U) ≤ 1`. Coin first: `π = λ`, `S_i = q_i` on its own top k, by the same argument. C depends on each
member's proportions within U alone: engines that report their likeliest tokens decide it where each of them reports
all of U. Cost: with k = 10 and two members, about 1.1 to 1.2 forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mixlm.core.combinations.base import (
    Alignment,
    Combination,
    Unreported,
    check_parameter,
    normalized,
    positive_members,
    ran_mask,
    winner_by_bounds,
)
from mixlm.core.sampling import largest_indices
from mixlm.errors import ConfigError
from mixlm.types import Floats, Sampling


@dataclass(frozen=True)
class UnionTopK(Combination):
    """The average over the union of the members' top k.

    Attributes:
        k: How many of each member's likeliest symbols are joined.
    """

    name: ClassVar[str] = "union-top-k"
    common_options: ClassVar[bool] = True
    alignment: ClassVar[Alignment] = "spellings"
    takes_reports: ClassVar[bool] = True
    k: int = 10

    def __post_init__(self) -> None:
        check_parameter(self.name, "k", self.k, whole=True, minimum=1)

    @property
    def default_sampling(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The rule's own k as `top_k`."""
        return {"top_k": self.k}

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the average over the union, for members that share a vocabulary."""
        active = positive_members(weights)
        union = self._top_k(probs, active).any(axis=0)
        totals = probs[:, union].sum(axis=1)
        active &= totals > 0
        out = np.zeros(probs.shape[1])
        out[union] = (weights[active] / totals[active]) @ probs[active][:, union]
        return normalized(out, self.name)

    def bound(self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None) -> Floats:
        """Return what the members that ran give to the symbols in the top k of one of them."""
        done = ran_mask(weights, ran) & positive_members(weights)
        top = self._top_k(probs, done, unreported)
        union = top.any(axis=0)
        if unreported is not None and len(ran) == len(weights) and self._is_decided(probs, done, top, unreported):
            return self.combine(probs, weights)
        return np.where(union, (weights * done) @ np.where(done[:, None], probs, 0.0), 0.0)

    def first_member(self, weights: Floats) -> Floats | None:
        """Return the weights."""
        return weights

    def first_distribution(
        self, row: Floats, weights: Floats, member: int, unreported: Unreported | None = None
    ) -> Floats:
        """Return the member's distribution on its top k; of a report, on what is in it for certain."""
        top = self._top_k(row[None], np.ones(1, dtype=np.bool_), unreported)[0]
        return np.where(top, row, 0.0)

    def certain_winner(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> int | None:
        """Compare what symbols have at least with what others have at most, normalised over the members' own top k."""
        if unreported is not None or len(ran) == len(weights):
            return super().certain_winner(probs, weights, ran, unreported)
        lower = self.bound(probs, weights, ran)
        done = ran_mask(weights, ran) & positive_members(weights)
        union = self._top_k(probs, done).any(axis=0)
        totals = np.where(done, np.where(union, probs, 0.0).sum(axis=1), 1.0)
        missing = float(weights[~ran_mask(weights, ran)].sum())
        shares = np.where(done, weights / totals, 0.0)
        upper = shares @ np.where(done[:, None], probs, 0.0) + missing
        # An unlisted symbol has no probability under those that ran.
        return winner_by_bounds(lower, np.minimum(upper, 1.0), missing)

    def with_sampling(self, sampling: Sampling) -> Combination:
        """Return the rule with `top_k` as its k, and the other options applied to the combination."""
        if sampling.top_k == 0:
            raise ConfigError(
                f"top_k is 0, and rule {self.name} joins each member's top k", "give --top-k 10, as published"
            )
        return super(UnionTopK, replace(self, k=sampling.top_k)).with_sampling(replace(sampling, top_k=0))

    def _top_k(
        self, probs: Floats, members: npt.NDArray[np.bool_], unreported: Unreported | None = None
    ) -> npt.NDArray[np.bool_]:
        """Return what is in each member's own top k for certain, bool as probs; nothing for those that take no part."""
        out = np.zeros(probs.shape, dtype=np.bool_)
        for member in np.flatnonzero(members):
            row = probs[member]
            if unreported is not None and unreported.mass[member] > 0:
                if np.count_nonzero(row) < self.k:
                    continue
                raised = row + unreported.open[member] * unreported.ceiling[member]
                kth = max(np.partition(raised, -self.k)[-self.k], unreported.ceiling[member])
                out[member] = row >= kth
                continue
            out[member, largest_indices(np.where(row > 0, row, -np.inf), self.k)] = True
        return out

    def _is_decided(
        self, probs: Floats, members: npt.NDArray[np.bool_], top: npt.NDArray[np.bool_], unreported: Unreported
    ) -> bool:
        """Whether each member reports all of the union, and what it leaves out is in nobody's top k."""
        union = top.any(axis=0)
        for member in np.flatnonzero(members & (unreported.mass > 0)):
            if np.count_nonzero(top[member]) < self.k or unreported.open[member, union].any():
                return False
            least = probs[member, top[member]].min()
            others = probs[member] + unreported.open[member] * unreported.ceiling[member]
            if unreported.ceiling[member] >= least or (others[~top[member]] >= least).any():
                return False
        return True
