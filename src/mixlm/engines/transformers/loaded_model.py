"""One set of a model's weights for several engines, with LoRA adapters that are switched around each forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mixlm.engines.batching import SequenceInput
from mixlm.engines.transformers.model_loading import count_bytes
from mixlm.engines.transformers.position_frequencies import PositionFrequencies
from mixlm.errors import UnsupportedError

if TYPE_CHECKING:
    from mixlm.engines.transformers.adapters import Adapters

_LARGEST = 65504.0  # of float16


class LoadedModel:
    """A transformers model that several engines run, each with an adapter of its own or with none.

    name: for messages. notes: what a user should know about the weights. size: bytes of these without adapters.
    frequencies: the position frequencies that depend on the length of a sequence; None where there are none. adapters:
    None before the first. lock: held while a forward pass runs.
    """

    def __init__(self, model: Any, name: str, notes: Sequence[str] = ()) -> None:
        self.model = model
        self.name = name
        self.notes = tuple(notes)
        self.size = count_bytes(model.parameters())
        self.frequencies = PositionFrequencies.of(model)
        self.adapters: Adapters | None = None
        # Engines of one model may run in two threads: while one runs, the adapter must not change.
        self.lock = threading.RLock()
        self._attention = getattr(getattr(model, "config", None), "_attn_implementation", None)  # its own

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Apply an adapter that was added, or none, to the forward passes in this context."""
        with self.lock:
            if self.adapters is not None and adapter != self.adapters.active:
                self.adapters.switch(adapter)
            yield

    def add(self, adapter: str, name: str) -> None:
        """Load an adapter, a folder or hub id, unless it is loaded already. name: the member's, for messages.

        Raises:
            MixlmError: peft is not installed.
            UnsupportedError: it is not a plain LoRA adapter, or PEFT's own forward pass differs.
            ModelLoadError: it is not there, or does not fit the model.
        """
        from mixlm.engines.transformers.adapters import Adapters

        with self.lock:
            self.adapters = self.adapters or Adapters(self.model, self._attention)
            self.adapters.add(adapter, name)

    @contextmanager
    def noting_hidden_states(self, inputs: Sequence[SequenceInput]) -> Iterator[None]:
        """Hand what goes into the output layer, in all that runs in here, to the sessions that keep hidden states.

        Raises UnsupportedError for a model that computes its logits another way.
        """
        passes: list[torch.Tensor] = []

        def note(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            passes.append(arguments[0].reshape(-1, arguments[0].shape[-1]))

        with self.model.get_output_embeddings().register_forward_pre_hook(note):
            yield
        total = sum(item.last for item in inputs)
        if sum(len(rows) for rows in passes) < total:
            raise UnsupportedError(
                "this model does not show its hidden states", "observe the most likely tokens: a router with top_k"
            )
        states = torch.cat(passes)[-total:].float().clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
        for item, part in zip(inputs, np.split(states, np.cumsum([item.last for item in inputs])[:-1]), strict=True):
            if item.session.keeps_hidden:
                item.session.hidden_states = part
