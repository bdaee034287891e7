"""Routers: weights for a state. An ensemble with fixed weights is the simplest of them (paper, section 3.4)."""

from mixlm.routing.base import Context, Route, Router
from mixlm.routing.fixed import Fixed
from mixlm.routing.function import ByFunction
from mixlm.routing.learned import Learned
from mixlm.routing.prompt import ByPrompt

__all__ = ["ByFunction", "ByPrompt", "Context", "Fixed", "Learned", "Route", "Router"]
