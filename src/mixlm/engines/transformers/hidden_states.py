"""Hidden states of a forward pass: what goes into the model's output layer, behind its last norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mixlm.engines.batching import SequenceInput
from mixlm.errors import UnsupportedError

_LARGEST = 65504.0  # of float16


class HiddenStateHook:
    """Notes what goes into a model's output layer, in the forward passes of one `recording`."""

    def __init__(self, model: Any) -> None:
        self._passes: list[torch.Tensor] | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._note)

    def _note(self, layer: Any, arguments: tuple[Any, ...]) -> None:
        if self._passes is not None:
            self._passes.append(arguments[0].reshape(-1, arguments[0].shape[-1]))

    @contextmanager
    def recording(self, inputs: Sequence[SequenceInput]) -> Iterator[None]:
        """Hand the hidden states of what runs in here to the sessions that keep them. inputs: all that runs.

        Raises:
            UnsupportedError: The model computes its logits another way.
        """
        passes: list[torch.Tensor] = []
        self._passes = passes
        try:
            yield
        finally:
            self._passes = None
        total = sum(item.last for item in inputs)
        if sum(len(rows) for rows in passes) < total:
            raise UnsupportedError(
                "this model does not show its hidden states", "observe the most likely tokens: a router with top_k"
            )
        states = torch.cat(passes)[-total:].float().clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
        for item, part in zip(inputs, np.split(states, np.cumsum([item.last for item in inputs])[:-1]), strict=True):
            if item.session.keeps_hidden:
                item.session.hidden_states = part
