"""The weighted arithmetic mean, `C(u) = Σ_i λ_i q_i(u)`, a mixture of experts over probabilities, and its variants.

Source: the paper's target distribution; linear opinion pool (Stone, 1961). Defined for every unit.

Coin first: `π = λ`, `S_i = q_i`; `Σ π_i S_i` is `C` itself, so one member always suffices. Envelope: `L_I` is the
sum over I, since a missing member can give a symbol nothing. Both are attained, so none is tighter. Cost: one
forward a token.

With temperature and truncation of the mean, `C = A(Σ_i λ_i q_i)`, both go through `after`. For T < 1 and n members,
`S_i = F(λ_i q_i) / π'_i` is at least `λ_i^(α−1) q_i^α / (λ_i Z_i + 1 − λ_i)`, `Z_i = Σ q_i^α`. For top-k, `S_i =
q_i(u)` where the k cheapest rivals cost more than the others' weight. Temperatures above 1 have no bound and draft.
Cost: 1.4 to 1.6 forwards of two members for top-5 or T = 0.7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mixlm.core.combinations.base import Alignment, Combination, Unreported
from mixlm.errors import ConfigError
from mixlm.types import Floats, Sampling


@dataclass(frozen=True)
class Average(Combination):
    """`average`: the weighted mean of the members' distributions, each with options of its own."""

    name: ClassVar[str] = "average"
    takes_reports: ClassVar[bool] = True
    minimum_members: ClassVar[int] = 1

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return `Σ λ_i q_i`."""
        return weights @ probs

    def bound(self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None) -> Floats:
        """Return what the members that ran contribute."""
        members = list(ran)
        lower: Floats = weights[members] @ probs[members]
        return lower

    def first_member(self, weights: Floats) -> Floats | None:
        """Return the weights."""
        return weights

    def first_distribution(
        self, row: Floats, weights: Floats, member: int, unreported: Unreported | None = None
    ) -> Floats:
        """Return the member's distribution."""
        return row


@dataclass(frozen=True)
class MeanThenTruncate(Average):
    """`mean-then-truncate`: temperature and truncation of the mean, instead of each member's.

    What most published ensembles sample. Members contribute plain distributions (penalties are their own), so all need
    the same options. Without options it is the average.
    """

    name: ClassVar[str] = "mean-then-truncate"
    common_options: ClassVar[bool] = True


@dataclass(frozen=True)
class MeanThenTemper(MeanThenTruncate):
    """`mean-then-temper`: a temperature alone, `C(u) ∝ (Σ_i λ_i q_i(u))^(1/T)`; nothing is truncated."""

    name: ClassVar[str] = "mean-then-temper"
    default_sampling: ClassVar[Mapping[str, Any]] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}

    def with_sampling(self, sampling: Sampling) -> Combination:
        """Return the rule at a temperature. Raises ConfigError where truncation is asked for."""
        for name, off in self.default_sampling.items():
            if getattr(sampling, name) != off:
                raise ConfigError(
                    f"{name} is {getattr(sampling, name):g}, and rule {self.name} has a temperature alone",
                    "use --rule mean-then-truncate",
                )
        return super().with_sampling(sampling)


@dataclass(frozen=True)
class GaC(MeanThenTruncate):
    """`gac`: the average over the union of the members' token strings, of which the most likely is taken.

    Source: Yu et al. (Findings of EMNLP 2024, arXiv 2406.12585). Over strings, it is the average; what is special is
    which tokens are the same: those that tokenizers spell alike (`alignment`), where other rules pool tokens of equal
    bytes. The published choice is temperature 0; temperature and truncation, where given, apply to the average.
    """

    name: ClassVar[str] = "gac"
    alignment: ClassVar[Alignment] = "strings"
