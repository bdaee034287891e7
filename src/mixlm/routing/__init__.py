"""Routers: the weights for a state. Fixed weights are the simplest router (paper, section 3.4)."""

from mixlm.routing.base import PromptContext, Route, Router
from mixlm.routing.fixed import FixedRouter
from mixlm.routing.function import FunctionRouter
from mixlm.routing.learned import LearnedRouter
from mixlm.routing.prompt import PromptRouter

__all__ = ["FixedRouter", "FunctionRouter", "LearnedRouter", "PromptContext", "PromptRouter", "Route", "Router"]
