"""Ids that may not be drawn, inside vLLM: a logits processor. Imported by vLLM only.

Requests name them by `extra_args` (`vllm_xargs` in HTTP), as ranges: "0-16,151643,151665-151935". A member may have
thousands, which would be slow to send and to apply one by one. A server has it when it was started with
`--logits-processors mixlm.engines.vllm.banned_tokens_plugin:BannedTokensProcessor`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from mixlm.engines.vllm.id_ranges import BANNED_ARGUMENT, parse_ranges


class BannedTokensProcessor(LogitsProcessor):  # type: ignore[misc]
    """Masks what requests name, before penalties, temperature and truncation: the first step of `A_i`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, str] = {}
        self._groups: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._ids = lru_cache(maxsize=64)(self._tensor)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for what is no list of ranges."""
        if given := _given(sampling_params):
            parse_ranges(given)

    def is_argmax_invariant(self) -> bool:
        """The likeliest token may be one of these."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Note which row of the batch has which ids."""
        if not process_dict_updates(self._rows, batch_update, lambda params, _prompt, _written: _given(params)):
            return
        rows: dict[str, list[int]] = {}
        for row, given in self._rows.items():
            rows.setdefault(given, []).append(row)
        self._groups = [
            (torch.tensor(those, device=self._device).unsqueeze(1), self._ids(given)) for given, those in rows.items()
        ]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask, in place: (rows, vocab)."""
        for rows, ids in self._groups:
            logits[rows, ids] = -torch.inf
        return logits

    def _tensor(self, given: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(parse_ranges(given))).to(self._device)


def _given(params: SamplingParams) -> str | None:
    arguments: dict[str, Any] = params.extra_args or {}
    return arguments.get(BANNED_ARGUMENT)
