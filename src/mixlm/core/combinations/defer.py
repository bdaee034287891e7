"""`defer`: keep the first member's token u with probability `a(u)`, otherwise ask the next member, and so on.

    C = a_1 q_1 + (1 − Σ a_1 q_1) (a_2 q_2 + (1 − Σ a_2 q_2) (… q_n))

where a_i, from 0 to 1 for each symbol, is any function of member i's distribution. Special cases: cascades by
confidence (Chow, 1970; FrugalGPT, Chen et al., 2023; Gupta et al., ICLR 2024), which keep all or nothing; routers of
single tokens, R2R (Fu et al., 2025, arXiv 2505.21600) and CITER (Zheng et al., 2025, arXiv 2502.01976), by a
function of one's own.

    by "top"       a = 1 where the largest probability is at least `strength`, else 0 for all
    by "entropy"   a = 1 where the entropy in nats is at most `strength`
    by "token"     a(u) = 1 where q(u) is at least `strength`
    accept         a function from q, float64 (symbols,), to a, of the same shape

Defined for every unit, for members with options of their own, in the order of the members; a weight of 0 leaves a
member out, and others are not used.

Envelope: what the members of the longest prefix 1 … j keep, `Σ_{i ≤ j} (Π_{h < i} (1 − A_h)) a_i q_i` with `A_h = Σ
a_h q_h`. Each term depends on members up to i alone, and the rest of the mass goes where the next one wants: it is
attained. Engines that report their likeliest tokens: for "top" and "token", what is kept for certain, and at the next
member what is left at least. Cost: `1 + (1 − A_1) + (1 − A_1)(1 − A_2) + …` forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from mixlm.choices import DEFER_BY, DeferBy
from mixlm.core.combinations.base import Combination, Unreported, check_parameter
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.option_spec import call_function, check_function
from mixlm.types import Floats

_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Defer(Combination):
    """Members in a chain: each keeps some of its tokens and leaves the others to the next.

    Attributes:
        strength: The threshold.
        by: What is compared with it.
        accept: A function of one's own, in place of `by` and `strength`.
    """

    name: ClassVar[str] = "defer"
    strength: float = 0.5
    by: DeferBy = "top"
    accept: Callable[[Floats], Floats] | None = None

    def __post_init__(self) -> None:
        check_parameter(self.name, "by", self.by, choices=DEFER_BY)
        largest = {} if self.by == "entropy" else {"maximum": 1}
        check_parameter(self.name, "strength", self.strength, minimum=0, **largest)
        if self.accept is not None:
            check_function(self.accept, ("distribution",), "accept")

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return what the chain keeps, and all of the last member's."""
        return self._chain(probs, len(weights))

    def bound(self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None) -> Floats:
        """Return what the members that ran keep, up to the first that has not.

        Raises:
            UnsupportedError: A member's whole distribution is needed to decide, and it was not reported.
        """
        if unreported is not None and unreported.mass.any() and not self.takes_reports:
            raise UnsupportedError(
                f"rule {self.name} decides by whole distributions, and a member reports its likeliest tokens alone",
                "use by='top' or by='token'",
            )
        return self._chain(probs, next(i for i in range(len(weights) + 1) if i not in ran), unreported)

    @property
    def takes_reports(self) -> bool:  # type: ignore[override]
        """Entropies, and functions of one's own, are of whole distributions."""
        return self.by != "entropy" and self.accept is None

    def acceptance(self, distribution: Floats) -> Floats:
        """Return `a`: float64, the shape of the distribution."""
        if self.accept is not None:
            return self._own_acceptance(distribution)
        if self.by == "token":
            return np.where(distribution >= self.strength, 1.0, 0.0)
        if self.by == "top":
            keeps = distribution.max(initial=0.0) >= self.strength
        else:
            positive = distribution[distribution > 0]
            keeps = -(positive * np.log(positive)).sum() <= self.strength
        return np.full(distribution.shape, float(keeps))

    def _own_acceptance(self, distribution: Floats) -> Floats:
        assert self.accept is not None
        result = call_function(partial(self.accept, distribution.copy()), "accept")
        try:
            if result is None or np.iscomplexobj(result):
                raise TypeError
            a = np.asarray(result, dtype=np.float64)
        except (TypeError, ValueError):
            raise ConfigError(
                f"accept returned {type(result).__name__}; it must be an array of real numbers, or one number"
            ) from None
        if a.shape not in ((), distribution.shape):
            raise ConfigError(f"accept returned the shape {a.shape}; it must be {distribution.shape}, or a number")
        if not ((a >= 0) & (a <= 1)).all():
            raise ConfigError(f"accept returned {a[~((a >= 0) & (a <= 1))].flat[0]:g}; it must be from 0 to 1")
        return np.broadcast_to(a, distribution.shape)

    def _chain(self, probs: Floats, count: int, unreported: Unreported | None = None) -> Floats:
        """Return what the first members of the chain keep, at least; the last of all members keeps everything."""
        kept, left = np.zeros(probs.shape[1]), 1.0
        upper = probs if unreported is None else unreported.upper(probs)
        for member, row in enumerate(probs[:count]):
            if member == len(probs) - 1:
                kept += left * row
                break
            share = self.acceptance(row) * row
            kept += left * share
            largest = float(share.sum())
            if unreported is not None and unreported.mass[member] > 0:
                mass = float(unreported.mass[member])
                hidden = min(float(unreported.ceiling[member]) / max(1 - mass, _TINY), mass)
                possible = self.acceptance(np.append(upper[member], hidden)) > 0
                largest = float(row[possible[:-1]].sum()) + mass * possible.any()
            left *= max(1 - largest, 0.0)
        return kept
