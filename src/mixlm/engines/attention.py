"""Attention over many sequences in one forward, each with a cache of its own.

The tokens of all sequences lie behind each other in one row, so every matrix of the model is read once for all of them
and no padding is computed; only attention is done sequence by sequence. Keys and values lie in buffers that double when
they are full: a token is written in place, and taking tokens back is setting a number.

transformers finds `attend` by name (its attention interface), and hands it what the model's forward is called with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "mixlm"
_KNOWN = {"dropout", "scaling", "sliding_window", "is_causal", "rows", "position_ids", "use_cache", "cache_position"}


class KeyValues:
    """Keys and values of one sequence: for each layer two buffers, (key-value heads, room, head size)."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values, (heads, n, size), behind the first `length`; return all up to there, as views.

        `length` itself changes when all layers have been written.
        """
        end = self.length + key.shape[1]
        held = self._layers.get(layer)
        if held is None or held[0].shape[1] < end:
            held = self._grown(held, key, end), self._grown(held and held[::-1], value, end)
            self._layers[layer] = held
        held[0][:, self.length : end] = key
        held[1][:, self.length : end] = value
        return held[0][:, :end], held[1][:, :end]

    def _grown(self, held: tuple[torch.Tensor, ...] | None, like: torch.Tensor, end: int) -> torch.Tensor:
        room = like.new_empty(like.shape[0], max(2 * end, 256), like.shape[2])
        if held is not None:
            room[:, : self.length] = held[0][:, : self.length]
        return room


class Rows:
    """The sequences of one forward: each one's cache, and how many of the tokens are its own."""

    def __init__(self, caches: Sequence[KeyValues], counts: Sequence[int]) -> None:
        self.caches = caches
        self.counts = counts
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def positions(self) -> list[int]:
        """Return each token's position in its sequence."""
        return [
            one
            for cache, n in zip(self.caches, self.counts, strict=True)
            for one in range(cache.length, cache.length + n)
        ]

    def done(self) -> None:
        """Take the tokens over into the caches, after the forward."""
        for cache, count in zip(self.caches, self.counts, strict=True):
            cache.length += count

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Return which keys each query may look at, bool (queries, keys): those up to its own position."""
        known = self._masks.get((queries, keys, window))
        if known is None:
            behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            known = behind >= 0
            if window is not None:
                known &= behind < window
            self._masks[queries, keys, window] = known
        return known


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence. query: (1, heads, tokens, size). Returns (1, tokens, heads, size).

    Raises NotImplementedError where a model asks for more than scaling and a window.
    """
    unknown = [name for name, given in options.items() if name not in _KNOWN and given is not None]
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    rows: Rows = options["rows"]
    window: int | None = options.get("sliding_window")
    scale: float | None = options.get("scaling")
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    at = 0
    for cache, count in zip(rows.caches, rows.counts, strict=True):
        part = slice(at, at + count)
        at += count
        keys, values = cache.add(module.layer_idx, key[0, :, part], value[0, :, part])
        mask = None
        if count == 1:
            if window is not None:
                keys, values = keys[:, -window:], values[:, -window:]
        else:
            mask = rows.mask(count, keys.shape[1], window, keys.device).repeat(groups, 1)
        # Query heads that share a key head stand behind each other as queries: nothing has to be repeated.
        grouped = query[0, :, part].reshape(1, heads, groups * count, -1)
        found = scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=mask, scale=scale)
        out[0, part] = found.view(heads * groups, count, -1).transpose(0, 1)
    return out, None
