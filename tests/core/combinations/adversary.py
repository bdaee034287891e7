"""Distributions at random, and a search for those that break a bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from bounds import coin_share

from mixlm.core.combinations import Combination
from mixlm.errors import UnsupportedError
from mixlm.types import Floats

Margin = Callable[[Floats], float]  # how far rows are from breaking a bound; negative where they do
ROUNDING = 1e-9


def random_rows(rng: np.random.Generator, members: int, size: int) -> Floats:
    """Rows of many kinds: flat and peaked, nearly certain, with zeros, ties, equal and disjoint ones."""
    kind = rng.integers(7)
    rows = rng.dirichlet(np.full(size, rng.choice([0.05, 0.3, 1, 5])), members)
    if kind == 1:  # ties
        rows = np.round(rows * 4) + (rng.random(rows.shape) < 0.3)
    elif kind == 2:  # zeros
        rows = rows * (rng.random(rows.shape) < 0.5)
    elif kind == 3:  # nearly certain, often of the same symbol
        rows = rows * 10 ** -rng.uniform(2, 8)
        rows[np.arange(members), rng.integers(min(2, size), size=members)] = 1
    elif kind == 4:  # equal rows
        rows = np.repeat(rows[:1], members, axis=0)
    elif kind == 5:  # near ties
        rows = np.round(rows * 5) + 1e-6 * rows
    elif kind == 6:  # disjoint, but for one symbol
        rows = rows * (rng.integers(members, size=size) == np.arange(members)[:, None])
        rows[:, rng.integers(size)] += rng.random(members)
    empty = rows.sum(axis=1) == 0
    rows[empty, rng.integers(size)] = 1
    return rows / rows.sum(axis=1, keepdims=True)


def random_weights(rng: np.random.Generator, members: int) -> Floats:
    """Equal weights, or any."""
    if rng.random() < 0.4:
        return np.full(members, 1 / members)
    return rng.dirichlet(np.full(members, rng.choice([0.5, 2])))


def breaks(margin: Margin, rows: Floats, free: Sequence[int], rng: np.random.Generator, steps: int) -> float:
    """Return the smallest margin found by changing the rows of `free` members: mass moves from symbol to symbol."""
    best, value = rows.copy(), margin(rows)
    for _ in range(steps):
        trial = best.copy()
        for _ in range(rng.integers(1, 4)):
            _move(trial, int(rng.choice(free)), rng)
        trial_value = margin(trial)
        if trial_value <= value:
            best, value = trial, trial_value
        if value < -ROUNDING:
            break
    return value


def _move(rows: Floats, member: int, rng: np.random.Generator) -> None:
    row, size = rows[member], rows.shape[1]
    source, target = rng.integers(size, size=2)
    kind = rng.integers(6)
    if kind == 0:  # all of it to one symbol
        row[:] = 0
        row[target] = 1
    elif kind == 1:  # another member's row
        row[:] = rows[rng.integers(len(rows))]
    elif kind == 2:  # just above, or equal to, another symbol of the row or of the mean
        rival = rows.mean(axis=0)[rng.integers(size)] if rng.random() < 0.5 else row[rng.integers(size)]
        amount = min(max(rival - row[target] + rng.choice([0, 1e-7, -1e-7]), 0), row[source])
        row[source] -= amount
        row[target] += amount
    else:
        amount = row[source] * rng.choice([1, rng.random(), 10 ** -rng.uniform(1, 5)])
        row[source] -= amount
        row[target] += amount
    row /= row.sum()


def envelope_margin(rule: Combination, rows: Floats, weights: Floats, ran: Sequence[int], factor: float = 1) -> Margin:
    """How far `combine` stays above the envelope of the members in `ran`, whose rows are those given."""
    lower = rule.envelope(np.where(np.isin(np.arange(len(rows)), ran)[:, None], rows, np.nan), weights, ran)
    assert lower is not None

    def margin(trial: Floats) -> float:
        try:
            return float((rule.combine(trial, weights) - factor * lower).min())
        except UnsupportedError:  # the rule is not defined there
            return np.inf

    return margin


def coin_margin(rule: Combination, weights: Floats, factor: float = 1) -> Margin:
    """How far `combine` stays above what a coin first may emit."""

    def margin(trial: Floats) -> float:
        try:
            return float((rule.combine(trial, weights) - factor * coin_share(rule, trial, weights)).min())
        except UnsupportedError:
            return np.inf

    return margin
