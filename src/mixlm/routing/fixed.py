"""The same weights for every state."""

from __future__ import annotations

from mixlm.routing.base import Context, Route
from mixlm.types import Floats


class Fixed:
    """An ensemble's own weights, float64 (members,), summing to 1."""

    def __init__(self, weights: Floats) -> None:
        self.weights = weights

    def begin(self, context: Context) -> Route:
        """Return the weights, whatever the prompt and the state."""
        return lambda state: self.weights
