"""Several language models write one text, at the cost of one model a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mixlm.errors import MixlmError
from mixlm.types import Completion, Message, Sampling, Token, Usage
from mixlm.version import __version__

if TYPE_CHECKING:
    from mixlm.ensemble import Chat, Ensemble
    from mixlm.generation.generation import Stream
    from mixlm.loading import load

__all__ = [
    "Chat",
    "Completion",
    "Ensemble",
    "Message",
    "MixlmError",
    "Sampling",
    "Stream",
    "Token",
    "Usage",
    "__version__",
    "load",
]

_LAZY = {"Chat": "ensemble", "Ensemble": "ensemble", "Stream": "generation.generation", "load": "loading"}


def __getattr__(name: str) -> Any:
    """Import the larger parts when they are first used."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"mixlm.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'mixlm' has no attribute {name!r}")
