"""What a router is, and what it may look at."""

from __future__ import annotations

from typing import Protocol

from mixlm.sampling import Floats
from mixlm.vocab.units import State


class Router(Protocol):
    """Weights for a state.

    They may depend on the prompts and on the text so far, and on nothing else: weights that look at a member's current
    distribution, or at who happened to run, would make the mixture follow another law than the average.
    """

    def weights(self, state: State) -> Floats:
        """Return one weight a member, float64 (members,), 0 or more, summing to 1."""
        ...
