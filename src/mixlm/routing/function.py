"""Weights from a user-defined function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mixlm.core.mixing import normalized_weights
from mixlm.routing.base import PromptContext, Route
from mixlm.types import Floats
from mixlm.units.base import TextView

TAIL = 4096


class FunctionRouter:
    """Weights from a function of the prompt and the last 4096 bytes of the text so far.

    The function must depend on these alone. The weights that it returns are checked and scaled to sum to 1.
    """

    def __init__(self, function: Callable[[bytes, bytes], Sequence[float]], members: int) -> None:
        self._function = function
        self._members = members

    def begin(self, context: PromptContext) -> Route:
        """Return the function, bound to the prompt."""

        def route(state: TextView) -> Floats:
            return normalized_weights(self._function(context.text, state.tail(TAIL)), self._members)

        return route
