"""`guidance`: classifier-free guidance, `C(u) ∝ c(u)^γ / n(u)^(γ − 1)`: `log n + γ (log c − log n)`; `strength` is γ.

Source: Sanchez et al. (ICML 2024, arXiv 2306.17806), after Ho and Salimans (2022); `guidance_scale` of transformers.
c is one model after the whole prompt, n the same model after the negative prompt, or without the prompt. γ = 1 is c
alone, γ = 0 is n; between them C is a geometric mean. Members need one vocabulary: one model read twice has it.
Temperature and truncation apply to C. The weights are not used.

Envelope: 0 for γ > 1, since n may make any symbol as unlikely as one likes, and for γ < 1, as in any product; but
where a reading that counts has one symbol left, that is certain. Cost: both readings fit into one forward of the
model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mixlm.core.combinations.base import Combination, Unreported, check_parameter
from mixlm.core.combinations.log_linear import leaves_several, log_linear, log_linear_scores, only_symbol
from mixlm.types import Candidates, Floats


@dataclass(frozen=True)
class Guidance(Combination):
    """The distribution after the prompt, extrapolated from the one after the negative prompt."""

    name: ClassVar[str] = "guidance"
    common_options: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("conditional", "unconditional")
    shared_vocabulary: ClassVar[bool] = True
    two_prompts: ClassVar[bool] = True
    speculates: ClassVar[bool] = True
    strength: float = 1.5

    def __post_init__(self) -> None:
        check_parameter(self.name, "strength", self.strength, minimum=0)

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the guided distribution."""
        return log_linear(probs, self._exponents, self.name)

    def log_scores(self, rows: Sequence[Floats], weights: Floats) -> Floats:
        """Return the logarithm of the product."""
        return log_linear_scores(rows, self._exponents, self.name)

    def is_open(self, parts: Mapping[int, Candidates], weights: Floats) -> bool:
        """Whether several symbols are left."""
        return self.strength not in (0, 1) and leaves_several(parts, self._exponents)

    def bound(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return certainty where one symbol is left, else nothing."""
        if self.strength in (0, 1):
            only = 0 if self.strength == 1 else 1
            return probs[only].copy() if only in ran else np.zeros(probs.shape[1])
        return only_symbol(probs, ran, self._exponents, unreported)

    @property
    def is_product(self) -> bool:  # type: ignore[override]
        """Not where it is one of the members."""
        return self.strength not in (0, 1)

    @property
    def _exponents(self) -> Floats:
        return np.array([self.strength, 1 - self.strength])
