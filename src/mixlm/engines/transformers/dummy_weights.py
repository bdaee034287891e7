"""Models of a real architecture and size with dummy weights: for measuring speed only.

The cost of a forward pass depends on the sizes of the matrices, not on their values, so such a model runs as fast as
the real one. The text that it generates means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mixlm.engines.base import EngineSpec
from mixlm.engines.toy import WORD_TOKENS, toy_text
from mixlm.engines.transformers.engine import HFEngine
from mixlm.engines.transformers.load_trial import load_runner
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.model_loading import parse_device, parse_dtype
from mixlm.errors import ModelNotFoundError, did_you_mean, memory_errors

PREFIX = "shape:"
LABEL = "real architecture and size, weights filled with numbers: for measuring speed only"

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _fields(kind: str, rows: int, positions: int, theta: float, *sizes: int, **others: Any) -> dict[str, Any]:
    """Return a model's fields. rows: of its vocabulary. theta: of its rotary embeddings. sizes: see `_SIZES`."""
    return {
        "model_type": kind,
        "vocab_size": rows,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        **dict(zip(_SIZES, sizes, strict=True)),
        **others,
    }


def _llama3(factor: float, *sizes: int, **others: Any) -> dict[str, Any]:
    fields = _fields("llama", 128_256, 131_072, 5e5, *sizes, **others)
    fields["rope_parameters"] |= {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192}
    fields["rope_parameters"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return fields


# As in the config.json that each model is published with. JackFram's llama-68m and llama-160m are draft models in many
# measurements of speculative decoding (SpecInfer, Miao et al., 2023).
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen2.5-0.5b": _fields("qwen2", 151_936, 32_768, 1e6, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _fields("qwen2", 151_936, 32_768, 1e6, 1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _fields("qwen2", 151_936, 32_768, 1e6, 2048, 11_008, 36, 16, 2),
    "qwen2.5-7b": _fields("qwen2", 152_064, 32_768, 1e6, 3584, 18_944, 28, 28, 4, tie_word_embeddings=False),
    "smollm2-135m": _fields("llama", 49_152, 8192, 1e5, 576, 1536, 30, 9, 3),
    "smollm2-360m": _fields("llama", 49_152, 8192, 1e5, 960, 2560, 32, 15, 5),
    "smollm2-1.7b": _fields("llama", 49_152, 8192, 1.3e5, 2048, 8192, 24, 32, 32),
    "llama-68m": _fields("llama", 32_000, 2048, 1e4, 768, 3072, 2, 12, 12, tie_word_embeddings=False),
    "llama-160m": _fields("llama", 32_000, 2048, 1e4, 768, 3072, 12, 12, 12, tie_word_embeddings=False),
    "llama-3.2-1b": _llama3(32.0, 2048, 8192, 16, 32, 8),
    "llama-3.2-3b": _llama3(32.0, 3072, 8192, 28, 24, 8),
    "llama-3.1-8b": _llama3(8.0, 4096, 14_336, 32, 32, 8, tie_word_embeddings=False),
}

_BLOCK = 1_000_003  # a prime, so that rows of a matrix do not repeat each other
_SCALE = 0.02


def load(spec: EngineSpec) -> DummyWeightsEngine:
    """Build the model that `shape:NAME` names. Raises ModelNotFoundError for a name that is not in `SHAPES`.

    `shape:NAME#2` is the same model again with memory of its own, as another model of that size would have.
    """
    name = spec.model.removeprefix(PREFIX).partition("#")[0]
    if name not in SHAPES:
        raise ModelNotFoundError(
            f"there is no shape {name!r}", did_you_mean(name, SHAPES) or f"there are {', '.join(SHAPES)}"
        )
    return DummyWeightsEngine(spec, SHAPES[name])


class DummyWeightsEngine(HFEngine):
    """A model of a known shape with dummy weights; equal weights for equal shapes.

    Its vocabulary begins with the toys' words and bytes, then a begin and an end token; every further row is a made-up
    word, so that work on a vocabulary of this size costs what it does with the real one. Members of any shapes, and
    toys, share the vocabulary as far as the smaller one goes. Raises MemoryLimitError.
    """

    def __init__(self, spec: EngineSpec, shape: Mapping[str, Any]) -> None:
        name = spec.name or spec.model
        device = parse_device(spec.device)
        with memory_errors(name):
            loaded = LoadedModel(create_model(shape, parse_dtype(spec.dtype, device), device), name)
        tokens, begin = dummy_tokens(int(shape["vocab_size"]))
        text = toy_text(tokens, len(tokens), begin, notes=(f"{name}: {LABEL}",))
        runner = load_runner(loaded, spec.graphs)
        super().__init__(name, text, int(shape["max_position_embeddings"]), runner, {"weights": "filled with numbers"})


def dummy_tokens(vocab_size: int) -> tuple[list[bytes], int]:
    """Return the bytes of each id, and the id of the begin token, which the end token follows."""
    begin = len(WORD_TOKENS)
    return [*WORD_TOKENS, b"", b"", *(b" w%d" % i for i in range(begin + 2, vocab_size))], begin


def create_model(shape: Mapping[str, Any], dtype: Any, device: Any) -> Any:
    """Return a transformers model of this shape: torch dtype and device. Filling it takes as long as writing it."""
    with torch.device("meta"):
        model = from_shape(shape, dtype)
    model = model.to_empty(device=device).eval()
    model.tie_weights()
    # `to_empty` drops what a model computes when it is built and no file holds.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(device)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(2 * _BLOCK, generator=generator) * _SCALE).to(dtype).to(device)
    offset = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            flat = parameter.view(-1)
            whole = flat.numel() - flat.numel() % _BLOCK
            part = block[offset : offset + _BLOCK]
            flat[:whole].view(-1, _BLOCK).copy_(part)
            flat[whole:].copy_(part[: flat.numel() - whole])
            offset = (offset + 7919) % _BLOCK  # each matrix begins elsewhere in the block
    return model


def from_shape(shape: Mapping[str, Any], dtype: Any) -> Any:
    """Return the model on torch's current default device, with the weights of its initialisation."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)
