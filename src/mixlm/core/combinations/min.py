"""`min`: the smallest of the members' probabilities, `C(u) = min_i q_i(u) / Z`. The weights only say who takes part.

Source: the minimum rule of classifier combination (Kittler et al., 1998); the limit of `power` for r → −∞. Defined
for every unit where some symbol is possible under all members; temperature and truncation apply to the minimum.

Envelope: 0, since a missing member can make any symbol impossible; but a symbol that is the only one left to the
members that ran is certain. Engines that report their likeliest tokens: `log_linear.reports_bound`, since a minimum
over unreported symbols sums to at most the smallest unreported mass. Cost: drafts and their verification.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mixlm.core.combinations.base import Combination, Unreported, normalized, positive_members
from mixlm.core.combinations.log_linear import leaves_several, only_symbol, reports_bound
from mixlm.types import Candidates, Floats


@dataclass(frozen=True)
class Min(Combination):
    """The members' smallest probability of each symbol, normalised."""

    name: ClassVar[str] = "min"
    common_options: ClassVar[bool] = True
    speculates: ClassVar[bool] = True
    takes_reports: ClassVar[bool] = True

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the normalised minimum."""
        return normalized(probs[positive_members(weights)].min(axis=0), self.name)

    def is_open(self, parts: Mapping[int, Candidates], weights: Floats) -> bool:
        """Whether several symbols are left."""
        return leaves_several(parts, weights)

    def bound(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return certainty where one symbol is left, else nothing; with reports of all members, what they leave."""
        if unreported is None or len(ran) < len(weights):
            return only_symbol(probs, ran, weights, unreported)
        active = positive_members(weights)
        return reports_bound(
            lambda rows: np.asarray(rows[active].min(axis=0)), probs, unreported, float(unreported.mass[active].min())
        )
