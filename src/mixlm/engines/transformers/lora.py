"""LoRA adapters (Hu et al., 2021, arXiv 2106.09685) through PEFT.

An adapter adds a product of two thin matrices to some of a model's linear layers. PEFT puts its layers into the model
in place; which adapter they apply, if any, is a switch in each of them (`LoadedModel`).
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from mixlm.engines.tokenizer_setup import first_line
from mixlm.errors import ModelLoadError, UnsupportedError

_PREFIX = "base_model.model."  # PEFT's files put it in front of the names of a model's layers


def inject(model: Any, name: str, config: Any, weights: dict[str, Any]) -> tuple[str | None, list[Any]]:
    """Put an adapter's layers into a model and load its weights into them.

    Returns:
        What does not fit, None if everything does; and all of PEFT's layers in the model.
    """
    misfit = None
    try:
        inject_adapter_in_model(config, model, name)
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
        if result.unexpected_keys:
            misfit = f"the model has no layer for {result.unexpected_keys[0]}"
    except Exception as error:
        misfit = first_line(error)
    return misfit, [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def read_adapter(adapter: str) -> tuple[Any, dict[str, Any]]:
    """Return an adapter's configuration, and its weights by the names of the model's layers.

    Raises:
        ModelLoadError: it cannot be loaded.
        UnsupportedError: it is no LoRA adapter, or it also replaces weights of the model.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
        weights = {key.removeprefix(_PREFIX): value for key, value in load_peft_weights(adapter, "cpu").items()}
    except Exception as error:
        raise ModelLoadError(
            f"the adapter {adapter} cannot be loaded: {first_line(error)}",
            "give a folder with adapter_config.json, or a hub id",
        ) from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UnsupportedError(f"the adapter {adapter} is of the kind {kind}", "LoRA adapters can be switched")
    # These change weights of the model itself, which its other engines share.
    if config.bias != "none" or config.modules_to_save:
        part = ", ".join(config.modules_to_save or ()) or "biases"
        raise UnsupportedError(
            f"the adapter {adapter} replaces {part} of the model, which other members share",
            "merge it into a copy of the model, and name that as the member's model",
        )
    config.inference_mode = True
    return config, weights
