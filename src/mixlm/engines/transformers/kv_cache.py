"""Attention over KV buffers in place, for transformers models: the batch of a forward pass decides how.

transformers finds `attend` by name (its attention interface) and hands it the keyword arguments of the model's forward:
among them `attention_batch`, which knows the sequences of the pass. `PackedSequences` is any number of sequences of any
lengths. Their tokens are packed into one row, so that every weight matrix is read once for all of them and no padding
is computed; only attention runs sequence by sequence. `cuda_graphs` has the other kind: one sequence, fixed shapes.

KV buffers double when they are full. A token is written in place, and rollback sets the length.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from mixlm.engines.transformers.attention_form import AttentionForm
from mixlm.engines.transformers.prefix_cache import Segment
from mixlm.types import Ids

ATTENTION_NAME = "mixlm"
_SUPPORTED_OPTIONS = {
    "dropout",
    "scaling",
    "sliding_window",
    "is_causal",
    "attention_batch",
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_router_logits",
    "s_aux",
    "softcap",
}
_MIN_TOKENS = 256  # of a buffer


class KVBuffer:
    """Keys and values of one sequence of up to `size` tokens: two tensors a layer, (KV heads, size, head dimension).

    They begin as zeros, so that masked positions are numbers that attention can multiply by 0. graphs: what was set up
    to run on these buffers and no others. idle: no sequence uses it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.graphs: dict[tuple[int, int], Any] = {}
        self.idle = False

    def layer(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's tensors, created to hold keys and values like these: (KV heads, n, head dimension)."""
        tensors = self.layers.get(layer)
        if tensors is None:
            tensors = self.layers[layer] = self._zeros(key), self._zeros(value)
        return tensors

    @property
    def nbytes(self) -> int:
        """Memory of its tensors."""
        return sum(tensor.nbytes for tensors in self.layers.values() for tensor in tensors)

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(like.shape[0], self.size, like.shape[2])


class KVBufferPool:
    """Buffers for the sequences of one model.

    Args:
        max_idle: how many of each size are kept for other sequences.
        max_idle_bytes: memory of all that are kept.
    """

    def __init__(self, max_idle: int = 0, max_idle_bytes: int = 1 << 30) -> None:
        self._max_idle = max_idle
        self._max_idle_bytes = max_idle_bytes
        self._idle_bytes = 0
        self._free: dict[int, list[KVBuffer]] = {}
        self._lock = threading.RLock()  # whoever collects garbage may be in here

    def acquire(self, tokens: int) -> KVBuffer:
        """Return a buffer for so many tokens; its size is the next power of two."""
        size = max(1 << (tokens - 1).bit_length(), _MIN_TOKENS)
        with self._lock:
            free = self._free.get(size)
            if not free:
                return KVBuffer(size)
            buffer = free.pop()
            self._idle_bytes -= buffer.nbytes
        buffer.idle = False
        for tensors in buffer.layers.values():
            for tensor in tensors:
                tensor.zero_()
        return buffer

    def release(self, buffer: KVBuffer) -> None:
        """Take a buffer back."""
        buffer.idle = True
        size = buffer.nbytes
        with self._lock:
            free = self._free.setdefault(buffer.size, [])
            if len(free) < self._max_idle and self._idle_bytes + size <= self._max_idle_bytes:
                free.append(buffer)
                self._idle_bytes += size


class KVCache:
    """The KV cache of one sequence. length: tokens in it; it changes when a forward pass is done."""

    has_state = False

    def __init__(self, pool: KVBufferPool | None = None) -> None:
        self.length = 0
        self._pool = pool or KVBufferPool()
        self._buffer: KVBuffer | None = None

    def __del__(self) -> None:
        if self._buffer is not None:
            self._pool.release(self._buffer)

    def reserve(self, tokens: int) -> KVBuffer:
        """Return the buffer, grown to hold so many tokens in all."""
        old = self._buffer
        if old is not None and old.size >= tokens:
            return old
        buffer = self._pool.acquire(tokens)
        if old is not None:
            for layer, tensors in old.layers.items():
                for target, source in zip(buffer.layer(layer, *tensors), tensors, strict=True):
                    target[:, : self.length] = source[:, : self.length]
            self._pool.release(old)
        self._buffer = buffer
        return buffer

    def nearest(self, length: int) -> int:
        """Return the length to which `truncate` would cut: that length."""
        return min(length, self.length)

    def truncate(self, length: int) -> int:
        """Cut to the first `length` tokens. Returns how many are kept."""
        self.length = self.nearest(length)
        return self.length

    def lengths(self) -> list[int]:
        """Return the lengths that texts may be kept at for other sequences: the whole one."""
        return [self.length]

    def copy_segment(self, start: int, end: int) -> Segment:
        """Return a copy of keys and values of the tokens from `start` to `end`."""
        layers = {} if self._buffer is None else self._buffer.layers
        return Segment(end - start, {i: (k[:, start:end], v[:, start:end]) for i, (k, v) in layers.items()}).copy()

    def load(self, segments: Sequence[Segment], length: int) -> None:
        """Fill an empty cache with the `length` tokens of segments."""
        buffer, start = self.reserve(length), 0
        for segment in segments:
            end = start + segment.tokens
            for layer, tensors in segment.layers.items():
                for target, source in zip(buffer.layer(layer, *tensors), tensors, strict=True):
                    target[:, start:end] = source
            start = end
        self.length = length

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values, (KV heads, n, head dimension), behind the first `length`; return all as views."""
        end = self.length + key.shape[1]
        keys, values = self.reserve(end).layer(layer, key, value)
        keys[:, self.length : end] = key
        values[:, self.length : end] = value
        return keys[:, :end], values[:, :end]


QueryKeyValue = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (1, heads, tokens, head dimension) each


class AttentionBatch(Protocol):
    """The sequences of one forward pass."""

    def attend(self, layer: int, qkv: QueryKeyValue, form: AttentionForm) -> torch.Tensor:
        """Attend within each sequence.

        Args:
            layer: index of the layer.
            qkv: query, key and value of all tokens of the pass.
            form: of the layer's attention.

        Returns:
            (1, tokens, query heads, head dimension).
        """
        ...


class PackedSequences:
    """Any number of sequences: the KV cache of each, and how many tokens of the pass belong to it."""

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int]) -> None:
        self.caches = caches
        self.counts = counts
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def positions(self) -> Ids:
        """Return each token's position in its sequence: int64 (tokens,)."""
        sequences = zip(self.caches, self.counts, strict=True)
        return np.concatenate([np.arange(cache.length, cache.length + count) for cache, count in sequences])

    def commit(self) -> None:
        """Count the tokens as part of the KV caches, after the forward pass."""
        for cache, count in zip(self.caches, self.counts, strict=True):
            cache.length += count

    def attend(self, layer: int, qkv: QueryKeyValue, form: AttentionForm) -> torch.Tensor:
        """Attend sequence by sequence: see `AttentionBatch`."""
        query, key, value = qkv
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        start = 0
        for cache, count in zip(self.caches, self.counts, strict=True):
            tokens = slice(start, start + count)
            start += count
            keys, values = cache.append(layer, key[0, :, tokens], value[0, :, tokens])
            mask = None
            if count == 1:
                if form.window is not None:
                    keys, values = keys[:, -form.window :], values[:, -form.window :]
            else:
                mask = self._mask(count, keys.shape[1], form.window, keys.device).repeat(groups, 1)
            grouped = query[0, :, tokens].reshape(heads, groups * count, -1)
            attended = form.attend(grouped, keys, values, mask)
            out[0, tokens] = attended.view(heads * groups, count, -1).transpose(0, 1)
        return out

    def _mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Return which keys each query attends to: bool (queries, keys)."""
        mask = self._masks.get((queries, keys, window))
        if mask is None:
            mask = causal_mask(torch.arange(keys - queries, keys, device=device), keys, window)
            self._masks[queries, keys, window] = mask
        return mask


def causal_mask(positions: torch.Tensor, keys: int, window: int | None) -> torch.Tensor:
    """Return which keys queries at these positions attend to: bool (queries, keys)."""
    distance = positions[:, None] - torch.arange(keys, device=positions.device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence of a forward pass's `attention_batch`. query: (1, heads, tokens, head dimension).

    Raises NotImplementedError where a model needs more than an `AttentionForm`.
    """
    unsupported = [name for name, option in options.items() if name not in _SUPPORTED_OPTIONS and option is not None]
    if unsupported:
        raise NotImplementedError(f"attention with {', '.join(unsupported)}")
    if "attention_batch" not in options:
        raise NotImplementedError("its layers do not hand on what its forward pass is given")
    batch: AttentionBatch = options["attention_batch"]
    form = AttentionForm(*(options.get(name) for name in ("sliding_window", "scaling", "softcap", "s_aux")))
    return batch.attend(module.layer_idx, (query, key, value), form), None


def register(model: Any) -> bool:
    """Let a model attend with `attend`. Returns whether it can."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attend)
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    except Exception:  # each family refuses in its own way
        return False
    return bool(model.config._attn_implementation == ATTENTION_NAME)
