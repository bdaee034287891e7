"""How sure a score is, and how sure a difference of two scores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy import stats

from mixlm.types import Floats

Interval = tuple[float, float]

LEVEL = 0.95
_FLIPS = 20_000
_BLOCK = 500
_EXACT = 14  # with so few questions that differ, all sign patterns are gone through


def t_interval(values: Sequence[float] | Floats) -> Interval | None:
    """Return the 95 % interval of a mean by Student's t; None for fewer than two values."""
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return None
    half = stats.t.ppf((1 + LEVEL) / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size)
    return float(array.mean() - half), float(array.mean() + half)


def sign_flip_p(differences: Floats, seed: int = 0) -> float:
    """Return the two-sided p-value of a mean difference of 0, from differences (n,) of paired values.

    If two methods are equally good, each question's difference could as well have had the other sign. The p-value is
    the share of sign patterns whose mean is as far from 0 as the one found; from 20,000 random patterns where there are
    too many to go through. With one yes-or-no answer a question this is McNemar's exact test.
    """
    moved = differences[differences != 0]
    if moved.size == 0:
        return 1.0
    if (abs(moved) == abs(moved[0])).all():
        return float(stats.binomtest(int((moved > 0).sum()), moved.size).pvalue)
    observed = abs(moved.sum()) * (1 - 1e-12)
    if moved.size <= _EXACT:
        patterns = np.array(list(product((-1.0, 1.0), repeat=moved.size))).reshape(-1, moved.size)
        return float((abs(patterns @ moved) >= observed).mean())
    rng = np.random.default_rng(seed)
    far = 0
    for _ in range(_FLIPS // _BLOCK):
        patterns = rng.integers(0, 2, size=(_BLOCK, moved.size)) * 2.0 - 1.0
        far += int((abs(patterns @ moved) >= observed).sum())
    return (far + 1) / (_FLIPS + 1)
