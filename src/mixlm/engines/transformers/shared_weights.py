"""Models that are loaded already, of transformers or of PEFT: a model of mixlm's own on their tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from mixlm.engines.tokenizer_setup import error_summary
from mixlm.engines.transformers.model_loading import vocabulary_size
from mixlm.engines.transformers.self_test import Tolerance, sample_ids
from mixlm.errors import ConfigError, ModelLoadError, UnsupportedError


def share_weights(model: Any, name: str) -> Any:
    """Return a model of its own on the tensors of a loaded one, which keeps its mode, its attention and its hooks.

    Of a PEFT model it is the base model with the adapters that are active, merged or not. name: for messages.

    Raises:
        ConfigError: it is none.
        UnsupportedError: its adapter is more than a part of the model's layers (prompt and prefix tuning, aLoRA).
    """
    model = getattr(model, "_orig_mod", model)  # of one that torch.compile was called for: what it compiles
    is_adapted = hasattr(model, "get_base_model")
    kind = type(model.active_peft_config).__name__ if is_adapted else ""
    if is_adapted and getattr(model.active_peft_config, "is_prompt_learning", False):
        raise UnsupportedError(
            f"the adapter of {name} puts tokens of its own in front of the text ({kind})",
            "use LoRA or another adapter that changes layers",
        )
    base = model.get_base_model() if is_adapted else model
    output = getattr(base, "get_output_embeddings", lambda: None)()
    if output is None or getattr(base, "config", None) is None:
        raise ConfigError(
            f"{type(base).__name__} is no causal language model of transformers",
            "hand over (model, tokenizer): what AutoModelForCausalLM and AutoTokenizer load",
        )
    try:
        shared = copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)}).eval()
        complete = not is_adapted or _is_all(shared)
    except Exception as error:
        raise ModelLoadError(
            f"{name} cannot be shared: {type(error).__name__}: {error_summary(error)}",
            "save it with save_pretrained, and name the folder",
        ) from error
    if not complete:
        raise UnsupportedError(
            f"the adapter of {name} does more than its layers do, such as to look for where it begins ({kind})",
            "use LoRA or another adapter that changes layers alone",
        )
    return shared.get_base_model() if is_adapted else shared


def _is_all(adapted: Any) -> bool:
    """Whether the base model of a PEFT model, with the adapters in its layers, computes what the PEFT model does."""
    base = adapted.get_base_model()
    begins = [
        i for config in adapted.peft_config.values() for i in getattr(config, "alora_invocation_tokens", None) or ()
    ]
    tokens = [*sample_ids(vocabulary_size(base)).tolist(), *begins, 0]
    ids = torch.tensor([tokens], device=base.device)
    with torch.inference_mode():
        rows, expected = (
            model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy() for model in (base, adapted)
        )
    tolerance = Tolerance.of(base.dtype)
    return tolerance.distance(zip(rows, expected, strict=True)) < tolerance.largest


def _tensors(model: Any) -> Iterator[Any]:
    """Yield all tensors of a model: parameters, buffers, and those that layers keep otherwise, as quantised ones do."""
    for module in model.modules():
        values = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        # What libraries for quantisation keep beside a tensor: bitsandbytes' `quant_state` of a parameter.
        inner = [part for value in values if hasattr(value, "__dict__") for part in vars(value).values()]
        inner += [part for value in inner if hasattr(value, "__dict__") for part in vars(value).values()]
        yield from (value for value in [*values, *inner] if isinstance(value, torch.Tensor))
