"""The same weights for every state."""

from __future__ import annotations

from mixlm.routing.base import PromptContext, Route
from mixlm.types import Floats


class FixedRouter:
    """The ensemble's weights, float64 (members,), summing to 1, for every state."""

    def __init__(self, weights: Floats) -> None:
        self.weights = weights

    def begin(self, context: PromptContext) -> Route:
        """Return a route that ignores the state."""
        return lambda state: self.weights
