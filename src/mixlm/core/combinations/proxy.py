"""`proxy`: a base model, moved by what tuning changed in a small one, `C(u) ∝ b(u) (t(u) / s(u))^β`; `strength` is β.

Source: proxy tuning, Liu et al. (COLM 2024, arXiv 2401.08565), β = 1; DExperts, Liu et al. (ACL 2021, arXiv
2105.03023), with an expert as t, an anti-expert as s, and α for β. b is the base, t the tuned and s the untuned
small model.

The small models need one vocabulary between them: a symbol that only the tuned one can generate is refused. The base
may have another one. A symbol that neither small model can generate keeps the base's probability, since they say
nothing about it; one that the base cannot generate is impossible. Temperature and truncation apply to C. The weights
are not used.

Envelope: 0, since the small models may make any symbol as unlikely as one likes; but where the base has one symbol
left, that is certain, and at β = 0 C is the base's distribution. Cost: the base drafts, or is drafted for; the small
models run at every position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mixlm.core.combinations.base import Combination, Unreported, check_parameter
from mixlm.core.combinations.log_linear import leaves_several, log_linear, log_linear_scores, only_symbol
from mixlm.types import Candidates, Floats


@dataclass(frozen=True)
class Proxy(Combination):
    """The base's distribution times the ratio of the small models' to the power `strength`."""

    name: ClassVar[str] = "proxy"
    common_options: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("base", "tuned", "untuned")
    minimum_members: ClassVar[int] = 3
    speculates: ClassVar[bool] = True
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_parameter(self.name, "strength", self.strength, minimum=0)

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the base's distribution, moved."""
        silent = (probs[1:] == 0).all(axis=0)
        rows = np.stack([probs[0], np.where(silent, 1.0, probs[1]), np.where(silent, 1.0, probs[2])])
        return log_linear(rows, self._exponents, self.name)

    def log_scores(self, rows: Sequence[Floats], weights: Floats) -> Floats:
        """Return the logarithm of the product."""
        base, *small = rows
        silent = (small[0] == -np.inf) & (small[1] == -np.inf)
        if silent.any():
            small = [np.where(silent, 0.0, row) for row in small]
        return log_linear_scores([base, *small], self._exponents, self.name)

    def is_open(self, parts: Mapping[int, Candidates], weights: Floats) -> bool:
        """Whether the base leaves several symbols."""
        return self.strength != 0 and leaves_several(parts, np.array([1.0, 0.0, 0.0]))

    def bound(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return certainty where the base has one symbol left, else nothing."""
        if self.strength == 0:
            return probs[0].copy() if 0 in ran else np.zeros(probs.shape[1])
        return only_symbol(probs, ran, np.array([1.0, 0.0, 0.0]), unreported)

    @property
    def is_product(self) -> bool:  # type: ignore[override]
        """Not where it is the base's distribution."""
        return self.strength != 0

    @property
    def _exponents(self) -> Floats:
        return np.array([1.0, self.strength, -self.strength])
