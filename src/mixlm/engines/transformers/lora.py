"""LoRA adapters (Hu et al., 2021, arXiv 2106.09685) through PEFT.

An adapter adds a product of two thin matrices to some of a model's linear layers. PEFT puts its layers into the model
in place; which adapter they apply, if any, is a switch in each of them (`adapters`). So an adapter may add to the
model, and never change it: some kinds are initialised by taking their part out of the model's weights.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from mixlm.engines.tokenizer_setup import first_line
from mixlm.errors import ModelLoadError, UnsupportedError

_PREFIX = "base_model.model."  # PEFT's files put it in front of the names of a model's layers
# What an adapter may set beside what all PEFT adapters have; other fields are kinds that change the model, or that need
# more than a switch: such as where in the text they begin.
_FIELDS = {
    *("r", "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
    *("lora_alpha", "lora_dropout", "lora_bias", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora"),
    *("bias", "modules_to_save", "fan_in_fan_out", "init_lora_weights", "eva_config", "runtime_config"),
    "ensure_weight_tying",
}
# Initialisations that leave the model's weights as they are.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def inject(model: Any, name: str, config: Any, weights: dict[str, Any]) -> tuple[str | None, list[Any]]:
    """Put an adapter's layers into a model and load its weights into them.

    Returns:
        What does not fit, None if everything does; and all of PEFT's layers in the model.
    """
    misfit = _replaced_weight(model, weights)
    if misfit is not None:
        return misfit, _layers(model)
    try:
        inject_adapter_in_model(config, model, name)
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
        if result.unexpected_keys:
            misfit = f"the model has no layer for {result.unexpected_keys[0]}"
        elif absent := [key for key in result.missing_keys if f".{name}." in key or key.endswith(f".{name}")]:
            misfit = f"its file lacks {absent[0].replace(f'.{name}', '')}"
    except Exception as error:
        misfit = first_line(error)
    return misfit, _layers(model)


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _replaced_weight(model: Any, weights: dict[str, Any]) -> str | None:
    """Remove weights of the model itself from an adapter's, such as embeddings. Returns what says that they differ."""
    for key in [key for key in weights if "lora_" not in key]:
        weight = weights.pop(key)
        name = key.replace(".base_layer.", ".")
        try:
            module = model.get_submodule(name.rpartition(".")[0])
        except AttributeError:
            return f"the model has no layer for {key}"
        own = getattr(getattr(module, "base_layer", module), name.rpartition(".")[2], None)
        if own is None or own.shape != weight.shape or not bool((own.cpu() == weight.to(own.dtype)).all()):
            return f"it replaces {name} of the model, which other members share"
    return None


def peft_logits(model: Any, adapter: str, name: str, ids: Any) -> Any:
    """Return the logits of PEFT's own forward pass with an adapter, which is loaded for it and removed again.

    Args:
        model: The model, without or with other adapters in its layers.
        adapter: A folder or hub id.
        name: For the adapter in the layers, of no other adapter.
        ids: int64 (1, tokens).
    """
    wrapped = PeftModel.from_pretrained(model, adapter, adapter_name=name)
    try:
        return wrapped(input_ids=ids, use_cache=False).logits[0]
    finally:
        wrapped.base_model.delete_adapter(name)


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
    if type(config) is not LoraConfig:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UnsupportedError(f"the adapter {adapter} is of the kind {kind}", "LoRA adapters can be switched")
    merge = "merge it into a copy of the model, and name that as the member's model"
    if config.init_lora_weights not in _INITIALISATIONS:
        raise UnsupportedError(
            f"the adapter {adapter} changes the weights of the model, which other members share "
            f"(init_lora_weights is {config.init_lora_weights!r})",
            f"convert it to a plain LoRA adapter (path_initial_model_for_weight_conversion in PEFT), or {merge}",
        )
    if special := _special_fields(config):
        raise UnsupportedError(
            f"the adapter {adapter} has {' and '.join(special)}, and is more than a plain LoRA adapter, which can be "
            "switched on and off",
            merge,
        )
    # These change weights of the model itself, which its other engines share.
    if config.bias != "none" or config.modules_to_save:
        part = ", ".join(config.modules_to_save or ()) or "biases"
        raise UnsupportedError(
            f"the adapter {adapter} replaces {part} of the model, which other members share",
            merge,
        )
    config.inference_mode = True
    config.init_lora_weights = True  # the weights are loaded anyway
    return config, weights


def _special_fields(config: LoraConfig) -> list[str]:
    """Return the names of fields that are set, and that a plain LoRA adapter does not have."""
    common = {field.name for field in fields(PeftConfig)} | _FIELDS
    special = []
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        if field.name not in common and value and value != default:
            special.append(field.name)
    return special
