"""One set of a model's weights for several engines, with LoRA adapters that are switched around each forward pass."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mixlm.errors import MixlmError, ModelLoadError, UnsupportedError

if TYPE_CHECKING:
    from mixlm.engines.transformers.hidden_states import HiddenStateHook
    from mixlm.engines.transformers.position_frequencies import PositionFrequencies
    from mixlm.engines.transformers.runner import ModelRunner


class LoadedModel:
    """A transformers model that several engines run, each with an adapter of its own or with none.

    size: bytes of the weights without adapters. notes: what a user should know about them. runners: the runner of each
    adapter, None for the model without one. lock: held while a forward pass runs.
    """

    def __init__(self, model: Any, notes: Sequence[str] = ()) -> None:
        self.model = model
        self.notes = tuple(notes)
        self._attention = getattr(getattr(model, "config", None), "_attn_implementation", None)  # its own
        self.size = _count_bytes(model.parameters())
        self.runners: dict[str | None, ModelRunner] = {}
        self._adapter_bytes: dict[str, int] = {}
        self._peft_names: dict[str, str] = {}
        self._layers: list[Any] = []
        self._active: str | None = None
        # Engines of one model may run in two threads: while one runs, the adapter must not change.
        self.lock = threading.RLock()

    @cached_property
    def frequencies(self) -> PositionFrequencies | None:
        """The position frequencies that depend on the length of a sequence; None where there are none."""
        from mixlm.engines.transformers.position_frequencies import PositionFrequencies

        return PositionFrequencies.of(self.model)

    @cached_property
    def hidden_states(self) -> HiddenStateHook:
        """The hidden states of forward passes, noted from when this is first used."""
        from mixlm.engines.transformers.hidden_states import HiddenStateHook

        return HiddenStateHook(self.model)

    def weight_parts(self, adapter: str | None) -> dict[Hashable, int]:
        """Return the bytes of the model, and of an adapter, by identifying keys."""
        parts: dict[Hashable, int] = {id(self): self.size}
        return parts if adapter is None else {**parts, (id(self), adapter): self._adapter_bytes[adapter]}

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Apply an adapter that was added, or none, to the forward passes in this context."""
        with self.lock:
            if adapter != self._active:
                self._switch(adapter)
            yield

    def add(self, adapter: str, name: str) -> None:
        """Load an adapter, unless it is loaded already.

        Args:
            adapter: a folder or hub id.
            name: of the model, for messages.

        Raises:
            MixlmError: peft is not installed.
            UnsupportedError: it is not a plain LoRA adapter, or PEFT's own forward pass differs.
            ModelLoadError: it is not there, or does not fit the model.
        """
        if adapter in self._adapter_bytes:
            return
        if find_spec("peft") is None:
            raise MixlmError(f"the adapter {adapter} needs peft", "install: pip install 'mixlm[peft]'")
        from mixlm.engines.transformers.lora import inject, read_adapter

        config, weights = read_adapter(adapter)
        peft_name = f"adapter{len(self._adapter_bytes)}"  # PEFT allows no dot in a name
        with self.lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of a second adapter, which is intended here
            self._switch(None)
            before = self._plain_logits()
            misfit, self._layers = inject(self.model, peft_name, config, weights)
            parameters = [value for key, value in self.model.named_parameters() if f".{peft_name}" in key]
            try:
                if misfit is not None or not parameters:
                    raise ModelLoadError(
                        f"the adapter {adapter} does not fit {name}: {misfit or 'it changes no layer'}",
                        "it must be one that was trained on this model",
                    )
                self.model.eval()
                self._peft_names[adapter] = peft_name
                self._check(adapter, name, before)
            except MixlmError:
                for layer in self._layers:
                    layer.delete_adapter(peft_name)
                self._switch(None)
                raise
            self._adapter_bytes[adapter] = _count_bytes(parameters)

    def _check(self, adapter: str, name: str, before: Any) -> None:
        """Compare an adapter with PEFT's own forward pass, and the model without adapters with what it was before."""
        import torch

        from mixlm.engines.tokenizer_setup import first_line
        from mixlm.engines.transformers import self_test
        from mixlm.engines.transformers.lora import peft_logits

        self._switch(adapter)
        own = self._plain_logits()
        try:
            with torch.inference_mode(), self._plain_attention():
                expected = peft_logits(self.model, adapter, f"{self._peft_names[adapter]}reference", self._trial_ids())
        except Exception as error:
            raise ModelLoadError(
                f"PEFT cannot run the adapter {adapter} on {name}: {first_line(error)}",
                "its layers are quantised in a way that takes none: use bitsandbytes, or merge the adapter first"
                if getattr(self.model.config, "quantization_config", None) is not None
                else None,
            ) from error
        finally:
            self.model.eval()
            self._switch(None)
        if not bool(own.isfinite().any(dim=1).all()) or bool(own.isnan().any()):
            raise ModelLoadError(
                f"{name} with the adapter {adapter} computes logits that are no numbers",
                "try --dtype float32; where that is no different, the adapter's weights are damaged",
            )
        tolerance, over = self_test.limit(self.model.dtype)
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
        import torch

        from mixlm.engines.transformers import self_test
        from mixlm.engines.transformers.model_loading import vocabulary_size

        return torch.from_numpy(self_test.sample_ids(vocabulary_size(self.model))[None]).to(self.model.device)

    def _plain_logits(self) -> Any:
        """Return the logits of a few tokens by the model's own forward pass, with the adapter that is switched on."""
        import torch

        with torch.inference_mode(), self._plain_attention():
            return self.model(input_ids=self._trial_ids(), use_cache=False).logits[0]

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """Let the model attend as transformers does."""
        current = self.model.config._attn_implementation
        if current == self._attention:
            yield
            return
        self.model.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(current)

    def _switch(self, adapter: str | None) -> None:
        # Unknown until every layer is switched: an interrupt in between must not leave a mixture behind.
        self._active = ""
        active = [] if adapter is None else [self._peft_names[adapter]]
        for layer in self._layers:
            # PEFT's own methods also prepare training, which takes ten times as long.
            layer._active_adapter, layer._disable_adapters = active, adapter is None
        self._active = adapter


def _count_bytes(parameters: Any) -> int:
    return sum(_tensor_bytes(parameter) for parameter in parameters)


def _tensor_bytes(tensor: Any) -> int:
    """Return the memory of a tensor; of a quantised one of torchao, that of what it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return _count_bytes(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())
