"""The LoRA adapters (Hu et al., 2021, arXiv 2106.09685) of one model, through PEFT.

An adapter adds a product of two thin matrices to some of a model's linear layers. PEFT puts its layers into the model
in place; which adapter they apply, if any, is a switch in each of them. So an adapter may add to the model, and never
change it: some kinds are initialised by taking their part out of the model's weights. Each is checked against PEFT's
own forward pass when it is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch

from mixlm.engines.tokenizer_setup import error_summary
from mixlm.engines.transformers.model_loading import count_bytes, vocabulary_size
from mixlm.engines.transformers.self_test import Tolerance, sample_ids
from mixlm.errors import MixlmError, ModelLoadError, UnsupportedError

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


class Adapters:
    """Adapters in the layers of a model, of which one or none is applied. Whoever uses it holds the model's lock.

    sizes: bytes of each adapter. layers: those of PEFT in the model. active: the one that is applied. attention: the
    implementation that the model has by itself.
    """

    def __init__(self, model: Any, attention: str | None) -> None:
        self._model = model
        self.sizes: dict[str, int] = {}
        self.layers: list[Any] = []
        self.active: str | None = None
        self._attention = attention
        self._peft_names: dict[str, str] = {}

    def add(self, adapter: str, name: str) -> None:
        """Load an adapter, unless it is loaded already: see `LoadedModel.add`."""
        if adapter in self.sizes:
            return
        config, weights = read_adapter(adapter)
        from peft.tuners.tuners_utils import BaseTunerLayer

        peft_name = f"adapter{len(self.sizes)}"  # PEFT allows no dot in a name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of a second adapter, which is intended here
            self.switch(None)
            before = self._plain_logits()
            misfit = _inject(self._model, peft_name, config, weights)
            self.layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
            parameters = [value for key, value in self._model.named_parameters() if f".{peft_name}" in key]
            try:
                if misfit is not None or not parameters:
                    raise ModelLoadError(
                        f"the adapter {adapter} does not fit {name}: {misfit or 'it changes no layer'}",
                        "it must be one that was trained on this model",
                    )
                self._model.eval()
                self._peft_names[adapter] = peft_name
                self._check(adapter, before, name)
            except MixlmError:
                for layer in self.layers:
                    layer.delete_adapter(peft_name)
                self.switch(None)
                raise
            self.sizes[adapter] = count_bytes(parameters)

    def _check(self, adapter: str, before: torch.Tensor, name: str) -> None:
        """Compare an adapter with PEFT's own forward pass, and the model without adapters with what it was before."""
        self.switch(adapter)
        own = self._plain_logits()
        try:
            with torch.inference_mode(), self._plain_attention():
                expected = peft_logits(self._model, adapter, f"{self._peft_names[adapter]}reference", self._trial_ids())
        except Exception as error:
            raise ModelLoadError(
                f"PEFT cannot run the adapter {adapter} on {name}: {error_summary(error)}",
                "its layers are quantised in a way that takes none: use bitsandbytes, or merge the adapter first"
                if getattr(self._model.config, "quantization_config", None) is not None
                else None,
            ) from error
        finally:
            self._model.eval()
            self.switch(None)
        if not bool(own.isfinite().any(dim=1).all()) or bool(own.isnan().any()):
            raise ModelLoadError(
                f"{name} with the adapter {adapter} computes logits that are no numbers",
                "try --dtype float32; where that is no different, the adapter's weights are damaged",
            )
        pairs = zip(own.float().cpu().numpy(), expected.float().cpu().numpy(), strict=True)
        tolerance = Tolerance.of(self._model.dtype)
        if not tolerance.distance(pairs) < tolerance.largest:
            raise UnsupportedError(
                f"the adapter {adapter} gives another distribution than PEFT's own forward pass when it is switched",
                "merge it into a copy of the model, and name that as the member's model",
            )
        if not torch.equal(before, self._plain_logits()):
            raise ModelLoadError(
                f"the adapter {adapter} changed {name} itself, which other members share",
                "load them again without it; merge it into a copy of the model, and name that as the member's model",
            )

    def _trial_ids(self) -> Any:
        return torch.from_numpy(sample_ids(vocabulary_size(self._model))[None]).to(self._model.device)

    def _plain_logits(self) -> Any:
        """Return the logits of a few tokens by the model's own forward pass, with the adapter that is switched on."""
        with torch.inference_mode(), self._plain_attention():
            return self._model(input_ids=self._trial_ids(), use_cache=False).logits[0]

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """Let the model attend as transformers does."""
        current = self._model.config._attn_implementation
        if current == self._attention:
            yield
            return
        self._model.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            self._model.set_attn_implementation(current)

    def switch(self, adapter: str | None) -> None:
        """Apply an adapter, or none, to the forward passes from now on."""
        # Unknown until every layer is switched: an interrupt in between must not leave a mixture behind.
        self.active = ""
        active = [] if adapter is None else [self._peft_names[adapter]]
        for layer in self.layers:
            # PEFT's own methods also prepare training, which takes ten times as long.
            layer._active_adapter, layer._disable_adapters = active, adapter is None
        self.active = adapter


