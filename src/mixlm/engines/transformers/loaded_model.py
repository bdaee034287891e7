"""One set of a model's weights for several engines, with LoRA adapters that are switched around each forward pass."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mixlm.errors import MixlmError, ModelLoadError

if TYPE_CHECKING:
    from mixlm.engines.transformers.runner import ModelRunner


class LoadedModel:
    """A transformers model that several engines run, each with an adapter of its own or with none.

    size: bytes of the weights without adapters. runners: the runner of each adapter, None for the model without one.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.size = _count_bytes(model.parameters())
        self.runners: dict[str | None, ModelRunner] = {}
        self._adapter_bytes: dict[str, int] = {}
        self._peft_names: dict[str, str] = {}
        self._layers: list[Any] = []
        self._active: str | None = None
        # Engines of one model may run in two threads: while one runs, the adapter must not change.
        self._lock = threading.RLock()

    def weight_parts(self, adapter: str | None) -> dict[Hashable, int]:
        """Return the bytes of the model, and of an adapter, by identifying keys."""
        parts: dict[Hashable, int] = {id(self): self.size}
        return parts if adapter is None else {**parts, (id(self), adapter): self._adapter_bytes[adapter]}

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Apply an adapter that was added, or none, to the forward passes in this context."""
        with self._lock:
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
            UnsupportedError: it is not a plain LoRA adapter.
            ModelLoadError: it is not there, or does not fit the model.
        """
        if adapter in self._adapter_bytes:
            return
        if find_spec("peft") is None:
            raise MixlmError(f"the adapter {adapter} needs peft", "install: pip install 'mixlm[peft]'")
        from mixlm.engines.transformers.lora import inject, read_adapter

        config, weights = read_adapter(adapter)
        peft_name = f"adapter{len(self._adapter_bytes)}"  # PEFT allows no dot in a name
        with self._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of a second adapter, which is intended here
            misfit, self._layers = inject(self.model, peft_name, config, weights)
            parameters = [value for key, value in self.model.named_parameters() if f".{peft_name}." in key]
            if misfit is not None or not parameters:
                for layer in self._layers:
                    layer.delete_adapter(peft_name)
                self._switch(None)
                raise ModelLoadError(
                    f"the adapter {adapter} does not fit {name}: {misfit or 'it changes no layer'}",
                    "it must be one that was trained on this model",
                )
            self._adapter_bytes[adapter], self._peft_names[adapter] = _count_bytes(parameters), peft_name
            self.model.eval()
            self._switch(None)

    def _switch(self, adapter: str | None) -> None:
        # Unknown until every layer is switched: an interrupt in between must not leave a mixture behind.
        self._active = ""
        active = [] if adapter is None else [self._peft_names[adapter]]
        for layer in self._layers:
            # PEFT's own methods also prepare training, which takes ten times as long.
            layer._active_adapter, layer._disable_adapters = active, adapter is None
        self._active = adapter


def _count_bytes(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
