"""`mean-then-truncate`: temperature and truncation of the average, `C = A(Σ_i λ_i q_i)`, instead of each member.

Source: what most published ensembles sample. Members contribute plain distributions (penalties are their own), so
all need the same options. Defined for every unit. Without options it is the average.

Envelope and coin first: those of the average, `Σ_I λ_i q_i` and `π = λ`, through `after`. For T < 1 and n members,
`S_i = F(λ_i q_i) / π'_i` is at least `λ_i^(α−1) q_i^α / (λ_i Z_i + 1 − λ_i)`, `Z_i = Σ q_i^α`. For top-k, `S_i =
q_i(u)` where the k cheapest rivals cost more than the others' weight. Temperatures above 1 have no bound and draft.
Cost: 1.4 to 1.6 forwards of two members for top-5 or T = 0.7."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixlm.core.combinations.average import Average


@dataclass(frozen=True)
class MeanThenTruncate(Average):
    """The average, whose options apply to it (`with_sampling`)."""

    name: ClassVar[str] = "mean-then-truncate"
    common_options: ClassVar[bool] = True
