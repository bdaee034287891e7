"""Hidden states of a forward pass: what goes into the model's output layer, behind its last norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mixlm.engines.batching import SequenceInput
from mixlm.errors import UnsupportedError

_LARGEST = 65504.0  # of float16


def hidden_size(model: Any) -> int:
    """Return how many numbers a hidden state of a model has."""
    return int(model.get_output_embeddings().weight.shape[1])


class HiddenStateHook:
    """Notes what goes into a model's output layer, for one forward pass at a time."""

    def __init__(self, model: Any) -> None:
        self._rows: Any = None
        model.get_output_embeddings().register_forward_pre_hook(self._note)

    def _note(self, layer: Any, arguments: tuple[Any, ...]) -> None:
        self._rows = arguments[0]

    def store(self, inputs: Sequence[SequenceInput]) -> None:
        """Hand the hidden states of the last pass to the sessions that keep them. inputs: all of that pass.

        Raises:
            UnsupportedError: The model computes its logits another way.
        """
        rows, self._rows = self._rows, None
        total = sum(item.last for item in inputs)
        if rows is None or rows.shape[-2] < total:
            raise UnsupportedError(
                "this model does not show its hidden states", "observe the most likely tokens: a router with top_k"
            )
        states = rows.reshape(-1, rows.shape[-1])[-total:].float().clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
        for item, part in zip(inputs, np.split(states, np.cumsum([item.last for item in inputs])[:-1]), strict=True):
            if item.session.keeps_hidden:
                item.session.hidden_states = part
