"""Weights from a user-defined function."""

from __future__ import annotations

import numpy as np

from mixlm.core.mixing import normalized_weights
from mixlm.errors import ConfigError
from mixlm.option_spec import check_function
from mixlm.routing.base import PromptContext, Route, RouterFunction
from mixlm.types import Floats
from mixlm.units.base import TextView

FUNCTION_TAIL = 4096


class FunctionRouter:
    """Weights from a function of the prompt and the last 4096 bytes of the text so far.

    The function must depend on these alone. The weights that it returns are checked and scaled to sum to 1.

    Raises:
        ConfigError: It is no function of two arguments, or there is no member.
    """

    def __init__(self, function: RouterFunction, members: int) -> None:
        check_function(function, ("prompt", "text"), "the router's function")
        if isinstance(members, bool) or not isinstance(members, int | np.integer) or members < 1:
            raise ConfigError(f"members is {members!r}; it must be the number of the ensemble's members")
        self.members = int(members)
        self._function = function

    def begin(self, context: PromptContext) -> Route:
        """Return the function, bound to the prompt."""

        def route(state: TextView) -> Floats:
            weights = self._function(context.text, state.tail(FUNCTION_TAIL))
            if weights is None:
                raise ConfigError("the router's function returned None", "return one weight per member")
            try:
                return normalized_weights(weights, self.members)
            except ConfigError as error:
                raise ConfigError(
                    f"the router's function returned wrong weights: {error.message}", error.hint
                ) from error

        return route
