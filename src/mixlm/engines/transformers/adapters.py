"""The LoRA adapters of one model: put into its layers, checked against PEFT's own forward pass, and switched."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mixlm.engines.tokenizer_setup import first_line
from mixlm.engines.transformers import self_test
from mixlm.engines.transformers.loaded_model import count_bytes
from mixlm.engines.transformers.lora import inject, peft_logits, read_adapter
from mixlm.engines.transformers.model_loading import vocabulary_size
from mixlm.errors import MixlmError, ModelLoadError, UnsupportedError


class Adapters:
    """Adapters in the layers of a model, of which one or none is applied. Whoever uses it holds the model's lock.

    sizes: bytes of each adapter. layers: those of PEFT in the model. active: the one that is applied.

    Args:
        attention: the implementation that the model has by itself.
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
        peft_name = f"adapter{len(self.sizes)}"  # PEFT allows no dot in a name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of a second adapter, which is intended here
            self.switch(None)
            before = self._plain_logits()
            misfit, self.layers = inject(self._model, peft_name, config, weights)
            parameters = [value for key, value in self._model.named_parameters() if f".{peft_name}" in key]
            try:
                if misfit is not None or not parameters:
                    raise ModelLoadError(
                        f"the adapter {adapter} does not fit {name}: {misfit or 'it changes no layer'}",
                        "it must be one that was trained on this model",
                    )
                self._model.eval()
                self._peft_names[adapter] = peft_name
                self._check(adapter, name, before)
            except MixlmError:
                for layer in self.layers:
                    layer.delete_adapter(peft_name)
                self.switch(None)
                raise
            self.sizes[adapter] = count_bytes(parameters)

    def _check(self, adapter: str, name: str, before: Any) -> None:
        """Compare an adapter with PEFT's own forward pass, and the model without adapters with what it was before."""
        self.switch(adapter)
        own = self._plain_logits()
        try:
            with torch.inference_mode(), self._plain_attention():
                expected = peft_logits(self._model, adapter, f"{self._peft_names[adapter]}reference", self._trial_ids())
        except Exception as error:
            raise ModelLoadError(
                f"PEFT cannot run the adapter {adapter} on {name}: {first_line(error)}",
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
        tolerance, over = self_test.limit(self._model.dtype)
        pairs = zip(own.float().cpu().numpy(), expected.float().cpu().numpy(), strict=True)
        if not over([self_test.total_variation(*pair) for pair in pairs]) < tolerance:
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
        return torch.from_numpy(self_test.sample_ids(vocabulary_size(self._model))[None]).to(self._model.device)

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
