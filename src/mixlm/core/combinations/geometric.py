"""`geometric`: the weighted geometric mean, `C(u) ∝ Π_i q_i(u)^{s λ_i}`, a weighted average of logits.

Source: logarithmic opinion pool (Genest and Zidek, 1986); with exponents of 1, a product of experts (Hinton, 2002).
`strength` s scales the weights to exponents: 1 is the mean, the number of members with equal weights the plain
product. Defined for every unit where some symbol is possible under all members; temperature and truncation apply to
the mean.

Envelope: 0, since a missing member can give any symbol nothing, which makes the product 0; but where the members
that ran have one symbol left in common, that symbol is certain. Engines that report their likeliest tokens, for s ≥
1: `log_linear.reports_bound`; by Hölder's inequality unreported symbols add at most `Π m_i^{s λ_i}`, m_i the
unreported masses. Cost: drafts and their verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mixlm.core.combinations.base import Combination, Unreported, check_parameter
from mixlm.core.combinations.log_linear import leaves_several, log_linear, log_linear_scores, only_symbol, reports_bound
from mixlm.types import Candidates, Floats


@dataclass(frozen=True)
class Geometric(Combination):
    """The normalised product of the members' distributions, each to the power of its weight times `strength`."""

    name: ClassVar[str] = "geometric"
    common_options: ClassVar[bool] = True
    speculates: ClassVar[bool] = True
    is_product: ClassVar[bool] = True
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_parameter(self.name, "strength", self.strength, above=0)

    @property
    def takes_reports(self) -> bool:  # type: ignore[override]
        """Below 1, many unreported symbols may have any part of the mass."""
        return self.strength >= 1

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the normalised product."""
        return log_linear(probs, self.strength * weights, self.name)

    def log_scores(self, rows: Sequence[Floats], weights: Floats) -> Floats:
        """Return the logarithm of the product."""
        return log_linear_scores(rows, self.strength * weights, self.name)

    def is_open(self, parts: Mapping[int, Candidates], weights: Floats) -> bool:
        """Whether several symbols are left."""
        return leaves_several(parts, weights)

    def bound(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return certainty where one symbol is left, else nothing; with reports of all members, what they leave."""
        if unreported is None or len(ran) < len(weights) or not self.takes_reports:
            return only_symbol(probs, ran, weights, unreported)
        exponents = self.strength * weights
        counted = exponents > 0

        def product(rows: Floats) -> Floats:
            powers: Floats = (rows[counted] ** exponents[counted][:, None]).prod(axis=0)
            return powers

        return reports_bound(product, probs, unreported, float(product(unreported.mass[:, None])[0]))
