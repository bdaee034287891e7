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

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mixlm.core.sampling import Transform
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.option_spec import OptionSpec
from mixlm.types import PLAIN_SAMPLING, Candidates, Floats, Ids, Sampling

# What makes tokens of different members one symbol: their bytes; the strings that tokenizers spell them with; their
# bytes, and the first token of its spelling where a member lacks a symbol.
Alignment = Literal["symbols", "strings", "spellings"]

# Rounding: bounds may exceed what they bound by this much, and winners must be ahead by this much.
TOLERANCE = 1e-9
_LEAST_MASS = 1e-12
_LEAST_LOGPROB = -745.0  # exp of less is 0
_PLAIN = Transform(PLAIN_SAMPLING, np.zeros(0, dtype=np.int64))


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

    A report is a lower bound. Some of what it leaves out may belong to tokens that are never sampled, and then all of
    the distribution is larger than the report by one factor, at most `1 / (1 - mass)`.

    Attributes:
        mass: The total probability that a member did not report, float64 (members,).
        ceiling: The most of it that a single symbol can have, in proportion to the report: `min(p_(k), mass)`, float64
            (members,).
        open: Whether a member has tokens of a symbol that it did not report, bool (members, symbols).
    """

    mass: Floats
    ceiling: Floats
    open: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls, probs: Floats, partial: Sequence[int], open: npt.NDArray[np.bool_] | None = None, tokens: int = 1
    ) -> Unreported:
        """Return the bounds of rows of which some are reports of the likeliest tokens.

        Args:
            probs: float64 (members, symbols).
            partial: The members that ran and report their likeliest tokens alone.
            open: Of these, as the attribute; by default what has no probability.
            tokens: The most tokens that a member has for one symbol.
        """
        mass, ceiling, is_partial = np.zeros(len(probs)), np.zeros(len(probs)), np.zeros((len(probs), 1), dtype=bool)
        for member in partial:
            row = probs[member][probs[member] > 0]
            # Something is left open even where it is too small to be seen.
            mass[member] = max(1 - float(row.sum()), _LEAST_MASS)
            ceiling[member] = min(tokens * float(row.min(initial=1.0)), mass[member])
            is_partial[member] = True
        return cls(mass, ceiling, is_partial & ((probs == 0) if open is None else open))

    def upper(self, probs: Floats) -> Floats:
        """Return the most that each symbol can have where a member ran, float64 as probs."""
        reported = np.maximum(1 - self.mass, _LEAST_MASS)[:, None]
        grown = np.minimum((probs + self.open * self.ceiling[:, None]) / reported, probs + self.mass[:, None])
        return np.where(self.mass[:, None] > 0, grown, probs)


def align(parts: Sequence[Candidates | None]) -> Aligned:
    """Lay distributions over the union of their supports; None, for a member that has not run, gives a row of zeros."""
    present = {row: part for row, part in enumerate(parts) if part is not None and part.ids.size}
    symbols, rows = align_logprobs([*present.values()])
    probs = np.zeros((len(parts), symbols.size))
    for row, logprobs in zip(present, rows, strict=True):
        np.exp(logprobs, out=probs[row])
    return Aligned(symbols, probs)


def align_logprobs(parts: Sequence[Candidates]) -> tuple[Ids, list[Floats]]:
    """Lay distributions over the union of their supports, in logarithms, -inf for none; they may share the parts'."""
    if not parts:
        return np.zeros(0, dtype=np.int64), []
    common = parts[0].ids
    if all(np.array_equal(part.ids, common) for part in parts[1:]) and (common[1:] > common[:-1]).all():
        return common, [_representable(part.logprobs) for part in parts]
    marked = np.zeros(max(int(part.ids.max(initial=-1)) for part in parts) + 1, dtype=np.bool_)
    for part in parts:
        marked[part.ids] = True
    symbols = np.flatnonzero(marked)
    column = np.cumsum(marked) - 1
    rows = [np.full(symbols.size, -np.inf) for _ in parts]
    for row, part in zip(rows, parts, strict=True):
        row[column[part.ids]] = _representable(part.logprobs)
    return symbols, rows


def _representable(logprobs: Floats) -> Floats:
    """Return log-probabilities, -inf where a probability is 0 in float64; they may be those given."""
    least = logprobs.max(initial=-np.inf) + _LEAST_LOGPROB
    if logprobs.min(initial=0.0) >= least:
        return logprobs
    rows: Floats = np.where(logprobs < least, -np.inf, logprobs)
    return rows


