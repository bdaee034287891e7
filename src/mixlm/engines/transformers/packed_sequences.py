"""The sequences of one forward pass: their tokens lie in one row, and attention runs over their KV buffers in place.

Every weight matrix is read once for all of them and nothing but attention is padded. Sequences whose buffers lie near
each other in a slab attend in one call, where that takes less time than a call for each: what a call costs beside its
work is weighed against what is attended to in vain, since lengths differ, or since a slot between them takes no part.
A sequence with many tokens, such as a prompt, attends by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from mixlm.engines.transformers.attention import AttentionForm, Lengths, QueryKeyValue, VarlenKernel, causal_mask
from mixlm.engines.transformers.kv_cache import KVBuffer, KVCache
from mixlm.types import Ids

_MAX_TOKENS = 16  # of a sequence that attends with others
# What a call takes beside its work, in numbers of keys and values that are attended to in that time; and what each
# further query of a sequence adds to the work, as a fraction of it.
_CALL_NUMBERS = 1 << 17
_QUERY_COST = 0.1


class PackedSequences:
    """Any number of sequences: the KV cache of each, and how many tokens of the pass belong to it.

    kernel: for sequences of any lengths, where there is one.
    """

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int], kernel: VarlenKernel | None = None) -> None:
        self.caches = caches
        self.counts = counts
        self._kernel = kernel
        self._calls: Sequence[_Alone | _Together | _InKernel] = ()

    def positions(self) -> Ids:
        """Return each token's position in its sequence: int64 (tokens,)."""
        sequences = zip(self.caches, self.counts, strict=True)
        return np.concatenate([np.arange(cache.length, cache.length + count) for cache, count in sequences])

    def commit(self) -> None:
        """Count the tokens as part of the KV caches, after the forward pass."""
        for cache, count in zip(self.caches, self.counts, strict=True):
            cache.length += count

    def attend(self, layer: int, qkv: QueryKeyValue, form: AttentionForm) -> torch.Tensor:
        """Attend within each sequence: see `attention.attend`."""
        query, key, value = qkv
        if not self._calls:
            self._calls = self._plan(query.device, _CALL_NUMBERS / (key.shape[1] * (key.shape[3] + value.shape[3])))
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
        for call in self._calls:
            call.attend(layer, qkv, form, out)
        return out[None]

    def _plan(self, device: torch.device, call_keys: float) -> Sequence[_Alone | _Together | _InKernel]:
        starts = np.cumsum([0, *self.counts[:-1]]).tolist()
        parts = [
            _Part(cache, cache.reserve(cache.length + count), start, count)
            for cache, start, count in zip(self.caches, starts, self.counts, strict=True)
        ]
        if self._kernel is not None and len(parts) > 1:
            return [_InKernel(parts, self._kernel)]
        groups: list[list[_Part]] = []
        for part in sorted(parts, key=lambda part: (id(part.buffer.slab), part.buffer.slot)):
            last = groups[-1] if groups else [part]
            is_near = last[0].buffer.slab is part.buffer.slab and max(last[0].size, part.size) <= _MAX_TOKENS
            if groups and is_near and _cost([*last, part]) <= _cost(last) + _cost([part]) + call_keys:
                last.append(part)
            else:
                groups.append([part])
        return [_Alone(group[0]) if len(group) == 1 else _Together(group, device) for group in groups]


class _Part(NamedTuple):
    """A sequence's part in a pass: `size` tokens from `start` on."""

    cache: KVCache
    buffer: KVBuffer
    start: int
    size: int


def _cost(parts: Sequence[_Part]) -> float:
    """What attention of parts in rising slots takes in one call, in keys: of each slot, as many as one has at most."""
    keys, queries = max(part.cache.length + part.size for part in parts), max(part.size for part in parts)
    return (parts[-1].buffer.slot - parts[0].buffer.slot + 1) * keys * (1 + _QUERY_COST * (queries - 1))


