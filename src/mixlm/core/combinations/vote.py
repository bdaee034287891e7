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

from mixlm.core.combinations.base import TOLERANCE, Combination, Unreported, ran_mask
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.types import Floats

_MOST_MEMBERS = 6
Block = frozenset[int]


@dataclass(frozen=True)
class Vote(Combination):
    """The distribution of the symbol that most of the members' samples name, by weight."""

    name: ClassVar[str] = "vote"

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the distribution of the winner."""
        voters = np.flatnonzero(weights > 0).tolist()
        out = self._winners(probs, weights, voters)
        winner: Floats = out / out.sum()
        return winner

    def bound(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return the probability that a symbol leads beyond reach.

        Raises:
            UnsupportedError: A member did not report its whole distribution.
        """
        if unreported is not None and unreported.mass.any():
            raise UnsupportedError(
                f"rule {self.name} needs whole distributions, and a member reports its likeliest tokens alone",
                "use an engine that returns all logits",
            )
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
        counts = _BlockVotes(probs)
        out = np.zeros(probs.shape[1])
        for partition in set_partitions(list(voters)):
            votes = [sum(float(weights[i]) for i in block) for block in partition]
            largest = max(votes)
            leaders = [block for block, vote in zip(partition, votes, strict=True) if vote > largest - TOLERANCE]
            second = sorted([*votes, 0.0])[-2]
            if missing and (len(leaders) > 1 or largest <= second + missing + TOLERANCE):
                continue
            for leader in leaders:
                others = tuple(block for block in partition if block != leader)
                out += counts.distinct(leader, others) / len(leaders)
        return np.maximum(out, 0.0)


class _BlockVotes:
    """Probabilities that each of several blocks of members votes for one symbol of its own."""

    def __init__(self, probs: Floats) -> None:
        self._probs = probs
        self._products: dict[Block, Floats] = {}
        self._distinct: dict[tuple[Block, frozenset[Block]], Floats] = {}

    def distinct(self, leader: Block, others: tuple[Block, ...]) -> Floats:
        """Return the probability that `leader` votes u and the others for distinct symbols but u, for each u.

        The last block may vote for anything, less what the leader or another block votes for.
        """
        key = (leader, frozenset(others))
        if key not in self._distinct:
            if not others:
                self._distinct[key] = self._product(leader)
            else:
                *rest, last = others
                value = self._product(last).sum() * self.distinct(leader, tuple(rest))
                value = value - self.distinct(leader | last, tuple(rest))
                for j, block in enumerate(rest):
                    value = value - self.distinct(leader, (*rest[:j], block | last, *rest[j + 1 :]))
                self._distinct[key] = value
        return self._distinct[key]

    def _product(self, block: Block) -> Floats:
        if block not in self._products:
            self._products[block] = self._probs[sorted(block)].prod(axis=0)
        return self._products[block]


def set_partitions(items: list[int]) -> Iterator[list[Block]]:
    """Yield every way to split the items into blocks."""
    if not items:
        return
    first, *rest = items
    if not rest:
        yield [frozenset([first])]
        return
    for partition in set_partitions(rest):
        yield [frozenset([first]), *partition]
        for j, block in enumerate(partition):
            yield [*partition[:j], block | {first}, *partition[j + 1 :]]
