"""Routers: the weights for a state. Fixed weights are the simplest router (paper, section 3.4)."""

from mixlm.routing.base import FixedRouter, Observation, Observes, PromptContext, Route, Router
from mixlm.routing.function import FunctionRouter
from mixlm.routing.gate_router import LearnedRouter
from mixlm.routing.prompt import PromptRouter

__all__ = [
    "FixedRouter",
    "FunctionRouter",
    "LearnedRouter",
    "Observation",
    "Observes",
    "PromptContext",
    "PromptRouter",
    "Route",
    "Router",
]
