"""Routers: the weights for a state. Fixed weights are the simplest router (paper, section 3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {"FunctionRouter": "function", "LearnedRouter": "gate_router", "PromptRouter": "prompt"}


def __getattr__(name: str) -> Any:
    """Import routers when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module 'mixlm.routing' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mixlm.routing.{_MODULES.get(name, 'base')}"), name)


def __dir__() -> list[str]:
    """Return the public names, those too that are imported later."""
    return sorted({*globals(), *__all__})
