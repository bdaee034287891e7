"""Products of powers, `C(u) ∝ Π_i q_i(u)^{e_i}`: `geometric`, `proxy` and `guidance`; `contrastive` is one, too.

Envelope: 0 in general, because a member that has not run may give any symbol probability 0, or make a divisor
arbitrarily small. Two exceptions: if the members that ran leave one common symbol, it is certain; if only one member
counts, C is its distribution. Cost: drafts and their verification. Temperature and truncation apply to C.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mixlm.core import slices
from mixlm.core.combinations.base import Combination, Unreported, check_parameter, normalized, undefined
from mixlm.errors import UnsupportedError
from mixlm.types import Candidates, Floats


class LogLinear(Combination):
    """A product of powers.

    A symbol to which a member with a positive exponent gives probability 0 has probability 0, unless a rule overrides
    it (`Proxy`).
    """

    common_options: ClassVar[bool] = True
    speculates: ClassVar[bool] = True

    @abstractmethod
    def exponents(self, weights: Floats) -> Floats:
        """Return `e`, float64 (members,); members of exponent 0 do not count."""

    def needed(self, weights: Floats) -> npt.NDArray[np.bool_]:
        """Return the members without which a symbol is impossible, bool (members,)."""
        return np.asarray(self.exponents(weights) > 0)

    @property
    def is_product(self) -> bool:  # type: ignore[override]
        """Whether it is a product: not where one role alone counts."""
        return self._only is None

    @property
    def _only(self) -> int | None:
        """The role that counts alone, if one does."""
        if not self.roles:
            return None
        counted = np.flatnonzero(self.exponents(np.zeros(0)))
        return int(counted[0]) if counted.size == 1 else None

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the normalised product."""
        with np.errstate(divide="ignore"):
            scores = self.log_scores(list(np.log(probs)), weights)
        return normalized(np.exp(scores - scores.max()), self.name)

    def log_scores(self, rows: Sequence[Floats], weights: Floats) -> Floats:
        """Return the logarithm of the product.

        Raises:
            UnsupportedError: No symbol is possible, or the probability that a power divides by is 0.
        """
        powers = [*zip(rows, self.exponents(weights).tolist(), strict=True)]
        scores = np.zeros_like(rows[0])
        for elements in slices(scores.size):
            for row, exponent in powers:
                if exponent > 0:
                    scores[elements] += exponent * row[elements]
        for row, exponent in powers:
            if exponent >= 0:
                continue
            if row.min(initial=0.0) > -np.inf:
                for elements in slices(scores.size):
                    scores[elements] += exponent * row[elements]
                continue
            possible = scores > -np.inf
            if (row[possible] == -np.inf).any():
                raise UnsupportedError(
                    f"rule {self.name} divides by a member's probability, and it is 0 for a token that the others can "
                    "generate",
                    "use members that share one vocabulary",
                )
            scores[possible] += exponent * row[possible]
        if not scores.max(initial=-np.inf) > -np.inf:
            raise undefined(self.name)
        return scores

    def is_open(self, parts: Mapping[int, Candidates], weights: Floats) -> bool:
        """Whether several symbols are left."""
        return self.is_product and leaves_several(parts, self.needed(weights))

    def bound(self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None) -> Floats:
        """Return certainty where one symbol is left, or what the only member that counts gives; else nothing."""
        if self._only is None:
            return only_symbol(probs, ran, self.needed(weights), unreported)
        return probs[self._only].copy() if self._only in ran else np.zeros(probs.shape[1])


@dataclass(frozen=True)
class Geometric(LogLinear):
    """`geometric`: the weighted geometric mean, `C(u) ∝ Π_i q_i(u)^{s λ_i}`, a weighted average of logits.

    Source: logarithmic opinion pool (Genest and Zidek, 1986); with exponents of 1, a product of experts (Hinton, 2002).
    `strength` s scales the weights to exponents: 1 is the mean, the number of members with equal weights the plain
    product. Defined for every unit where some symbol is possible under all members.

    Engines that report their likeliest tokens, for s ≥ 1: `reports_bound`; by Hölder's inequality unreported symbols
    add at most `Π m_i^{s λ_i}`, m_i the unreported masses.
    """

    name: ClassVar[str] = "geometric"
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_parameter(self.name, "strength", self.strength, above=0)

    @property
    def takes_reports(self) -> bool:  # type: ignore[override]
        """Whether reports suffice: for strength ≥ 1. Below 1, unreported symbols may hold any share of the mass."""
        return self.strength >= 1

    def exponents(self, weights: Floats) -> Floats:
        """Return the weights, scaled."""
        return self.strength * weights

    def bound(self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None) -> Floats:
        """Return certainty where one symbol is left, else nothing; with reports of all members, what they leave."""
        if unreported is None or len(ran) < len(weights) or not self.takes_reports:
            return super().bound(probs, weights, ran, unreported)
        exponents = self.exponents(weights)
        counted = exponents > 0

        def product(rows: Floats) -> Floats:
            powers: Floats = (rows[counted] ** exponents[counted][:, None]).prod(axis=0)
            return powers

        return reports_bound(product, probs, unreported, float(product(unreported.mass[:, None])[0]))


