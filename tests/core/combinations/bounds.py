"""What bounds of rules add up to, and whether they hold: the plain form of what strategies do with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.core.combinations.base import TOLERANCE, Combination
from mixlm.types import Floats


def increments(rule: Combination, probs: Floats, weights: Floats, order: Sequence[int]) -> Floats:
    """Return what each member of an order adds to the envelope, float64 (members, symbols): rows sum to `C`.

    The greatest of the bounds so far is a bound, so rows are 0 or more even where a rule's bounds are not monotone.

    Args:
        rule: A rule, with or without an envelope; without one all of `C` comes with the last member.
        probs: Rows of all members, float64 (members, symbols).
        weights: float64 (members,).
        order: All members, in the order in which they run.
    """
    levels = np.zeros((len(order) + 1, probs.shape[1]))
    for count in range(1, len(order)):
        lower = rule.envelope(probs, weights, order[:count])
        levels[count] = levels[count - 1] if lower is None else np.maximum(levels[count - 1], lower)
    levels[-1] = np.maximum(rule.combine(probs, weights), levels[-2])  # by rounding only, see `check_bounds`
    return np.diff(levels, axis=0)


def coin_share(rule: Combination, probs: Floats, weights: Floats) -> Floats:
    """Return `Σ_i π_i S_i`, what a coin first may emit, float64 (symbols,), for a rule that tosses one."""
    coin = rule.first_member(weights)
    if coin is None:
        raise AssertionError(f"rule {rule.name} tosses no coin first")
    out = np.zeros(probs.shape[1])
    for member in np.flatnonzero(coin > 0).tolist():
        out += coin[member] * rule.first_distribution(probs[member], weights, member)
    return out


def remainder(rule: Combination, probs: Floats, weights: Floats) -> Floats:
    """Return the distribution to sample from where the first member did not stop: `C − Σ π_i S_i`, normalised."""
    combined = rule.combine(probs, weights)
    rest = np.maximum(combined - coin_share(rule, probs, weights), 0.0)
    total = rest.sum()
    # Nothing but rounding is left where the coin always stops.
    return rest / total if total > 0 else combined


def check_bounds(rule: Combination, probs: Floats, weights: Floats, order: Sequence[int] | None = None) -> None:
    """Assert that a rule's bounds do not exceed its combination, for members that run in an order."""
    combined = rule.combine(probs, weights)
    order = range(len(weights)) if order is None else order
    for count in range(1, len(order) + 1):
        lower = rule.envelope(probs, weights, order[:count])
        if lower is not None:
            _check_bound(lower, combined, f"the envelope of rule {rule.name} after {count} of {len(order)} members")
    if rule.first_member(weights) is not None:
        _check_bound(coin_share(rule, probs, weights), combined, f"what rule {rule.name} emits after one member")


def _check_bound(lower: Floats, combined: Floats, subject: str) -> None:
    assert np.shape(lower) == combined.shape
    assert np.isfinite(lower).all()
    assert lower.min(initial=0.0) >= -TOLERANCE
    assert (lower <= combined + TOLERANCE).all(), f"{subject} exceeds the combination"
