"""`contrastive`: what an expert finds more likely than an amateur, among the symbols that the expert finds plausible.

Source: contrastive decoding, Li et al. (ACL 2023, arXiv 2210.15097), and its form for sampling, O'Brien and Lewis
(2023, arXiv 2309.09117). With `V = {u : e(u) ≥ α max e}` and `strength` β,

    form "weighted"   C(u) ∝ e(u)^(1+β) / a(u)^β   on V    O'Brien and Lewis: α = 0.1, β = 0.5 (the default)
    form "original"   C(u) ∝ e(u) / a(u)^β         on V    Li et al.: α = 0.1, β = 1, or 1/τ for an amateur at τ

and C(u) = 0 elsewhere. Both papers take the most likely symbol or beams of it; sampling follows C. Members need one
vocabulary, since a symbol that the amateur cannot generate would be infinitely good: refused. Temperature and
truncation apply to C. The weights are not used.

Envelope: after the expert, 1 for u where V = {u}, since C is a distribution on V, and C itself at β = 0. Otherwise
0: an amateur that is certain of u, and of nothing else in V, makes C(u) as small as one likes. With the amateur
alone it is 0. C depends on proportions within V alone: engines that report their likeliest tokens decide it where
what the expert leaves out is below α of its largest, and the amateur reports all of V. Cost: one forward of the
expert where it is sure (no other symbol has α of its largest probability); else both, or drafts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mixlm.choices import CONTRASTIVE_FORMS, ContrastiveForm
from mixlm.core.combinations.base import TOLERANCE, Unreported, check_parameter
from mixlm.core.combinations.log_linear import LogLinear
from mixlm.types import Candidates, Floats


@dataclass(frozen=True)
class Contrastive(LogLinear):
    """The expert's distribution against the amateur's.

    Attributes:
        strength: β, how much the amateur counts.
        alpha: Which share of the largest of the expert's probabilities is plausible; 0 for every symbol.
        form: Which of the published formulas.
    """

    name: ClassVar[str] = "contrastive"
    roles: ClassVar[tuple[str, ...]] = ("expert", "amateur")
    shared_vocabulary: ClassVar[bool] = True
    takes_reports: ClassVar[bool] = True
    strength: float = 0.5
    alpha: float = 0.1
    form: ContrastiveForm = "weighted"

    def __post_init__(self) -> None:
        check_parameter(self.name, "strength", self.strength, minimum=0)
        check_parameter(self.name, "alpha", self.alpha, minimum=0, maximum=1)
        check_parameter(self.name, "form", self.form, choices=CONTRASTIVE_FORMS)

    def exponents(self, weights: Floats) -> Floats:
        """Return the exponents of the roles."""
        return np.array([1.0 if self.form == "original" else 1 + self.strength, -self.strength])

    def log_scores(self, rows: Sequence[Floats], weights: Floats) -> Floats:
        """Return the logarithm of the contrast; see `LogLinear`."""
        expert, amateur = rows
        plausible = expert >= expert.max() + self._log_alpha
        return super().log_scores([np.where(plausible, expert, -np.inf), amateur], weights)

    def is_open(self, parts: Mapping[int, Candidates], weights: Floats) -> bool:
        """Whether the expert finds several symbols plausible."""
        if 0 not in parts:
            return True
        if self.strength == 0:
            return False
        logprobs = parts[0].logprobs
        return int(np.count_nonzero(logprobs >= logprobs.max(initial=-np.inf) + self._log_alpha)) > 1

    def bound(self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None) -> Floats:
        """Return certainty where the expert finds one symbol plausible, or where reports decide; else nothing."""
        lower = np.zeros(probs.shape[1])
        if 0 not in ran:
            return lower
        expert = probs[0]
        threshold = self.alpha * expert.max(initial=0.0) * (1 - TOLERANCE)  # in logarithms, rounding is another
        plausible = (expert >= threshold) & (expert > 0)
        if unreported is not None and unreported.mass[0] > 0:
            possible = expert + unreported.open[0] * unreported.ceiling[0]
            # What is left out may be plausible, or raise the threshold.
            decided = unreported.ceiling[0] < threshold and (possible[~plausible] < threshold).all()
            if not decided or (expert[plausible] < self.alpha * possible.max()).any():
                return lower
        needed = {0} if self.strength == 0 else {0, 1}
        if plausible.sum() == 1:
            lower[plausible] = 1.0
        elif needed <= {*ran} and (unreported is None or not unreported.open[list(needed)][:, plausible].any()):
            return self.combine(probs, weights)
        return lower

    @property
    def _log_alpha(self) -> float:
        return math.log(self.alpha) if self.alpha else -math.inf