@dataclass(frozen=True)
class Combination(ABC):
    """A combination rule. The fields of its dataclass are its parameters, checked when it is built.

    Attributes:
        name: Its name, as options have it.
        common_options: Members contribute plain distributions, and temperature and truncation apply to the combination
            (`with_sampling`); all members need the same options.
        roles: What each member is, in the order of the rows, or () where members differ by weight only.
        minimum_members: How few members the rule is defined for.
        shared_vocabulary: The rule divides by probabilities, so a symbol that one member can generate must be one that
            the others can: members need one vocabulary.
        speculates: Little is known before all members have run, so a strategy does best to draft and verify.
        alignment: Over what members' distributions are aligned.
        default_sampling: Sampling options that the rule is published with, where none are given.
        two_prompts: Its members are one model after different prompts.
        is_product: `C` is a product of powers, and `log_scores` gives it from log-probabilities.
        takes_reports: Its envelope holds where engines report their likeliest tokens alone, and comes close to `C` once
            all members have reported enough.
    """

    name: ClassVar[str]
    common_options: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ()
    minimum_members: ClassVar[int] = 2
    shared_vocabulary: ClassVar[bool] = False
    speculates: ClassVar[bool] = False
    alignment: ClassVar[Alignment] = "symbols"
    default_sampling: ClassVar[Mapping[str, Any]] = {}
    two_prompts: ClassVar[bool] = False
    is_product: ClassVar[bool] = False
    takes_reports: ClassVar[bool] = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Check what rules of one's own return wherever it is used, and take no shortcut of functions they replace."""
        super().__init_subclass__(**keywords)
        if not cls.__module__.startswith("mixlm."):
            from mixlm.core.combinations.function import check_results

            check_results(cls)

    @abstractmethod
    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return `C`, float64 (symbols,), summing to 1.

        Raises:
            UnsupportedError: It is not defined here, such as a product of distributions that share no symbol.
        """

    def from_logprobs(self, rows: Sequence[Floats], weights: Floats) -> Candidates:
        """Return `C` of a product (`is_product`) from log-probabilities, by the columns that have any probability.

        Args:
            rows: Each member's log-probabilities, float64 (symbols,), -inf for none.
            weights: float64 (members,).

        Raises:
            UnsupportedError: As `combine`.
        """
        return _PLAIN(self.log_scores(rows, weights))

    def log_scores(self, rows: Sequence[Floats], weights: Floats) -> Floats:
        """Return `log C` of a product up to a constant, float64 (symbols,). Arguments as in `from_logprobs`."""
        raise UnsupportedError(f"rule {self.name} is no product")

    def is_open(self, parts: Mapping[int, Candidates], weights: Floats) -> bool:
        """Whether the envelope is 0, where that is plain to see; False where it takes the envelope itself to tell.

        Args:
            parts: The distributions of the members that ran, by row.
            weights: float64 (members,).
        """
        return False

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
        return (
            self.combine(probs, weights)
            if complete(weights, ran, unreported)
            else self.bound(probs, weights, ran, unreported)
        )

    def bound(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return the envelope where a member has not run, or not reported everything. Arguments as in `envelope`."""
        return None

    def first_member(self, weights: Floats) -> Floats | None:
        """Return `π`, float64 (members,), summing to 1, where the rule tosses a coin first; None for other rules."""
        return None

    def first_distribution(
        self, row: Floats, weights: Floats, member: int, unreported: Unreported | None = None
    ) -> Floats:
        """Return the sub-distribution `S_i` with which the first member may stop, float64 (symbols,).

        Args:
            row: The member's distribution, float64 (symbols,).
            weights: float64 (members,).
            member: Which member it is.
            unreported: What the member did not report, with one row; None for nothing.
        """
        raise UnsupportedError(f"rule {self.name} tosses no coin first")

    def certain_winner(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> int | None:
        """Return the index of the symbol that is the most likely under `C` whatever the other members say, or None.

        Arguments as in `envelope`. The index is that of `np.argmax(combine(...))`; where rounding could decide, and
        something is still open, the answer is None.
        """
        if complete(weights, ran, unreported):
            return int(np.argmax(self.combine(probs, weights)))
        lower = self.envelope(probs, weights, ran, unreported)
        return None if lower is None else winner_by_bounds(lower, lower + (1 - lower.sum()), 1 - lower.sum())

    @staticmethod
    def of(
        function: Callable[[Floats, Floats], Floats],
        envelope: Callable[[Floats, Floats, Sequence[int]], Floats] | None = None,
        *,
        name: str = "function",
        common_options: bool = False,
    ) -> Combination:
        """Return a rule of one's own.

        Args:
            function: `C`: from `probs`, float64 (members, symbols), and `weights`, float64 (members,), to float64
                (symbols,), summing to 1.
            envelope: A lower bound of it from the same and the members that ran, whose rows alone are given (the others
                are zeros); without one all members run, or drafts are verified.
            name: What messages call it.
            common_options: Apply temperature and truncation to the combination, not to each member.

        Raises:
            ConfigError: One of them is no function. Their results are checked when they are used.
        """
        from mixlm.core.combinations.function import FunctionCombination

        return FunctionCombination(function, envelope, name, common_options)

    def with_sampling(self, sampling: Sampling) -> Combination:
        """Return the rule with temperature and truncation applied to the combination, for rules of `common_options`.

        The result has bounds of its own (`after`). Penalties are not applied: they are the members' own.
        """
        from mixlm.core.combinations.after import TransformedCombination

        return self if is_plain(sampling) else TransformedCombination(self, sampling)

    def check_members(self, count: int) -> None:
        """Raise ConfigError where an ensemble has the wrong number of members for the rule."""
        if self.roles and count != len(self.roles):
            names = ", ".join(self.roles)
            there = f"there {'is' if count == 1 else 'are'} {count}"
            raise ConfigError(f"rule {self.name} combines {len(self.roles)} members ({names}), and {there}")
        if count < self.minimum_members:
            raise ConfigError(
                f"rule {self.name} needs {self.minimum_members} members, and there is {count}", "add a member"
            )


def is_plain(sampling: Sampling) -> bool:
    """Whether temperature and truncation leave a distribution as it is."""
    return (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1, 0, 1, 0)


def winner_by_bounds(lower: Floats, upper: Floats, elsewhere: float) -> int | None:
    """Return the symbol whose lower bound is above every other's upper bound by more than rounding, or None.

    Args:
        lower, upper: float64 (symbols,), on any common scale of the order of 1.
        elsewhere: The upper bound of a symbol that is not among them.
    """
    if not lower.size:
        return None
    best = int(np.argmax(lower))
    highest = max(float(upper[:best].max(initial=0.0)), float(upper[best + 1 :].max(initial=0.0)), elsewhere)
    return best if lower[best] > highest + TOLERANCE else None


def normalized(mass: Floats, rule: str) -> Floats:
    """Scale what a rule gives each symbol to sum to 1. Raises UnsupportedError where all of it is 0."""
    total = mass.sum()
    if not total > 0:
        raise undefined(rule)
    scaled: Floats = mass / total
    return scaled


def undefined(rule: str) -> UnsupportedError:
    """Return the error for distributions of which a rule makes none."""
    return UnsupportedError(
        f"rule {rule} is not defined here: no token is possible under all members at once",
        "give the members the same options, or use another rule",
    )


def refuse_reports(rule: str, unreported: Unreported | None) -> None:
    """Raise UnsupportedError for a rule without bounds for reports, where a member did not report everything."""
    if unreported is not None and unreported.mass.any():
        raise UnsupportedError(
            f"rule {rule} needs whole distributions, and a member reports its likeliest tokens alone",
            "use an engine that returns all logits",
        )


def positive_members(weights: Floats) -> npt.NDArray[np.bool_]:
    """Return which members have a weight greater than 0, bool (members,)."""
    return np.asarray(weights) > 0


def complete(weights: Floats, ran: Sequence[int], unreported: Unreported | None) -> bool:
    """Whether all members have run and reported everything."""
    return len(ran) == len(weights) and (unreported is None or not unreported.mass.any())


def ran_mask(weights: Floats, ran: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return which members are in `ran`, bool (members,)."""
    mask = np.zeros(len(weights), dtype=np.bool_)
    mask[list(ran)] = True
    return mask


def check_parameter(rule: str, name: str, value: object, **spec: Any) -> None:
    """Raise ConfigError for a value that a rule's parameter may not have. spec: keywords of an `OptionSpec`."""
    try:
        OptionSpec(**spec).check(name, value)
    except ConfigError as error:
        raise ConfigError(error.message.replace("; it must", f"; for rule {rule} it must", 1), error.hint) from None
