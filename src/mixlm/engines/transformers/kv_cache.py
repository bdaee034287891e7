"""Attention with keys and values in place, for transformers models: what a forward's tokens are decides how.

transformers finds `attend` by name (its attention interface), and hands it what the model's forward is called with:
among that `rows`, which knows the sequences of the forward. `Rows` is any number of sequences of any lengths. Their
tokens lie behind each other in one row, so that every matrix of the model is read once for all of them and no padding
is computed; only attention is done sequence by sequence. `cuda_graphs` has the other: one sequence, fixed shapes.

Keys and values lie in buffers that double when they are full: a token is written in place, and taking tokens back is
setting a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from mixlm.types import Ids

NAME = "mixlm"
_KNOWN = {"dropout", "scaling", "sliding_window", "is_causal", "rows", "position_ids", "use_cache", "cache_position"}
_LEAST = 256  # tokens that a sequence has room for


class KVBuffer:
    """Buffers for one sequence of up to `size` tokens: for each layer two, (key-value heads, size, head size).

    They begin as zeros, so that what is not to be looked at is a number that attention can multiply by 0. steps: what
    was set up to run on these buffers and no others. idle: no sequence has it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.steps: dict[tuple[int, int], Any] = {}
        self.idle = False

    def layer(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's buffers, made for keys and values like these: (heads, n, size)."""
        held = self.layers.get(layer)
        if held is None:
            held = self.layers[layer] = self._zeros(key), self._zeros(value)
        return held

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(like.shape[0], self.size, like.shape[2])


class KVBufferPool:
    """Where the rooms of one model's sequences come from, and go to. kept: how many of each size wait for others."""

    def __init__(self, kept: int = 0) -> None:
        self._kept = kept
        self._free: dict[int, list[KVBuffer]] = {}

    def take(self, tokens: int) -> KVBuffer:
        """Return a room for so many tokens, the next power of two."""
        size = max(1 << (tokens - 1).bit_length(), _LEAST)
        free = self._free.get(size)
        if not free:
            return KVBuffer(size)
        room = free.pop()
        room.idle = False
        for one in room.layers.values():
            for buffer in one:
                buffer.zero_()
        return room

    def give(self, room: KVBuffer) -> None:
        """Take a room back."""
        room.idle = True
        free = self._free.setdefault(room.size, [])
        if len(free) < self._kept:
            free.append(room)


class KVCache:
    """Keys and values of one sequence. length: tokens; it changes when a forward is done."""

    def __init__(self, rooms: KVBufferPool | None = None) -> None:
        self.length = 0
        self._rooms = rooms or KVBufferPool()
        self._room: KVBuffer | None = None

    def __del__(self) -> None:
        if self._room is not None:
            self._rooms.give(self._room)

    def reserve(self, tokens: int) -> KVBuffer:
        """Return the room, with a place for so many tokens in all."""
        held = self._room
        if held is not None and held.size >= tokens:
            return held
        room = self._room = self._rooms.take(tokens)
        if held is not None:
            for layer, old in held.layers.items():
                for one, other in zip(room.layer(layer, *old), old, strict=True):
                    one[:, : self.length] = other[:, : self.length]
            self._rooms.give(held)
        return room

    def add(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values, (heads, n, size), behind the first `length`; return all up to there, as views."""
        end = self.length + key.shape[1]
        keys, values = self.reserve(end).layer(layer, key, value)
        keys[:, self.length : end] = key
        values[:, self.length : end] = value
        return keys[:, :end], values[:, :end]


class AttentionBatch(Protocol):
    """The sequences of one forward."""

    def attend(self, layer: int, asked: tuple[torch.Tensor, ...], window: int | None, scale: float | None) -> Any:
        """Attend within each sequence. asked: query, key and value of all tokens, (1, heads, tokens, size).

        window: how many tokens back, itself included, a token looks at; None for all. Returns (1, tokens, heads, size).
        """
        ...


class PackedSequences:
    """Any number of sequences: each one's cache, and how many of the tokens are its own."""

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int]) -> None:
        self.caches = caches
        self.counts = counts
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def positions(self) -> Ids:
        """Return each token's position in its sequence."""
        both = zip(self.caches, self.counts, strict=True)
        return np.concatenate([np.arange(cache.length, cache.length + n) for cache, n in both])

    def done(self) -> None:
        """Take the tokens over into the caches, after the forward."""
        for cache, count in zip(self.caches, self.counts, strict=True):
            cache.length += count

    def attend(
        self, layer: int, asked: tuple[torch.Tensor, ...], window: int | None, scale: float | None
    ) -> torch.Tensor:
        """Attend sequence by sequence: see `Attending`."""
        query, key, value = asked
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        at = 0
        for cache, count in zip(self.caches, self.counts, strict=True):
            part = slice(at, at + count)
            at += count
            keys, values = cache.add(layer, key[0, :, part], value[0, :, part])
            mask = None
            if count == 1:
                if window is not None:
                    keys, values = keys[:, -window:], values[:, -window:]
            else:
                mask = self._mask(count, keys.shape[1], window, keys.device).repeat(groups, 1)
            # Query heads that share a key head stand behind each other as queries: nothing has to be repeated.
            grouped = query[0, :, part].reshape(1, heads, groups * count, -1)
            found = scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=mask, scale=scale)
            out[0, part] = found.view(heads * groups, count, -1).transpose(0, 1)
        return out

    def _mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Return which keys each query may look at, bool (queries, keys)."""
        known = self._masks.get((queries, keys, window))
        if known is None:
            known = visible(torch.arange(keys - queries, keys, device=device), keys, window)
            self._masks[queries, keys, window] = known
        return known


def visible(positions: torch.Tensor, keys: int, window: int | None) -> torch.Tensor:
    """Return which keys queries at these positions may look at: those up to their own, bool (queries, keys)."""
    behind = positions[:, None] - torch.arange(keys, device=positions.device)
    found = behind >= 0
    return found if window is None else found & (behind < window)


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence of a forward's `rows`. query: (1, heads, tokens, size).

    Raises NotImplementedError where a model asks for more than scaling and a window.
    """
    unknown = [name for name, given in options.items() if name not in _KNOWN and given is not None]
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    rows: AttentionBatch = options["rows"]
    asked = query, key, value
    return rows.attend(module.layer_idx, asked, options.get("sliding_window"), options.get("scaling")), None
