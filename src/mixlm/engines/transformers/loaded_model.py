"""One set of a model's weights for several engines, with LoRA adapters that are switched around each forward pass."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mixlm.errors import MixlmError

if TYPE_CHECKING:
    from mixlm.engines.transformers.adapters import Adapters
    from mixlm.engines.transformers.hidden_states import HiddenStateHook
    from mixlm.engines.transformers.position_frequencies import PositionFrequencies
    from mixlm.engines.transformers.runner import ModelRunner


class LoadedModel:
    """A transformers model that several engines run, each with an adapter of its own or with none.

    size: bytes of the weights without adapters. notes: what a user should know about them. runners: the runner of each
    adapter, None for the model without one. adapters: None before the first. lock: held while a forward pass runs.
    """

    def __init__(self, model: Any, notes: Sequence[str] = ()) -> None:
        self.model = model
        self.notes = tuple(notes)
        self._attention = getattr(getattr(model, "config", None), "_attn_implementation", None)  # its own
        self.size = count_bytes(model.parameters())
        self.runners: dict[str | None, ModelRunner] = {}
        self.adapters: Adapters | None = None
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
        if adapter is None or self.adapters is None:
            return parts
        return {**parts, (id(self), adapter): self.adapters.sizes[adapter]}

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Apply an adapter that was added, or none, to the forward passes in this context."""
        with self.lock:
            if self.adapters is not None and adapter != self.adapters.active:
                self.adapters.switch(adapter)
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
        check_peft(adapter)
        from mixlm.engines.transformers.adapters import Adapters

        with self.lock:
            self.adapters = self.adapters or Adapters(self.model, self._attention)
            self.adapters.add(adapter, name)


def check_peft(adapter: str) -> None:
    """Raise MixlmError where the library that an adapter needs is missing."""
    if find_spec("peft") is None:
        raise MixlmError(f"the adapter {adapter} needs peft", "install: pip install 'mixlm[peft]'")


def adapter_bytes(adapter: str) -> int:
    """Return the memory of an adapter, a folder or hub id, from its files. Raises what `LoadedModel.add` raises."""
    check_peft(adapter)
    from mixlm.engines.transformers.adapters import read_adapter

    return count_bytes(read_adapter(adapter)[1].values())


def count_bytes(parameters: Any) -> int:
    """Return the memory of tensors."""
    return sum(_tensor_bytes(parameter) for parameter in parameters)


def _tensor_bytes(tensor: Any) -> int:
    """Return the memory of a tensor; of a quantised one of torchao, that of what it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return count_bytes(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())
