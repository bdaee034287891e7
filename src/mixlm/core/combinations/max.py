"""`max`: the largest of the members' probabilities, `C(u) = max_i q_i(u) / Z`. The weights only say who takes part.

Source: the maximum rule of classifier combination (Kittler et al., 1998); the limit of `power` for r → ∞. Defined for
every unit, for members with options of their own.

Envelope, for n members of which I ran: `L_I(u) = max_I q(u) / (Σ_v max_I q(v) + n − |I|)`. A missing member adds at
most its whole mass, 1, to Z, when it shares no symbol with the others; u gains nothing then: the bound is attained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mixlm.core.combinations.base import Combination, Unreported, normalized, positive_members, ran_mask
from mixlm.types import Floats


@dataclass(frozen=True)
class Max(Combination):
    """The members' largest probability of each symbol, normalised."""

    name: ClassVar[str] = "max"

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the normalised maximum."""
        return normalized(probs[positive_members(weights)].max(axis=0), self.name)

    def envelope(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return the maximum over the members that ran, over the largest possible sum."""
        active, done = positive_members(weights), ran_mask(weights, ran)
        top = np.where((active & done)[:, None], probs, 0.0).max(axis=0)
        total = top.sum() + (active & ~done).sum()
        if unreported is not None:
            total += unreported.mass[active & done].sum()
        lower: Floats = top / total if total > 0 else np.zeros_like(top)
        return lower
