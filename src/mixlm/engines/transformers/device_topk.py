"""The largest logits, selected on the device that computed them, so that little is transferred to the host.

A row of logits is some hundred thousand numbers, and sampling with top-k depends on a few of them. More than k are
transferred, which shows whether the k-th is tied with any that were not; such a row is transferred whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from mixlm.types import Candidates, LogitsRow, TopKFilter

_EXTRA = 16  # logits beyond twice k
_MAX_COUNT = 1024  # logits of a row; selecting more costs as much as transferring the whole row


class DeviceTopK:
    """Transfers what top-k filters keep of logits. Masks of banned ids live as long as their filters."""

    def __init__(self) -> None:
        self._banned: WeakKeyDictionary[TopKFilter, torch.Tensor] = WeakKeyDictionary()

    def transfer(self, logits: torch.Tensor, filters: Sequence[TopKFilter | None]) -> list[LogitsRow]:
        """Return each row of logits, (rows, vocab), as its filter leaves it, or whole as float32 (vocab,).

        All filtered rows come in one transfer, rows that are needed whole in another.
        """
        by_filter: dict[TopKFilter, list[int]] = {}
        for row, top_k_filter in enumerate(filters):
            if top_k_filter is not None and is_worthwhile(top_k_filter, logits.shape[1]):
                by_filter.setdefault(top_k_filter, []).append(row)
        results: list[Any] = [None] * len(filters)
        if by_filter:
            parts = torch.cat([self.select(logits, *item).flatten() for item in by_filter.items()]).cpu().numpy()
            start = 0
            for top_k_filter, rows in by_filter.items():
                end = start + 2 * _count(top_k_filter) * len(rows)
                for row, part in zip(rows, parts[start:end].reshape(len(rows), 2, -1), strict=True):
                    results[row] = from_device(part, top_k_filter)
                start = end
        whole = [row for row, result in enumerate(results) if result is None]
        if whole:
            transferred = (logits if len(whole) == len(results) else logits[whole]).float().cpu().numpy()
            for row, numbers in zip(whole, transferred, strict=True):
                results[row] = numbers
        return results

    def select(self, logits: torch.Tensor, top_k_filter: TopKFilter, rows: list[int]) -> torch.Tensor:
        """Return the largest logits of some rows in falling order, and their ids: int32 (rows, 2, count).

        The logits are float32, viewed as int32. `from_device` takes one row of the result, on the host.
        """
        if top_k_filter not in self._banned:
            self._banned[top_k_filter] = torch.tensor(top_k_filter.banned, device=logits.device)
        selected = logits if len(rows) == logits.shape[0] else logits[rows]
        masked = selected.index_fill(1, self._banned[top_k_filter], -torch.inf)
        values, ids = masked.topk(_count(top_k_filter), dim=1)
        return torch.stack([values.float().view(torch.int32), ids.int()], dim=1)


def _count(top_k_filter: TopKFilter) -> int:
    """Return how many logits of a row are transferred."""
    return 2 * top_k_filter.k + _EXTRA


def is_worthwhile(top_k_filter: TopKFilter, vocab_size: int) -> bool:
    """Whether filtering a row of logits on the device transfers less than the whole row."""
    return _count(top_k_filter) < min(_MAX_COUNT, vocab_size)


def from_device(part: npt.NDArray[np.int32], top_k_filter: TopKFilter) -> Candidates | None:
    """Return what a filter keeps of a row of `DeviceTopK.select`; None where more might be tied with the k-th."""
    values, ids = part[0].view(np.float32), part[1]
    least = values[top_k_filter.k - 1]
    if not values[-1] < least or np.isnan(values[0]):  # topk ranks NaN first
        return None
    kept = values >= least
    order = np.argsort(ids[kept])
    return Candidates(ids[kept][order].astype(np.int64), values[kept][order])