@dataclass(frozen=True)
class Proxy(LogLinear):
    """`proxy`: a base model, moved by what tuning changed in a small one, `C(u) ∝ b(u) (t(u) / s(u))^β`.

    Source: proxy tuning, Liu et al. (COLM 2024, arXiv 2401.08565), β = 1; DExperts, Liu et al. (ACL 2021, arXiv
    2105.03023), with an expert as t, an anti-expert as s, and α for β. b is the base, t the tuned and s the untuned
    small model, `strength` is β. The weights are not used.

    The small models need one vocabulary between them: a symbol that only the tuned one can generate is refused. The
    base may have another one. A symbol that neither small model can generate keeps the base's probability, since they
    say nothing about it; one that the base cannot generate is impossible.

    Cost: the base drafts, or is drafted for; the small models run at every position.
    """

    name: ClassVar[str] = "proxy"
    roles: ClassVar[tuple[str, ...]] = ("base", "tuned", "untuned")
    minimum_members: ClassVar[int] = 3
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_parameter(self.name, "strength", self.strength, minimum=0)

    def exponents(self, weights: Floats) -> Floats:
        """Return the exponents of the roles."""
        return np.array([1.0, self.strength, -self.strength])

    def needed(self, weights: Floats) -> npt.NDArray[np.bool_]:
        """Return the base alone.

        A tuned probability of 0 does not rule a symbol out if the untuned model's is 0 too.
        """
        return np.array([True, False, False])

    def log_scores(self, rows: Sequence[Floats], weights: Floats) -> Floats:
        """Return the logarithm of the product; see `LogLinear`."""
        base, *small = rows
        silent = (small[0] == -np.inf) & (small[1] == -np.inf)
        if silent.any():
            small = [np.where(silent, 0.0, row) for row in small]
        return super().log_scores([base, *small], weights)


@dataclass(frozen=True)
class Guidance(LogLinear):
    """`guidance`: classifier-free guidance, `C(u) ∝ c(u)^γ / n(u)^(γ − 1)`: `log n + γ (log c − log n)`.

    Source: Sanchez et al. (ICML 2024, arXiv 2306.17806), after Ho and Salimans (2022); `guidance_scale` of
    transformers. c is one model after the whole prompt, n the same model after the negative prompt, or without the
    prompt; `strength` is γ. γ = 1 is c alone, γ = 0 is n; between them C is a geometric mean. Members need one
    vocabulary: one model read twice has it. The weights are not used. Cost: both readings fit into one forward of it.
    """

    name: ClassVar[str] = "guidance"
    roles: ClassVar[tuple[str, ...]] = ("conditional", "unconditional")
    shared_vocabulary: ClassVar[bool] = True
    two_prompts: ClassVar[bool] = True
    strength: float = 1.5

    def __post_init__(self) -> None:
        check_parameter(self.name, "strength", self.strength, minimum=0)

    def exponents(self, weights: Floats) -> Floats:
        """Return the exponents of the roles."""
        return np.array([self.strength, 1 - self.strength])


def leaves_several(parts: Mapping[int, Candidates], needed: npt.NDArray[np.bool_]) -> bool:
    """Whether members that are needed, and ran, plainly leave several symbols: see `only_symbol`."""
    counted = [part.ids for row, part in parts.items() if needed[row]]
    if not counted:
        return True
    return counted[0].size > 1 and all(np.array_equal(ids, counted[0]) for ids in counted[1:])


def only_symbol(
    probs: Floats, ran: Sequence[int], needed: npt.NDArray[np.bool_], unreported: Unreported | None = None
) -> Floats:
    """Return the envelope that supports give, float64 (symbols,): 1 for a symbol that is the only possible one, else 0.

    A member that is `needed`, bool (members,), rules out what it gives no probability. Where those that ran leave one
    symbol, the combination is that symbol, if it is defined at all.
    """
    lower = np.zeros(probs.shape[1])
    whole = [i for i in ran if needed[i] and (unreported is None or unreported.mass[i] == 0)]
    if whole:
        left = np.flatnonzero((probs[whole] > 0).all(axis=0))
        if left.size == 1:
            lower[left[0]] = 1.0
    return lower


def reports_bound(value: Callable[[Floats], Floats], probs: Floats, unreported: Unreported, elsewhere: float) -> Floats:
    """Return the envelope of `C(u) = f(q(u)) / Σ_v f(q(v))` after reports of all members, float64 (symbols,).

    Where f grows with every member's probability, `C(u) ≥ f(l) / (f(l) + Σ_{v≠u} f(h) + e)`, with the least l and the
    most h that each symbol can have.

    Args:
        value: f, from rows, float64 (members, symbols), to float64 (symbols,).
        probs: What is reported.
        unreported: What is not.
        elsewhere: e, the most that f sums to over symbols that no member reports.
    """
    lower, upper = value(probs), value(unreported.upper(probs))
    others = np.maximum(upper.sum() - upper, 0.0) + elsewhere
    total = lower + others
    out = np.zeros_like(lower)
    np.divide(lower, total, out=out, where=total > 0)
    return out
