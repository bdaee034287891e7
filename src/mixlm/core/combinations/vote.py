"""`vote`: every member samples one symbol, and the symbol with the most votes, counted by weight, is taken.

Source: majority voting as a combination of classifiers (Lam and Suen, 1997), with votes that are samples; plurality
where nothing has more than half. Ties: one of the symbols with the most votes at random, each with the same
probability. So two members of equal weights give their average, and a member with more than half of the weight
decides alone. Defined for every unit, for members with options of their own, up to 6 members.

    C(u) = Σ over set partitions of the members (who votes alike) of P(partition, its block A votes u) · share of A

where the share is 1 for the block of the largest weight, 1/t among t of them. A probability that blocks vote for
distinct symbols comes by inclusion and exclusion from the sums `Σ_v Π_{i ∈ B} q_i(v)`.

Envelope: `L_I(u)` is the probability that, among the votes of I alone, u leads by more than all missing weight: then
it wins whatever the others vote. It grows, since a missing vote of weight w changes a lead by at most w. Coin first,
where two members of equal weights vote: `S_i = q_i`, the average. Cost: for three equal members, two forwards where
two votes agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mixlm.core.combinations.base import TOLERANCE, Combination, Unreported, normalized, ran_mask, refuse_reports
from mixlm.errors import ConfigError
from mixlm.types import Floats

_MOST_MEMBERS = 6
Block = frozenset[int]


@dataclass(frozen=True)
class Vote(Combination):
    """The distribution of the symbol that most of the members' samples name, by weight."""

    name: ClassVar[str] = "vote"

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the distribution of the winner."""
        return normalized(self._winners(probs, weights, np.flatnonzero(weights > 0).tolist()), self.name)

    def bound(self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None) -> Floats:
        """Return the probability that a symbol leads beyond reach.

        Raises:
            UnsupportedError: A member did not report its whole distribution.
        """
        refuse_reports(self.name, unreported)
        voters = [i for i in ran if weights[i] > 0]
        return self._winners(probs, weights, voters)

    def first_member(self, weights: Floats) -> Floats | None:
        """Return the weights where two equal members vote, or one decides alone."""
        positive = weights[weights > 0]
        if positive.size == 2 and abs(positive[0] - positive[1]) < TOLERANCE:
            return weights
        if positive.max() > 0.5 + TOLERANCE:
            return np.where(weights == weights.max(), 1.0, 0.0)
        return None

    def first_distribution(
        self, row: Floats, weights: Floats, member: int, unreported: Unreported | None = None
    ) -> Floats:
        """Return the member's distribution."""
        return row

    def check_members(self, count: int) -> None:
        """Raise ConfigError for too few or too many members."""
        super().check_members(count)
        if count > _MOST_MEMBERS:
            raise ConfigError(f"rule {self.name} counts at most {_MOST_MEMBERS} votes, and there are {count} members")

    def _winners(self, probs: Floats, weights: Floats, voters: Sequence[int]) -> Floats:
        """Return the probability that each symbol wins by the votes of some members, whatever the others vote."""
        missing = float(weights[~ran_mask(weights, voters)].sum())
        missing = missing if missing > TOLERANCE else 0.0
        known: dict[tuple[Block, frozenset[Block]], Floats] = {}
        out = np.zeros(probs.shape[1])
        for partition in set_partitions(list(voters)):
            votes = [sum(float(weights[i]) for i in block) for block in partition]
            largest = max(votes, default=0.0)
            leaders = [block for block, vote in zip(partition, votes, strict=True) if vote > largest - TOLERANCE]
            second = sorted([0.0, 0.0, *votes])[-2]
            if missing and (len(leaders) > 1 or largest <= second + missing + TOLERANCE):
                continue
            for leader in leaders:
                others = tuple(block for block in partition if block != leader)
                out += _distinct_votes(probs, leader, others, known) / len(leaders)
        return np.maximum(out, 0.0)


def _distinct_votes(
    probs: Floats, leader: Block, others: tuple[Block, ...], known: dict[tuple[Block, frozenset[Block]], Floats]
) -> Floats:
    """Return the probability that `leader` votes u and each of the others for a symbol of its own, for each u.

    The last block may vote for anything, less what the leader or another block votes for. known: what was computed.
    """
    key = (leader, frozenset(others))
    if key not in known:
        if not others:
            known[key] = probs[sorted(leader)].prod(axis=0)
        else:
            *rest, last = others
            value = _distinct_votes(probs, last, (), known).sum() * _distinct_votes(probs, leader, tuple(rest), known)
            value = value - _distinct_votes(probs, leader | last, tuple(rest), known)
            for j, block in enumerate(rest):
                merged = (*rest[:j], block | last, *rest[j + 1 :])
                value = value - _distinct_votes(probs, leader, merged, known)
            known[key] = value
    return known[key]


def set_partitions(items: list[int]) -> Iterator[list[Block]]:
    """Yield every way to split the items into blocks."""
    if not items:
        yield []
        return
    first, *rest = items
    for partition in set_partitions(rest):
        yield [frozenset([first]), *partition]
        for j, block in enumerate(partition):
            yield [*partition[:j], block | {first}, *partition[j + 1 :]]
