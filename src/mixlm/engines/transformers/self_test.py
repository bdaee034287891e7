"""Tests of the ways to run a model when it is loaded: each must give what forward passes of whole texts give.

Models differ in what their attention needs and in what they let a caller pass; devices differ in what they can capture.
So a path is tried out, not derived from the model's name. The text of a trial is a few tokens, but more than the
windows, blocks and the like of a model where these are short. It takes about ten forward passes, four of the whole
text, and as many again for each path that fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch

from mixlm.engines.tokenizer_setup import error_summary
from mixlm.types import Ids, Logits

LENGTH = 24  # tokens
_SHORT = 128
# Total variation. In bfloat16, rounding alone makes up to 0.03 between two ways to compute a distribution.
TOLERANCE = 0.05
EXACT_TOLERANCE = 1e-4  # in float32
# Lengths in a configuration beyond which a model attends, or counts positions, otherwise.
_SPECIAL = re.compile(
    r"window|chunk|original_max_position|local|conv|kernel|block_(size|len)|stride|topk|ratio|compress"
)

Pairs = Iterable[tuple[Logits, Logits]]  # logits, (n,), of two ways to run a model at the same positions


class Tolerance(NamedTuple):
    """How far two ways to run a model may differ. aggregate: of the total variations at all positions, what counts."""

    largest: float
    aggregate: Callable[[Sequence[float]], float] = max

    @classmethod
    def of(cls, dtype: torch.dtype) -> Tolerance:
        """Return that of ways to run a whole model.

        Below float32 a rounding may choose another expert somewhere; what is computed otherwise differs at most
        positions.
        """
        return cls(EXACT_TOLERANCE) if dtype is torch.float32 else cls(TOLERANCE, mean)

    def distance(self, pairs: Pairs) -> float:
        """Return how far the distributions of all pairs lie apart."""
        return self.aggregate([total_variation(*pair) for pair in pairs])


def failure(
    trial: Callable[[], Pairs],
    tolerance: Tolerance = Tolerance(TOLERANCE),  # noqa: B008 - immutable
    larger: Callable[[], float] | None = None,
) -> str | None:
    """Return why a trial failed; None where its pairs give nearly equal distributions.

    larger: makes a larger tolerance, where the given one is exceeded.
    """
    try:
        distance = tolerance.distance(trial())
    except NotImplementedError as error:
        return error_summary(error)
    except Exception as error:
        return f"a trial fails: {error_summary(error)}"
    if distance < tolerance.largest or (larger is not None and distance < larger()):
        return None
    return f"its distributions differ from those of whole texts by {distance:.2g}"


def total_variation(a: Logits, b: Logits) -> float:
    """Return the total variation distance of two distributions, given by their logits, (n,)."""
    p, q = (np.exp(x.astype(np.float64) - x.max()) for x in (a, b))
    return float(0.5 * np.abs(p / p.sum() - q / q.sum()).sum())


def sample_ids(vocab_size: int, length: int = LENGTH) -> Ids:
    """Return the tokens of a trial: int64 (length,)."""
    return np.arange(length, dtype=np.int64) % vocab_size


def special_lengths(config: Any) -> dict[str, int]:
    """Return the lengths in a configuration beyond which a model may attend otherwise, by their names."""
    lengths: dict[str, int] = {}

    def collect(fields: dict[str, Any]) -> None:
        for key, value in fields.items():
            if isinstance(value, dict):
                collect(value)
            elif isinstance(value, int) and not isinstance(value, bool) and _SPECIAL.search(str(key)):
                lengths[str(key)] = max(value, lengths.get(str(key), 0))

    collect(config.get_text_config(decoder=True).to_dict())
    return lengths


def trial_length(config: Any) -> int:
    """Return how many tokens a trial of a model has: more than each of its special lengths that is short."""
    return max([LENGTH, *(n * 5 // 4 + 8 for n in special_lengths(config).values() if n <= _SHORT)])


def max_length(config: Any) -> int:
    """Return how many tokens a text may have so that the answers are certain to be equal: as many as are selected."""
    selected = special_lengths(config).get("index_topk", 0)
    return selected if selected >= trial_length(config) else 1 << 20
