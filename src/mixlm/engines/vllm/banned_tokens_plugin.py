"""Ids that may not be sampled, inside vLLM: a logits processor. Imported by vLLM only.

Requests name them in `extra_args` (`vllm_xargs` in HTTP), as ranges: "0-16,151643,151665-151935". A member may have
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
    """Masks the ids that requests name, before penalties, temperature and truncation: the first step of `A_i`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, str] = {}
        self._groups: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._ids = lru_cache(maxsize=64)(self._tensor)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for what is no list of ranges."""
        if ranges := _banned_ranges(sampling_params):
            parse_ranges(ranges)

    def is_argmax_invariant(self) -> bool:
        """Return false: the most likely token may be masked."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Update which row of the batch has which ids."""
        if not process_dict_updates(self._rows, batch_update, lambda params, _prompt, _output: _banned_ranges(params)):
            return
        rows_by_ranges: dict[str, list[int]] = {}
        for row, ranges in self._rows.items():
            rows_by_ranges.setdefault(ranges, []).append(row)
        self._groups = [
            (torch.tensor(rows, device=self._device).unsqueeze(1), self._ids(ranges))
            for ranges, rows in rows_by_ranges.items()
        ]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask, in place: (rows, vocab)."""
        for rows, ids in self._groups:
            logits[rows, ids] = -torch.inf
        return logits

    def _tensor(self, ranges: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(parse_ranges(ranges))).to(self._device)


def _banned_ranges(params: SamplingParams) -> str | None:
    arguments: dict[str, Any] = params.extra_args or {}
    return arguments.get(BANNED_ARGUMENT)
