"""`mean-then-temper`: the temperature of the average, `C(u) ∝ (Σ_i λ_i q_i(u))^(1/T)`; nothing is truncated.

It is `mean-then-truncate` with a temperature alone: the same bounds, source and cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mixlm.core.combinations.average import Average
from mixlm.core.combinations.base import Combination
from mixlm.errors import ConfigError
from mixlm.types import Sampling


@dataclass(frozen=True)
class MeanThenTemper(Average):
    """The average, whose temperature applies to it."""

    name: ClassVar[str] = "mean-then-temper"
    common_options: ClassVar[bool] = True
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
