"""Several language models write one text, at the cost of one model a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mixlm.errors import MixlmError
from mixlm.version import __version__

if TYPE_CHECKING:
    from mixlm.ensemble import Chat, Ensemble
    from mixlm.generation.generation import Generation
    from mixlm.loading import load

    Stream = Generation
    from mixlm.types import Completion, Message, Sampling, Token, Tool, ToolCall, Usage

__all__ = [
    "Chat",
    "Completion",
    "Ensemble",
    "Generation",
    "Message",
    "MixlmError",
    "Sampling",
    "Token",
    "Tool",
    "ToolCall",
    "Usage",
    "__version__",
    "load",
]

_LAZY = {
    "Chat": ("ensemble", "Chat"),
    "Ensemble": ("ensemble", "Ensemble"),
    "Generation": ("generation.generation", "Generation"),
    "Stream": ("generation.generation", "Generation"),  # the older name
    "load": ("loading", "load"),
    **{name: ("types", name) for name in ("Completion", "Message", "Sampling", "Token", "Tool", "ToolCall", "Usage")},
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used."""
    if name in _LAZY:
        from importlib import import_module

        module, attribute = _LAZY[name]
        return getattr(import_module(f"mixlm.{module}"), attribute)
    raise AttributeError(f"module 'mixlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, those too that are imported later."""
    return sorted({*globals(), *__all__})
