"""Mixtures of distributions over shared symbols: `r(u) = Σ_i λ_i (K_i A_i p_i)(u)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np

from mixlm.core import slices
from mixlm.errors import ConfigError
from mixlm.option_spec import as_float
from mixlm.types import Candidates, Floats, Ids

_EXAMPLE = "for example 0.7,0.3; only their proportions count"
# Of larger weights the sum may overflow.
_LARGEST = 1e300


def normalized_weights(weights: Sequence[float] | None, members: int) -> Floats:
    """Check the weights of an ensemble and scale them to sum to 1.

    Args:
        weights: One per member, of any positive scale; None for equal weights.
        members: How many members there are.

    Returns:
        The weights, float64 (members,).

    Raises:
        ConfigError: There are too few or too many, one is negative or not finite, or all are zero.
    """
    if weights is None:
        return np.full(members, 1 / members)
    # A set has no order, and an iterator can be read only once.
    is_array = getattr(weights, "ndim", 1) > 0 and hasattr(weights, "__getitem__")
    if isinstance(weights, str | bytes | Mapping) or not is_array:
        raise ConfigError(f"weights is {weights!r}; it must be a list with one number per member", _EXAMPLE)
    numbers: list[object] = list(weights)
    if not all(isinstance(value, Real) and not isinstance(value, bool) for value in numbers):
        raise ConfigError(f"weights are {numbers!r}; each must be a number", _EXAMPLE)
    values = np.asarray([as_float(value) for value in numbers])
    shown = ", ".join(f"{value:g}" for value in values)
    if values.size != members:
        raise ConfigError(
            f"{_count(values.size, 'weight')} ({shown}) for {_count(members, 'member')}",
            "give one weight per member, in the same order",
        )
    if not np.isfinite(values).all() or (values < 0).any():
        raise ConfigError(f"weights are {shown}; each must be a finite number, 0 or more", _EXAMPLE)
    if values.max() == 0:
        raise ConfigError(f"weights are {shown}; at least one must be greater than 0", _EXAMPLE)
    if values.max() > _LARGEST:
        values = values / values.max()
    normalised: Floats = values / values.sum()
    return normalised


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def pool(symbols: Ids, logprobs: Floats) -> Candidates:
    """Add up the probabilities of equal symbols.

    Args:
        symbols: int64 (n,), not empty.
        logprobs: Their natural log-probabilities, float64 (n,).

    Returns:
        Distinct symbols in ascending order; those whose probability underflows are left out.
    """
    top = logprobs.max()
    mass = np.exp(logprobs - top)
    if symbols.size * 16 > symbols.max():
        # Most of the vocabulary is there: counting into a table is far cheaper than sorting.
        table = np.bincount(symbols, weights=mass)
        distinct = np.flatnonzero(table)
        return Candidates(distinct, np.log(table[distinct]) + top)
    # Probabilities that underflow are left out, as in the table.
    symbols, mass = symbols[mass > 0], mass[mass > 0]
    distinct, inverse = np.unique(symbols, return_inverse=True)
    return Candidates(distinct, np.log(np.bincount(inverse, weights=mass)) + top)


def mix(components: Sequence[tuple[float, Candidates]]) -> Candidates:
    """Return the weighted sum of distributions; those of weight 0 are ignored."""
    positive = [(weight, distribution) for weight, distribution in components if weight > 0]
    if len(positive) == 1 and positive[0][0] == 1:
        return positive[0][1]
    symbols = positive[0][1].ids
    is_common = all(np.array_equal(distribution.ids, symbols) for _, distribution in positive)
    if not is_common or not (symbols[1:] > symbols[:-1]).all():
        symbols = np.concatenate([distribution.ids for _, distribution in positive])
        return pool(
            symbols, np.concatenate([distribution.logprobs + np.log(weight) for weight, distribution in positive])
        )
    logprobs = np.empty(symbols.size)
    for elements in slices(symbols.size):
        total = sum(weight * np.exp(distribution.logprobs[elements]) for weight, distribution in positive)
        with np.errstate(divide="ignore"):
            np.log(total, out=logprobs[elements])
    possible = logprobs > -np.inf
    return Candidates(symbols, logprobs) if possible.all() else Candidates(symbols[possible], logprobs[possible])


def mixture_logprobs(logprobs: Floats, weights: Floats) -> Floats:
    """Return `log Σ_i λ_i P_i` of each segment of a text: float64 (segments,).

    Args:
        logprobs: `log P_i` of each segment under each member, float64 (segments, members).
        weights: `λ`, float64 (members,) or (segments, members).
    """
    mixture: Floats = np.logaddexp.reduce(_joint_logprobs(logprobs, weights), axis=1)
    return mixture


def segment_responsibilities(logprobs: Floats, weights: Floats) -> Floats:
    """Return the probability, given the text, that each member generated each segment: float64 (segments, members).

    A segment that no member can generate says nothing about them and leaves them their weights. Arguments as for
    `mixture_logprobs`.
    """
    joint, mixture = _joint_logprobs(logprobs, weights), mixture_logprobs(logprobs, weights)
    possible = np.isfinite(mixture)
    shares: Floats = np.array(np.broadcast_to(weights, joint.shape), dtype=np.float64)
    shares[possible] = np.exp(joint[possible] - mixture[possible, None])
    return shares


def _joint_logprobs(logprobs: Floats, weights: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        joint: Floats = logprobs + np.log(weights)
    return joint
