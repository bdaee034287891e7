"""Combination rules: `C(q_1, …, q_n)`, one distribution from those of the members, and how early it is known.

A rule is one small object. `combine` is its dense reference. Two further functions, where a rule has them, let a
strategy sample exactly from `C` before all members have run (the open question of appendix A.5 of the paper):

    envelope    L_I(u) = inf C(q)(u) over everything that the members outside I could still say. It grows with I and
                ends at C. With one uniform number v for the position: stop after the first j with v < Σ_u L_j(u) and
                sample from the increment L_j − L_{j−1} that v falls into. The increments add up to C: this is exact.
    coin first  pick the first member i by π, stop with the sub-distribution S_i(q_i); otherwise run the rest and
                sample from C − Σ_i π_i S_i, normalised. Exact where Σ_i π_i S_i ≤ C for all q.

Arrays are aligned: `probs` is float64 (members, symbols), a row per member over the union of the supports, 0 where a
member gives a symbol nothing. `weights` is float64 (members,), 0 or more, summing to 1. A symbol that no member of
`ran` gives any probability has the envelope 0, so aligning the rows of those that ran is enough.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from mixlm.core.sampling import Transform
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.types import Candidates, Floats, Ids, Sampling

# Rounding: bounds may exceed what they bound by this much, and winners must be ahead by this much.
TOLERANCE = 1e-9


class Aligned(NamedTuple):
    """Distributions over the same symbols.

    Attributes:
        symbols: int64 (symbols,), ascending.
        probs: float64 (members, symbols).
    """

    symbols: Ids
    probs: Floats


class Unreported(NamedTuple):
    """What engines that report only their likeliest tokens leave open, by member; 0 for whole distributions.

    Attributes:
        mass: The total probability of the symbols that a member did not report, float64 (members,).
        ceiling: The most that a single one of them can have, `min(p_(k), mass)`, float64 (members,).
    """

    mass: Floats
    ceiling: Floats

    @classmethod
    def of(cls, probs: Floats) -> Unreported:
        """Return the bounds of rows of reported probabilities, float64 (members, symbols); 0 is not reported.

        A row without any probability, of a member that has not run, leaves nothing open here.
        """
        mass = np.where(probs.any(axis=1), np.maximum(1 - probs.sum(axis=1), 0.0), 0.0)
        mass[mass < TOLERANCE] = 0.0
        smallest = np.where(probs > 0, probs, np.inf).min(axis=1, initial=np.inf)
        return cls(mass, np.minimum(smallest, mass))


def align(parts: Sequence[Candidates | None]) -> Aligned:
    """Lay distributions over the union of their supports; None, for a member that has not run, gives a row of zeros."""
    present = [(row, part) for row, part in enumerate(parts) if part is not None and part.ids.size]
    if not present:
        return Aligned(np.zeros(0, dtype=np.int64), np.zeros((len(parts), 0)))
    marked = np.zeros(max(int(part.ids.max()) for _, part in present) + 1, dtype=np.bool_)
    for _, part in present:
        marked[part.ids] = True
    symbols = np.flatnonzero(marked)
    column = np.cumsum(marked) - 1
    probs = np.zeros((len(parts), symbols.size))
    for row, part in present:
        probs[row, column[part.ids]] = np.exp(part.logprobs)
    return Aligned(symbols, probs)


@dataclass(frozen=True)
class Combination(ABC):
    """A combination rule. The fields of its dataclass are its parameters, checked when it is built.

    Attributes:
        name: Its name in the registry.
        common_options: Members contribute plain distributions, and temperature and truncation apply to the combination
            (`with_sampling`); all members need the same options.
        roles: What each member is, in the order of the rows, or () where members differ by weight only.
        minimum_members: How few members the rule is defined for.
        shared_vocabulary: The rule divides by probabilities, so a symbol that one member can generate must be one that
            the others can: members need one vocabulary.
    """

    name: ClassVar[str]
    common_options: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ()
    minimum_members: ClassVar[int] = 2
    shared_vocabulary: ClassVar[bool] = False

    @abstractmethod
    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return `C`, float64 (symbols,), summing to 1.

        Raises:
            UnsupportedError: It is not defined here, such as a product of distributions that share no symbol.
        """

    def envelope(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return the lower bound of `C` that the members in `ran` guarantee, float64 (symbols,); None: there is none.

        Args:
            probs: float64 (members, symbols); rows of members outside `ran` are not read.
            weights: float64 (members,).
            ran: The members that have run, in any order.
            unreported: What the members in `ran` did not report, where engines report only their likeliest tokens.

        Raises:
            UnsupportedError: Something is unreported, and the rule has no bound that holds then.
        """
        return None

    def first_member(self, weights: Floats) -> Floats | None:
        """Return `π`, float64 (members,), summing to 1, where the rule tosses a coin first; None for other rules."""
        return None

    def first_distribution(self, row: Floats, weights: Floats, member: int, open_mass: float = 0.0) -> Floats:
        """Return the sub-distribution `S_i` with which the first member may stop, float64 (symbols,).

        Args:
            row: The member's distribution, float64 (symbols,).
            weights: float64 (members,).
            member: Which member it is.
            open_mass: The probability of what the member did not report.
        """
        raise UnsupportedError(f"rule {self.name} tosses no coin first")

    def certain_winner(self, probs: Floats, weights: Floats, ran: Sequence[int]) -> int | None:
        """Return the index of the symbol that is the most likely under `C` whatever the other members say, or None.

        Arguments as in `envelope`. The index is that of `np.argmax(combine(...))`; where rounding could decide, and
        another member can still run, the answer is None.
        """
        if len(ran) == len(weights):
            return int(np.argmax(self.combine(probs, weights)))
        lower = self.envelope(probs, weights, ran)
        return None if lower is None else winner_by_bounds(lower, lower + (1 - lower.sum()), 1 - lower.sum())

    def with_sampling(self, sampling: Sampling) -> Combination:
        """Return the rule with temperature and truncation applied to the combination. For rules of `common_options`."""
        return self if is_plain(sampling) else AfterCombination(self, sampling)

    def check_members(self, count: int) -> None:
        """Raise ConfigError where an ensemble has the wrong number of members for the rule."""
        if self.roles and count != len(self.roles):
            names = ", ".join(self.roles)
            raise ConfigError(f"rule {self.name} combines {len(self.roles)} members ({names}), and there are {count}")
        if count < self.minimum_members:
            raise ConfigError(
                f"rule {self.name} needs {self.minimum_members} members, and there is {count}", "add a member"
            )


@dataclass(frozen=True)
class AfterCombination(Combination):
    """Temperature and truncation applied to another rule's combination: `A C(q)`.

    It keeps the most likely symbol, and a combination that is certain stays certain; other bounds of the rule do not
    carry over, so it drafts and verifies. The rules that know more have a `with_sampling` of their own.
    """

    rule: Combination
    sampling: Sampling

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the rule."""
        return self.rule.name

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        """The roles of the rule."""
        return self.rule.roles

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the transformed combination."""
        return transformed(self.rule.combine(probs, weights), self.sampling)

    def envelope(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return the rule's envelope where it names one symbol with certainty; it bounds nothing elsewhere."""
        lower = self.rule.envelope(probs, weights, ran, unreported)
        if lower is None:
            return None
        if len(ran) == len(weights) and unreported is None:
            return self.combine(probs, weights)
        return np.where(lower >= 1 - 1e-12, 1.0, 0.0)

    def certain_winner(self, probs: Floats, weights: Floats, ran: Sequence[int]) -> int | None:
        """Return the rule's."""
        return self.rule.certain_winner(probs, weights, ran)

    def check_members(self, count: int) -> None:
        """Check as the rule does."""
        self.rule.check_members(count)


def is_plain(sampling: Sampling) -> bool:
    """Whether temperature and truncation leave a distribution as it is."""
    return (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1, 0, 1, 0)


def transformed(distribution: Floats, sampling: Sampling) -> Floats:
    """Return a distribution over aligned symbols after temperature, top-k, top-p and min-p.

    Temperature 0 keeps the most likely symbol, the first of equally likely ones.
    """
    out = np.zeros_like(distribution)
    if sampling.temperature == 0:
        out[int(np.argmax(distribution))] = 1.0
        return out
    with np.errstate(divide="ignore"):
        kept = Transform(sampling, np.zeros(0, dtype=np.int64))(np.log(distribution))
    out[kept.ids] = np.exp(kept.logprobs)
    return out


def winner_by_bounds(lower: Floats, upper: Floats, elsewhere: float) -> int | None:
    """Return the symbol whose lower bound is above every other's upper bound by more than rounding, or None.

    Args:
        lower, upper: float64 (symbols,), on any common scale of the order of 1.
        elsewhere: The upper bound of a symbol that is not among them.
    """
    if not lower.size:
        return None
    best = int(np.argmax(lower))
    others = np.delete(upper, best)
    highest = max(float(others.max(initial=0.0)), elsewhere)
    return best if lower[best] > highest + TOLERANCE else None


def normalized(mass: Floats, rule: str) -> Floats:
    """Scale what a rule gives each symbol to sum to 1. Raises UnsupportedError where all of it is 0."""
    total = mass.sum()
    if not total > 0:
        raise UnsupportedError(
            f"rule {rule} is not defined here: no token is possible under all members at once",
            "give the members the same options, or use another rule",
        )
    scaled: Floats = mass / total
    return scaled


def positive_members(weights: Floats) -> npt.NDArray[np.bool_]:
    """Return which members have a weight greater than 0, bool (members,)."""
    return np.asarray(weights) > 0


def ran_mask(weights: Floats, ran: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return which members are in `ran`, bool (members,)."""
    mask = np.zeros(len(weights), dtype=np.bool_)
    mask[list(ran)] = True
    return mask


def check_number(
    rule: str,
    name: str,
    value: float,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float | None = None,
) -> None:
    """Raise ConfigError in words of a parameter where it is not a finite number of its range."""
    low = f"greater than {above:g}" if above is not None else f"from {minimum:g}" if minimum > -math.inf else ""
    high = f"{' and at most' if above is not None else ' to' if low else 'at most'} {maximum:g}"
    if maximum == math.inf:
        low, high = low.replace(f"from {minimum:g}", f"{minimum:g} or more"), ""
    allowed = f"a number {low}{high}".strip()
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not minimum <= value <= maximum or (above is not None and value <= above):
        raise ConfigError(f"{name} is {value!r}; for rule {rule} it must be {allowed}")
