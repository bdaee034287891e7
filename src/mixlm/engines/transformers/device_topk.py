"""The largest logits, found where they were computed: little has to be brought to the host.

A row of logits is some hundred thousand numbers, and a choice with top-k depends on a few of them. More than those are
brought over, so that it can be told whether the k-th is tied with any that were not; such a row is brought whole.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mixlm.types import Candidates, LogitsRow, TopKFilter

_MORE = 16  # than twice k
_MOST = 1024  # logits of a row; a longer list is no cheaper to find than the whole row to bring over


class DeviceTopK:
    """Brings over what cuts leave of logits. Masks of ids that may not be drawn are kept as long as their cuts are."""

    def __init__(self) -> None:
        self._banned: WeakKeyDictionary[TopKFilter, torch.Tensor] = WeakKeyDictionary()

    def of(self, logits: torch.Tensor, cuts: list[TopKFilter | None]) -> list[LogitsRow]:
        """Return each row of logits, (rows, vocab), as its cut leaves it, or float32 (vocab,) whole.

        All that is cut comes in one transfer; rows that are needed whole come in another.
        """
        rows: dict[TopKFilter, list[int]] = {}
        for at, cut in enumerate(cuts):
            if cut is not None and applies(cut, logits.shape[1]):
                rows.setdefault(cut, []).append(at)
        out: list[Any] = [None] * len(cuts)
        if rows:
            parts = torch.cat([self.part(logits, cut, at) for cut, at in rows.items()]).cpu().numpy()
            begin = 0
            for cut, places in rows.items():
                end = begin + 2 * _brought(cut) * len(places)
                for at, part in zip(places, parts[begin:end].reshape(len(places), 2, -1), strict=True):
                    out[at] = from_device(part, cut)
                begin = end
        whole = [at for at, row in enumerate(out) if row is None]
        if whole:
            numbers = (logits if len(whole) == len(out) else logits[whole]).float().cpu().numpy()
            for at, row in zip(whole, numbers, strict=True):
                out[at] = row
        return out

    def part(self, logits: torch.Tensor, cut: TopKFilter, places: list[int]) -> torch.Tensor:
        """Return the largest logits of some rows, falling, and their ids: int32, flat (rows · 2 · count).

        The logits are float32, taken for int32. What `kept` is handed is a row of these, (2, count), on the host.
        """
        if cut not in self._banned:
            self._banned[cut] = torch.tensor(cut.banned, device=logits.device)
        own = logits if len(places) == logits.shape[0] else logits[places]
        values, ids = own.index_fill(1, self._banned[cut], -torch.inf).topk(_brought(cut), dim=1)
        return torch.stack([values.float().view(torch.int32), ids.int()], dim=1).flatten()


def _brought(cut: TopKFilter) -> int:
    return 2 * cut.k + _MORE


def applies(cut: TopKFilter, size: int) -> bool:
    """Whether less is brought over of a row of `size` logits than all."""
    return _brought(cut) < min(_MOST, size)


def from_device(part: np.ndarray[Any, Any], cut: TopKFilter) -> Candidates | None:
    """Return what a cut leaves, of a row's `Largest.part`; None where more might be tied with the k-th."""
    values, ids = part[0].view(np.float32), part[1]
    least = values[cut.k - 1]
    if not values[-1] < least or np.isnan(values[0]):  # what is no number counts as the largest
        return None
    above = values >= least
    order = np.argsort(ids[above])
    return Candidates(ids[above][order].astype(np.int64), values[above][order])
