"""One copy of a model's weights for several engines, and LoRA adapters that are switched on around each forward.

An adapter (Hu et al., 2021, arXiv 2106.09685) adds a product of two thin matrices to some of a model's linear layers.
PEFT puts its layers into the model in place; which adapter they apply, if any, is a switch in each of them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from mixlm.errors import MixlmError, ModelLoadError, UnsupportedError

_PREFIX = "base_model.model."  # what PEFT's files put in front of the names of a model's layers


class LoadedModel:
    """A transformers model that several engines run, each with an adapter of its own or with none.

    size: bytes of the weights without adapters. runners: what runs it with each adapter, as they are asked for.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.size = _bytes(model.parameters())
        self.runners: dict[str | None, Any] = {}
        self._sizes: dict[str, int] = {}
        self._numbers: dict[str, str] = {}
        self._layers: list[Any] = []
        self._active: str | None = None
        # Two threads may run engines of one model: while one is at it, the switch must stay where it is.
        self._lock = threading.RLock()

    def weights(self, adapter: str | None) -> dict[Hashable, int]:
        """Return bytes of the model, and of an adapter, by what tells them from any other."""
        parts: dict[Hashable, int] = {id(self): self.size}
        return parts if adapter is None else {**parts, (id(self), adapter): self._sizes[adapter]}

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Run what is inside with an adapter that was added, or without any."""
        with self._lock:
            if adapter != self._active:
                self._switch(adapter)
            yield

    def add(self, adapter: str, name: str) -> None:
        """Load an adapter, a folder or a hub id, unless it is there. name: of the model, for messages.

        Raises UnsupportedError for what is no plain LoRA adapter, ModelLoadError for one that is not there or does not
        fit the model.
        """
        if adapter in self._sizes:
            return
        if find_spec("peft") is None:
            raise MixlmError(f"the adapter {adapter} needs peft", "install: pip install 'mixlm[peft]'")
        config, weights = _read(adapter)
        number = f"adapter{len(self._sizes)}"  # PEFT takes no name with a dot in it
        with self._lock, warnings.catch_warnings():
            # That there are several adapters now is what is wanted.
            warnings.simplefilter("ignore")
            misfit = self._put_in(number, config, weights)
            own = [one for key, one in self.model.named_parameters() if f".{number}." in key]
            if misfit is not None or not own:
                for layer in self._layers:
                    layer.delete_adapter(number)
                self._switch(None)
                raise ModelLoadError(
                    f"the adapter {adapter} does not fit {name}: {misfit or 'it changes no layer'}",
                    "it must be one that was trained on this model",
                )
            self._sizes[adapter], self._numbers[adapter] = _bytes(own), number
            self.model.eval()
            self._switch(None)

    def _put_in(self, number: str, config: Any, weights: dict[str, Any]) -> str | None:
        """Put an adapter's layers into the model, and fill them. Returns what does not fit, if anything."""
        from peft import inject_adapter_in_model, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer

        try:
            inject_adapter_in_model(config, self.model, number)
            found: Any = set_peft_model_state_dict(self.model, weights, adapter_name=number)
        except Exception as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        finally:
            self._layers = [one for one in self.model.modules() if isinstance(one, BaseTunerLayer)]
        return f"the model has no layer for {found.unexpected_keys[0]}" if found.unexpected_keys else None

    def _switch(self, adapter: str | None) -> None:
        # Unknown until every layer is switched: an interrupt in between must not leave a mixture behind.
        self._active = ""
        active = [] if adapter is None else [self._numbers[adapter]]
        for layer in self._layers:
            # What PEFT's own methods do beside this, for training, takes ten times as long.
            layer._active_adapter, layer._disable_adapters = active, adapter is None
        self._active = adapter


def _read(adapter: str) -> tuple[Any, dict[str, Any]]:
    """Return an adapter's configuration and its weights by the names of the model's layers."""
    from peft import LoraConfig, PeftConfig, load_peft_weights

    try:
        config = PeftConfig.from_pretrained(adapter)
        weights = {key.removeprefix(_PREFIX): one for key, one in load_peft_weights(adapter, "cpu").items()}
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(
            f"the adapter {adapter} cannot be loaded: {reason}", "give a folder with adapter_config.json, or a hub id"
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


def _bytes(parameters: Any) -> int:
    return sum(one.numel() * one.element_size() for one in parameters)
