"""The same weights for every state."""

from __future__ import annotations

from mixlm.sampling import Floats
from mixlm.vocab.units import State


class Fixed:
    """An ensemble's own weights, float64 (members,), summing to 1."""

    def __init__(self, weights: Floats) -> None:
        self._weights = weights

    def weights(self, state: State) -> Floats:
        """Return the weights, whatever the state."""
        return self._weights
