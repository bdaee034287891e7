"""Weights by how well each member predicts the prompt.

Reading it is the prefill, done ahead for every member; the first token of the reply then needs no forward of its own.
"""

from __future__ import annotations

import numpy as np

from mixlm.errors import ConfigError
from mixlm.routing.base import PromptContext, Route
from mixlm.types import Floats


class PromptRouter:
    """Scales an ensemble's weights by 2^(-sharpness · bits per byte of the prompt), for the whole reply.

    sharpness: 0 leaves the weights; the larger, the more the member that knows this kind of text writes.
    """

    def __init__(self, weights: Floats, sharpness: float = 4.0) -> None:
        if not sharpness >= 0 or not np.isfinite(sharpness):
            raise ConfigError(f"sharpness is {sharpness}; it must be a finite number, 0 or more")
        self._weights = weights
        self._sharpness = sharpness

    def begin(self, context: PromptContext) -> Route:
        """Let every member read the prompt, and weigh it by what it made of it."""
        weights = weights_by_bits(self._weights, context.bits_per_byte(), self._sharpness)
        return lambda state: weights


def weights_by_bits(weights: Floats, bits_per_byte: Floats, sharpness: float) -> Floats:
    """Return weights scaled by 2^(-sharpness · bits per byte), summing to 1.

    A member that finds the prompt impossible gets weight 0, unless all of them do.
    """
    # Seen from the best of those that take part at all, so that its scale is 1 and the sum cannot vanish.
    best = bits_per_byte[weights > 0].min()
    if not np.isfinite(best) or sharpness == 0:
        return weights
    scaled: Floats = np.where(weights > 0, weights * np.exp2(-sharpness * np.maximum(bits_per_byte - best, 0)), 0.0)
    scaled /= scaled.sum()
    return scaled
