"""Tests of a runner's faster paths when a model is loaded: each must give what the plain forward pass gives.

Models differ in what their attention needs and in what they let a caller pass; devices differ in what they can capture.
So a path is tried out, not derived from the model's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from mixlm.errors import MemoryLimitError
from mixlm.types import Ids, Logits

LENGTH = 24  # tokens
TOLERANCE = 0.05  # total variation; bfloat16 alone makes up to 0.03
# Errors of a model or a device that cannot do what is tried.
_FAILURES = (MemoryLimitError, NotImplementedError, TypeError, ValueError, RuntimeError, KeyError, AttributeError)


def passes(trial: Callable[[], Iterable[tuple[Logits, Logits]]]) -> bool:
    """Whether a trial ends without an error, and each pair of logits, (n,), gives nearly equal distributions."""
    try:
        return all(total_variation(logits, expected) < TOLERANCE for logits, expected in trial())
    except _FAILURES:
        return False


def total_variation(a: Logits, b: Logits) -> float:
    """Return the total variation distance of two distributions, given by their logits, (n,)."""
    p, q = (np.exp(x.astype(np.float64) - x.max()) for x in (a, b))
    return float(0.5 * np.abs(p / p.sum() - q / q.sum()).sum())


def sample_ids(vocab_size: int) -> Ids:
    """Return the tokens of a trial: int64 (LENGTH,)."""
    return np.arange(LENGTH, dtype=np.int64) % vocab_size
