"""A rule of one's own: any function of the members' distributions, and an envelope where one is known.

The function's result is checked at every use. Without an envelope the rule is exact and drafts, or runs all members;
with one it stops early. A wrong envelope is refused where all members have run, which they do at some positions
(`layered`), and found by `mixlm check`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import numpy as np

from mixlm.core.combinations.base import Combination, Unreported, refuse_reports
from mixlm.errors import ConfigError
from mixlm.option_spec import call_function, check_function
from mixlm.types import Floats

RuleFunction = Callable[[Floats, Floats], Floats]
EnvelopeFunction = Callable[[Floats, Floats, Sequence[int]], Floats]


@dataclass(frozen=True)
class FunctionCombination(Combination):
    """A combination rule from functions; see `Combination.of`."""

    function: RuleFunction
    own_envelope: EnvelopeFunction | None = None
    own_name: str = "function"
    own_common_options: bool = False

    def __post_init__(self) -> None:
        check_function(self.function, ("probs", "weights"), "the rule")
        if self.own_envelope is not None:
            check_function(self.own_envelope, ("probs", "weights", "ran"), "the rule's envelope")
        object.__setattr__(self, "name", self.own_name)
        object.__setattr__(self, "common_options", self.own_common_options)
        object.__setattr__(self, "speculates", self.own_envelope is None)

    def combine(self, probs: Floats, weights: Floats) -> Floats:
        """Return the function's distribution."""
        return self.function(probs.copy(), weights.copy())

    def bound(
        self, probs: Floats, weights: Floats, ran: Sequence[int], unreported: Unreported | None = None
    ) -> Floats | None:
        """Return the function's lower bound. It is given zeros for the members that have not run.

        Raises:
            ConfigError: It returned None.
            UnsupportedError: Something is unreported, which the function does not know about.
        """
        if self.own_envelope is None:
            return None
        refuse_reports(self.name, unreported)
        rows = np.zeros_like(probs)
        rows[list(ran)] = probs[list(ran)]
        lower = self.own_envelope(rows, weights.copy(), tuple(ran))
        if lower is None:  # elsewhere that is no bound
            raise ConfigError(f"the envelope of rule {self.name} returned None; it must be an array of numbers")
        return lower


def check_results(rule: type[Combination]) -> None:
    """Check what the functions of a class return wherever it is used, and take no shortcut of those that it replaces.

    A function raises ConfigError where it fails, or returns what is none of its results: another shape, a number that
    is complex, negative or not finite, or a sum that is not 1, or greater than 1. Functions of other rules are checked
    already; those of a base that is no rule are checked here.
    """
    for name in ("combine", "bound", "envelope", "certain_winner", "first_member", "first_distribution"):
        owner = next(base for base in rule.__mro__ if name in vars(base))
        if owner is rule or not issubclass(owner, Combination):
            if name != "certain_winner":
                setattr(rule, name, _checked_method(vars(owner)[name], name))
            for shortcut in ("is_product", "is_open"):
                if shortcut not in vars(rule):
                    setattr(rule, shortcut, vars(Combination)[shortcut])


_SUBJECTS = {"combine": "rule", "bound": "the envelope of rule", "envelope": "the envelope of rule"}
_FIRST_ARGUMENT = {"first_member": "weights", "first_distribution": "row"}


def _checked_method(method: Any, name: str) -> Callable[..., Any]:
    @wraps(method)
    def checked(self: Combination, *args: Any, **keywords: Any) -> Floats | None:
        subject = f"{_SUBJECTS.get(name, f'{name} of rule')} {self.name}"
        result = call_function(partial(method.__get__(self), *args, **keywords), subject)
        if result is None and name in ("bound", "envelope", "first_member"):
            return None
        first: Floats = args[0] if args else keywords[_FIRST_ARGUMENT.get(name, "probs")]
        values = _checked_values(result, first.shape[-1], subject)
        total = float(values.sum())
        if name in ("combine", "first_member"):
            if abs(total - 1) > 1e-6:
                raise ConfigError(f"{subject} returned probabilities that sum to {total:.6g}; they must sum to 1")
            return values / total
        if total > 1 + 1e-6:
            raise ConfigError(f"{subject} sums to {total:.6g}; it must be at most 1")
        return values

    return checked


def _checked_values(result: Any, size: int, subject: str) -> Floats:
    try:
        is_complex = np.iscomplexobj(result)
        values = np.zeros(0) if is_complex else np.asarray(result, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{subject} returned {type(result).__name__}; it must be an array of numbers") from None
    if is_complex:
        raise ConfigError(f"{subject} returned complex numbers; all must be real")
    if values.shape != (size,):
        raise ConfigError(f"{subject} returned the shape {values.shape}; it must be ({size},), a value per symbol")
    if not np.isfinite(values).all():
        raise ConfigError(f"{subject} returned a value that is not finite; all must be numbers of 0 or more")
    if (values < 0).any():
        raise ConfigError(f"{subject} returned the negative value {values.min():g}; all must be 0 or more")
    return values


check_results(FunctionCombination)
