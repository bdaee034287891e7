"""Ids that may not be sampled, inside vLLM: a logits processor. Imported by vLLM only.

Requests name them in `extra_args` (`vllm_xargs` in HTTP), as ranges: "0-16,151643,151665-151935". A member may have
thousands, which would be slow to send and to apply one by one. A server has it when it was started with
`--logits-processors mixlm.engines.vllm.banned_tokens_plugin:BannedTokensProcessor`.

vLLM has two model runners, each with an interface for such processors. This one has both, as far as the installed vLLM
does: the first (V1) reports changes of the batch, row by row (`update_state`); the second (V2) gives each request a
slot that it keeps (`add_request`), and says at every step which slot a row is of.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams

from mixlm.engines.vllm.sampling_params import BANNED_ARGUMENT, parse_ranges

_INTERFACES: list[Any] = []
try:
    from vllm.v1.sample.logits_processor import LogitsProcessor as BatchProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates

    _INTERFACES.append(BatchProcessor)
except ImportError:
    pass
try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as SlotProcessor

    _INTERFACES.append(SlotProcessor)
except ImportError:
    pass


class BannedTokensProcessor(*_INTERFACES):  # type: ignore[misc]
    """Masks the ids that requests name, before temperature and truncation: the first step of `A_i`.

    Args:
        vllm_config: vLLM's.
        state: the device, and whether memory is pinned, of the first model runner; the second's request state.
    """

    def __init__(self, vllm_config: Any, *state: Any) -> None:
        self._device = getattr(state[0], "device", state[0])
        self._ranges: dict[int, str] = {}  # by row of the batch, or by slot
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

    def update_state(self, batch_update: Any) -> None:
        """Update which row of the batch has which ids (the first model runner)."""
        if not process_dict_updates(
            self._ranges, batch_update, lambda params, _prompt, _output: _banned_ranges(params)
        ):
            return
        rows_by_ranges: dict[str, list[int]] = {}
        for row, ranges in self._ranges.items():
            rows_by_ranges.setdefault(ranges, []).append(row)
        self._groups = [
            (torch.tensor(rows, device=self._device).unsqueeze(1), self._ids(ranges))
            for ranges, rows in rows_by_ranges.items()
        ]

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Note the ids of a request that gets a slot (the second model runner). Returns whether there are any."""
        ranges = _banned_ranges(sampling_params)
        self._ranges.pop(req_idx, None)  # of the slot's last request
        if ranges:
            self._ranges[req_idx] = ranges
        return bool(ranges)

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Mask, in place: (rows, vocab). ctx: of the second model runner, which slot each row is of."""
        if ctx is None:
            for rows, ids in self._groups:
                logits[rows, ids] = -torch.inf
            return logits
        slots_by_ranges: dict[str, list[int]] = {}
        for slot in np.unique(ctx.idx_mapping_np).tolist():
            if slot in self._ranges:
                slots_by_ranges.setdefault(self._ranges[slot], []).append(slot)
        for ranges, slots in slots_by_ranges.items():
            # No index depends on values on the device, so nothing waits for it.
            masked = torch.isin(ctx.expanded_idx_mapping, torch.tensor(slots, device=self._device))
            ids = self._ids(ranges)
            logits[:, ids] = logits[:, ids].masked_fill(masked.unsqueeze(1), -torch.inf)
        return logits

    def _tensor(self, ranges: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(parse_ranges(ranges))).to(self._device)


def _banned_ranges(params: SamplingParams) -> str | None:
    arguments: dict[str, Any] = params.extra_args or {}
    return arguments.get(BANNED_ARGUMENT)
