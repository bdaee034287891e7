"""Tiny models of transformers for benchmarks, a small and a larger one with one vocabulary."""

from __future__ import annotations

from typing import Any

from mixlm.binding import LoadedMember
from mixlm.engines import EngineSpec
from mixlm.engines.transformers.dummy_weights import SHAPES, DummyWeightsEngine
from mixlm.ensemble import Ensemble

SMALL: dict[str, Any] = {
    **SHAPES["qwen2.5-0.5b"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
}
LARGE: dict[str, Any] = {**SMALL, "intermediate_size": 400, "num_hidden_layers": 3}


def shapes(weights: tuple[float, float] = (1, 1)) -> Ensemble:
    """A pair of which the first is clearly the smaller one."""
    engines = [DummyWeightsEngine(EngineSpec("shape:tiny", "", "float32", "cpu"), sizes) for sizes in (SMALL, LARGE)]
    return Ensemble(
        [LoadedMember(engine, name) for engine, name in zip(engines, ("small", "large"), strict=True)], weights
    )
