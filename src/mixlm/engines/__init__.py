"""Engines: one backend a file. `load` finds the one for a model."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from mixlm.engines.base import Engine
from mixlm.engines.spec import EngineSpec
from mixlm.errors import MixlmError

__all__ = ["Engine", "EngineSpec", "load"]


def load(spec: EngineSpec) -> Engine:
    """Load the engine for a model: `toy:SEED`, `shape:NAME`, a folder, a GGUF file, a catalogue name, or a hub id.

    Raises ModelNotFoundError, ModelLoadError, TokenizerError or MemoryLimitError, each with a hint.
    """
    if spec.model.startswith("toy:"):
        from mixlm.engines.toy import ToyEngine

        return ToyEngine.from_spec(spec)
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise MixlmError(f"loading {spec.model} needs {' and '.join(missing)}", "install: pip install 'mixlm[hf]'")
    if spec.model.startswith("shape:"):
        from mixlm.engines.shape import ShapeEngine

        return ShapeEngine.from_spec(spec)
    from mixlm.engines.hf import HFEngine
    from mixlm.models import resolve

    found = resolve(spec.model, "float32" if spec.dtype == "float32" else "bfloat16")
    return HFEngine(replace(spec, name=spec.name or found.name), found.path_or_id)
