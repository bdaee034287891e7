"""Engines, one folder or module a backend. `load` finds the one for a model in the `registry`."""

from __future__ import annotations

from mixlm.engines.base import Engine, EngineSpec
from mixlm.engines.registry import check_engine, is_remote, load, runs_as_gguf

__all__ = ["Engine", "EngineSpec", "check_engine", "is_remote", "load", "runs_as_gguf"]
