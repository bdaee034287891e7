"""The same weights for every state."""

from __future__ import annotations

from mixlm.routing.base import PromptContext, Route
from mixlm.types import Floats


class FixedRouter:
    """An ensemble's own weights, float64 (members,), summing to 1."""

    def __init__(self, weights: Floats) -> None:
        self.weights = weights

    def begin(self, context: PromptContext) -> Route:
        """Return the weights, whatever the prompt and the state."""
        return lambda state: self.weights
