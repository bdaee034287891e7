"""Weights by how well each member predicts the prompt.

The log-probabilities of the prompt come from the prefill of every member, after which the first token needs no forward.
"""

from __future__ import annotations

import numpy as np

from mixlm.errors import ConfigError
from mixlm.routing.base import PromptContext, Route, given_weights
from mixlm.types import Floats


class PromptRouter:
    """The ensemble's weights times 2^(-sharpness · bits per byte of the prompt), for the whole completion.

    A sharpness of 0 keeps the weights; a larger one favors the members that predict the prompt best.
    """

    def __init__(self, weights: Floats, sharpness: float = 4.0) -> None:
        if not sharpness >= 0 or not np.isfinite(sharpness):
            raise ConfigError(f"sharpness is {sharpness}; it must be a finite number, 0 or more")
        self._weights = given_weights(weights, self)
        self.members = len(self._weights)
        self._sharpness = sharpness

    def begin(self, context: PromptContext) -> Route:
        """Run the prefill of every member and return a route with the resulting weights."""
        weights = weights_by_bits(self._weights, context.bits_per_byte(), self._sharpness)
        return lambda state: weights


def weights_by_bits(weights: Floats, bits_per_byte: Floats, sharpness: float) -> Floats:
    """Return the weights times 2^(-sharpness · bits per byte), scaled to sum to 1.

    A member that gives the prompt probability 0 gets weight 0, unless all members do.
    """
    # Relative to the best member of positive weight, whose factor is then 1, so that the sum cannot underflow.
    best = bits_per_byte[weights > 0].min()
    if not np.isfinite(best) or sharpness == 0:
        return weights
    scaled: Floats = np.where(weights > 0, weights * np.exp2(-sharpness * np.maximum(bits_per_byte - best, 0)), 0.0)
    scaled /= scaled.sum()
    return scaled