def _inject(model: Any, name: str, config: Any, weights: dict[str, Any]) -> str | None:
    """Put an adapter's layers into a model and load its weights into them. Returns what does not fit, if anything."""
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    if (misfit := _replaced_weight(model, weights)) is not None:
        return misfit
    try:
        inject_adapter_in_model(config, model, name)
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
        if result.unexpected_keys:
            return f"the model has no layer for {result.unexpected_keys[0]}"
        if absent := [key for key in result.missing_keys if f".{name}." in key or key.endswith(f".{name}")]:
            return f"its file lacks {absent[0].replace(f'.{name}', '')}"
    except Exception as error:
        return error_summary(error)
    return None


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

    name: for the adapter in the layers, of no other adapter. ids: int64 (1, tokens).
    """
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, adapter, adapter_name=name)
    try:
        return wrapped(input_ids=ids, use_cache=False).logits[0]
    finally:
        wrapped.base_model.delete_adapter(name)


def read_adapter(adapter: str) -> tuple[Any, dict[str, Any]]:
    """Return an adapter's configuration, and its weights by the names of the model's layers.

    Raises:
        MixlmError: peft is not installed.
        ModelLoadError: it cannot be loaded.
        UnsupportedError: it is no LoRA adapter, or it also replaces weights of the model.
    """
    if find_spec("peft") is None:
        raise MixlmError(f"the adapter {adapter} needs peft", "install: pip install 'mixlm[peft]'")
    from peft import LoraConfig, PeftConfig, load_peft_weights

    try:
        config = PeftConfig.from_pretrained(adapter)
        weights = {key.removeprefix(_PREFIX): value for key, value in load_peft_weights(adapter, "cpu").items()}
    except Exception as error:
        raise ModelLoadError(
            f"the adapter {adapter} cannot be loaded: {error_summary(error)}",
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
    common = {field.name for field in fields(PeftConfig)} | _FIELDS
    names = [field.name for field in fields(config) if field.name not in common]
    plain = LoraConfig()
    if special := [name for name in names if (value := getattr(config, name)) and value != getattr(plain, name)]:
        raise UnsupportedError(
            f"the adapter {adapter} has {' and '.join(special)}, and is more than a plain LoRA adapter, which can be "
            "switched on and off",
            merge,
        )
    # These change weights of the model itself, which its other engines share.
    if config.bias != "none" or config.modules_to_save:
        part = ", ".join(config.modules_to_save or ()) or "biases"
        raise UnsupportedError(f"the adapter {adapter} replaces {part} of the model, which other members share", merge)
    config.inference_mode = True
    config.init_lora_weights = True  # the weights are loaded anyway
    return config, weights


def adapter_bytes(adapter: str) -> int:
    """Return the memory of an adapter from its files. Raises what `read_adapter` raises."""
    return count_bytes(read_adapter(adapter)[1].values())
