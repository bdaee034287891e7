"""Log-linear combinations, `C(u) ∝ Π_i q_i(u)^{e_i}`: what products, contrasts and guidance have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mixlm.core import slices
from mixlm.core.combinations.base import Unreported, normalized
from mixlm.errors import UnsupportedError
from mixlm.types import Candidates, Floats


def log_linear(probs: Floats, exponents: Floats, rule: str) -> Floats:
    """Return the normalised product of powers, float64 (symbols,).

    A symbol to which a member with a positive exponent gives no probability has none, whatever the others say.

    Args:
        probs: float64 (members, symbols).
        exponents: float64 (members,); members of exponent 0 do not count.
        rule: Its name, for errors.

    Raises:
        UnsupportedError: No symbol is possible, or the probability that a power divides by is 0.
    """
    possible = (probs[exponents > 0] > 0).all(axis=0)
    if (probs[exponents < 0][:, possible] == 0).any():
        raise _zero_divisor(rule)
    out = np.zeros(probs.shape[1])
    if possible.any():
        counted = exponents != 0
        scores = exponents[counted] @ np.log(probs[counted][:, possible])
        out[possible] = np.exp(scores - scores.max())
    return normalized(out, rule)


def log_linear_scores(rows: Sequence[Floats], exponents: Floats, rule: str) -> Floats:
    """Return the logarithm of what `log_linear` returns, up to a constant, float64 (symbols,).

    Args:
        rows: Each member's log-probabilities, float64 (symbols,), -inf for none.
        exponents, rule: As in `log_linear`.

    Raises:
        UnsupportedError: As `log_linear`.
    """
    factors = [(row, exponent) for row, exponent in zip(rows, exponents.tolist(), strict=True) if exponent > 0]
    divisors = [(row, exponent) for row, exponent in zip(rows, exponents.tolist(), strict=True) if exponent < 0]
    scores = np.zeros_like(rows[0])
    for elements in slices(scores.size):
        for row, exponent in factors:
            scores[elements] += exponent * row[elements]
    for row, exponent in divisors:
        if row.min(initial=0.0) > -np.inf:
            for elements in slices(scores.size):
                scores[elements] += exponent * row[elements]
            continue
        possible = scores > -np.inf
        if (row[possible] == -np.inf).any():
            raise _zero_divisor(rule)
        scores[possible] += exponent * row[possible]
    if not scores.max(initial=-np.inf) > -np.inf:
        normalized(np.zeros(1), rule)  # raises
    return scores


def leaves_several(parts: Mapping[int, Candidates], exponents: Floats) -> bool:
    """Whether members that count, and ran, leave several symbols, where that is plain to see: see `only_symbol`."""
    counted = [part.ids for row, part in parts.items() if exponents[row] > 0]
    if not counted:
        return True
    return counted[0].size > 1 and all(np.array_equal(ids, counted[0]) for ids in counted[1:])


def reports_bound(value: Callable[[Floats], Floats], probs: Floats, unreported: Unreported, elsewhere: float) -> Floats:
    """Return the envelope of `C(u) = f(q(u)) / Σ_v f(q(v))` after reports of all members, float64 (symbols,).

    Where f grows with every member's probability, `C(u) ≥ f(l) / (f(l) + Σ_{v≠u} f(h) + e)`, with the least l and the
    most h that each symbol can have.

    Args:
        value: f, from rows, float64 (members, symbols), to float64 (symbols,).
        probs: What is reported.
        unreported: What is not.
        elsewhere: e, the most that f sums to over symbols that no member reports.
    """
    lower, upper = value(probs), value(unreported.upper(probs))
    others = np.maximum(upper.sum() - upper, 0.0) + elsewhere
    total = lower + others
    out = np.zeros_like(lower)
    np.divide(lower, total, out=out, where=total > 0)
    return out


def only_symbol(probs: Floats, ran: Sequence[int], exponents: Floats, unreported: Unreported | None = None) -> Floats:
    """Return the envelope that supports give, float64 (symbols,): 1 for a symbol that is the only possible one, else 0.

    A member with a positive exponent rules out what it gives no probability. Where those that ran leave one symbol, the
    combination is that symbol, if it is defined at all.
    """
    lower = np.zeros(probs.shape[1])
    positive = [i for i in ran if exponents[i] > 0 and (unreported is None or unreported.mass[i] == 0)]
    if positive:
        left = np.flatnonzero((probs[positive] > 0).all(axis=0))
        if left.size == 1:
            lower[left[0]] = 1.0
    return lower


def _zero_divisor(rule: str) -> UnsupportedError:
    return UnsupportedError(
        f"rule {rule} divides by a member's probability, and it is 0 for a token that the others can generate",
        "use members that share one vocabulary",
    )
