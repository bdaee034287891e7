"""The same weights for every state."""

from __future__ import annotations

import numpy as np

from mixlm.routing.base import PromptContext, Route, check_weights
from mixlm.types import Floats


class FixedRouter:
    """The ensemble's weights, float64 (members,), summing to 1, for every state."""

    def __init__(self, weights: Floats) -> None:
        self.weights = check_weights(weights, np.size(weights), self)
        self.members = len(self.weights)

    def begin(self, context: PromptContext) -> Route:
        """Return a route that ignores the state."""
        return lambda state: self.weights