class _Alone:
    """A sequence that attends by itself."""

    def __init__(self, part: _Part) -> None:
        self._part = part
        self._masks: dict[tuple[int | None, torch.device], torch.Tensor] = {}

    def attend(self, layer: int, qkv: QueryKeyValue, form: AttentionForm, out: torch.Tensor) -> None:
        """Write what its tokens attend to. out: (tokens, query heads, head dimension)."""
        query, key, value = qkv
        cache, _, start, count = self._part
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        tokens = slice(start, start + count)
        keys, values = cache.append(layer, key[0, :, tokens], value[0, :, tokens])
        mask = None
        if count == 1:
            if form.window is not None:
                keys, values = keys[:, -form.window :], values[:, -form.window :]
        else:
            mask = self._mask(keys.shape[1], form.window, keys.device).repeat(groups, 1)
        grouped = query[:, :, tokens].reshape(1, heads, groups * count, -1)
        attended = form.attend(grouped, keys[None], values[None], mask)
        out[tokens] = attended.view(heads * groups, count, -1).transpose(0, 1)

    def _mask(self, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Return which keys each token attends to: bool (tokens, keys)."""
        if (window, device) not in self._masks:
            positions = torch.arange(keys - self._part.size, keys, device=device)
            self._masks[window, device] = causal_mask(positions, keys, window)
        return self._masks[window, device]


class _Together:
    """Sequences in rising slots that attend in one call. Each slot has as many queries as the one with the most."""

    def __init__(self, parts: Sequence[_Part], device: torch.device) -> None:
        self._slab, begin, end = parts[0].buffer.slab, parts[0].buffer.slot, parts[-1].buffer.slot + 1
        self._seen = slice(begin, end)
        self._keys = max(part.cache.length + part.size for part in parts)
        queries = max(part.size for part in parts)
        # Of padding: the first token of the group, and a position from which it attends to something.
        rows = np.full((end - begin, queries), parts[0].start)
        positions = np.full_like(rows, self._keys - 1)
        places = []
        for cache, buffer, start, count in parts:
            slot = buffer.slot - begin
            rows[slot, :count] = np.arange(start, start + count)
            positions[slot] = cache.length + np.minimum(np.arange(queries), count - 1)
            places.append(slot * queries + np.arange(count))
        place = np.concatenate(places)
        self._place = torch.tensor(place, device=device)
        self._rows = torch.tensor(rows, device=device)
        self._tokens = self._rows.view(-1)[self._place]
        self._positions = torch.tensor(positions, device=device)
        self._token_slots = torch.tensor(begin + place // queries, device=device)
        self._token_positions = self._positions.view(-1)[self._place]
        self._masks: dict[int | None, tuple[int, torch.Tensor | None]] = {}

    def attend(self, layer: int, qkv: QueryKeyValue, form: AttentionForm, out: torch.Tensor) -> None:
        query, key, value = (tensor[0].transpose(0, 1) for tensor in qkv)
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        keys, values = self._slab.layer(layer, *(tensor[0] for tensor in qkv[1:]))
        keys[self._token_slots, :, self._token_positions] = key[self._tokens]
        values[self._token_slots, :, self._token_positions] = value[self._tokens]
        slots, queries = self._rows.shape
        start, mask = self._mask(form.window, groups, query.dtype)
        seen = self._seen, slice(None), slice(start, self._keys)
        grouped = query[self._rows].view(slots, queries, heads, groups, -1).permute(0, 2, 3, 1, 4)
        attended = form.attend(grouped.reshape(slots, heads, groups * queries, -1), keys[seen], values[seen], mask)
        attended = attended.view(slots, heads, groups, queries, -1).permute(0, 3, 1, 2, 4)
        out[self._tokens] = attended.reshape(slots * queries, heads * groups, -1)[self._place]

    def _mask(self, window: int | None, groups: int, dtype: torch.dtype) -> tuple[int, torch.Tensor | None]:
        """Return the first key that counts, and what is added to scores: (slots, 1, rows of a KV head or 1, keys)."""
        if window not in self._masks:
            start = 0 if window is None else max(int(self._positions.min()) - window + 1, 0)
            slots, queries = self._positions.shape
            allowed = causal_mask(self._positions.view(-1), self._keys, window)[:, start:]
            mask = None
            if not bool(allowed.all()):
                mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)
                mask = mask.view(slots, 1, queries, -1)
                if queries > 1:
                    mask = mask.repeat(1, 1, groups, 1)
            self._masks[window] = start, mask
        return self._masks[window]


class _InKernel:
    """All sequences of a forward pass in one call of a kernel, which takes the keys of all of them in one row."""

    def __init__(self, parts: Sequence[_Part], kernel: VarlenKernel) -> None:
        self._parts = parts
        self._kernel = kernel
        self._lengths: dict[torch.device, Lengths] = {}

    def attend(self, layer: int, qkv: QueryKeyValue, form: AttentionForm, out: torch.Tensor) -> None:
        query, key, value = qkv
        pairs = [
            part.cache.append(layer, *(tensor[0, :, part.start : part.start + part.size] for tensor in (key, value)))
            for part in self._parts
        ]
        keys, values = (
            torch.cat([tensor.transpose(0, 1) for tensor in tensors]) for tensors in zip(*pairs, strict=True)
        )
        packed = query[0].transpose(0, 1).contiguous()
        out.copy_(self._kernel.attend(packed, keys, values, self._lengths_on(query.device), form))

    def _lengths_on(self, device: torch.device) -> Lengths:
        if device not in self._lengths:
            queries = [part.size for part in self._parts]
            keys = [part.cache.length + part.size for part in self._parts]
            query_ends, key_ends = (
                torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32, device=device) for sizes in (queries, keys)
            )
            self._lengths[device] = Lengths(query_ends, key_ends, max(queries), max(keys))
        return self._lengths[device]
