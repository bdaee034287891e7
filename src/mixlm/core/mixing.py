"""Weighted sums of distributions over shared symbols: `r(u) = Σ_i λ_i (K_i A_i p_i)(u)`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mixlm.errors import ConfigError
from mixlm.types import Candidates, Floats, Ids

_EXAMPLE = "for example 0.7,0.3; only their proportions count"


def checked_weights(weights: Sequence[float] | None, members: int) -> Floats:
    """Return `members` weights that sum to 1, float64 (members,); None means equal weights.

    Raises ConfigError when their number is wrong, or one is negative or not finite, or all are zero.
    """
    if weights is None:
        return np.full(members, 1 / members)
    values = np.asarray(list(weights), dtype=np.float64)
    shown = ", ".join(f"{w:g}" for w in values)
    if values.size != members:
        given, there = _count(values.size, "weight"), _count(members, "member")
        raise ConfigError(f"{given} ({shown}) for {there}", "give one weight a member, in the same order")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ConfigError(f"weights are {shown}; each must be a finite number, 0 or more", _EXAMPLE)
    if values.sum() == 0:
        raise ConfigError(f"weights are {shown}; at least one must be greater than 0", _EXAMPLE)
    normalised: Floats = values / values.sum()
    return normalised


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def pooled(symbols: Ids, logprobs: Floats) -> Candidates:
    """Add up the probabilities of equal symbols. Returns distinct symbols in ascending order."""
    top = logprobs.max()
    mass = np.exp(logprobs - top)
    if symbols.size * 16 > symbols.max():
        # Most of the vocabulary takes part: counting into a table is far cheaper than sorting.
        table = np.bincount(symbols, weights=mass)
        distinct = np.flatnonzero(table)
        return Candidates(distinct, np.log(table[distinct]) + top)
    # Probabilities too small for a float take no part, as in the table.
    symbols, mass = symbols[mass > 0], mass[mass > 0]
    distinct, where = np.unique(symbols, return_inverse=True)
    return Candidates(distinct, np.log(np.bincount(where, weights=mass)) + top)


def mixed(parts: Sequence[tuple[float, Candidates]]) -> Candidates:
    """Return the weighted sum of distributions; parts of weight 0 take no part."""
    live = [(weight, part) for weight, part in parts if weight > 0]
    symbols = np.concatenate([part.ids for _, part in live])
    logprobs = np.concatenate([part.logprobs + np.log(weight) for weight, part in live])
    return pooled(symbols, logprobs)


def responsibilities(symbol: int, parts: Sequence[tuple[float, Candidates]]) -> npt.NDArray[np.float64]:
    """Return each part's share of the probability of `symbol`: float64 (parts,), sums to 1."""
    mass = np.zeros(len(parts))
    for i, (weight, part) in enumerate(parts):
        found = np.flatnonzero(part.ids == symbol)
        if found.size and weight > 0:
            mass[i] = weight * np.exp(part.logprobs[found[0]])
    mass /= mass.sum()
    return mass
