"""The cache of one sequence in transformers' own form, cropped or restored from a snapshot to roll back.

Keys and values of full attention are cropped to any length. A recurrent state (of Mamba, of linear attention, of a
short convolution) holds the whole text before it and cannot be; nor can keys and values that have left a window. So
after each forward pass a snapshot of these is kept. There are few of them, every length of the last ones and ever fewer
further back: a rollback goes to the nearest one, and what lies between runs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mixlm.engines.transformers.kv_cache import Segment

MAX_SNAPSHOTS = 12  # of one sequence
_RECENT = 4  # the last snapshots, which are all kept
_CROPPABLE = {"DynamicLayer", "DummyLayer"}  # types of layers that hold nothing but keys and values of all tokens


class SnapshotCache:
    """One sequence's cache. length: tokens in it. has_state: whether it may have recurrent layers.

    cache: transformers' object; None before the first forward pass, in which the model makes its own.
    """

    def __init__(self, cache: Any = None) -> None:
        self.length = 0
        self.has_state = cache is None
        self.cache = cache
        self._snapshots: dict[int, list[dict[str, Any]]] = {}  # by length, in rising order

    def commit(self, cache: Any, count: int) -> None:
        """Record a forward pass of `count` tokens. cache: that the model returned."""
        self.cache = cache
        self.length += count
        if _own_state(cache) or any(type(layer).__name__ not in _CROPPABLE for layer in cache.layers):
            self._snapshots[self.length] = [*(_snapshot(layer) for layer in cache.layers), _copy(_own_state(cache))]
            if len(self._snapshots) > MAX_SNAPSHOTS:
                del self._snapshots[_expendable(list(self._snapshots))]

    def nearest(self, length: int) -> int:
        """Return the length to which `truncate` would cut."""
        if length >= self.length:
            return self.length
        if not self._snapshots:
            return length
        return max((taken for taken in self._snapshots if taken <= length), default=0)

    def truncate(self, length: int) -> int:
        """Cut to the first `length` tokens, or to as many as a snapshot allows. Returns how many are kept."""
        kept = self.nearest(length)
        if kept == self.length:
            return kept
        if not self._snapshots:
            self.cache.crop(kept - self.length)
        else:
            self._snapshots = {taken: layers for taken, layers in self._snapshots.items() if taken <= kept}
            self._rewind(kept)
        self.length = kept
        return kept

    def undo(self) -> None:
        """Forget what a forward pass that failed has written, to its first `length` tokens again."""
        self._rewind(self.length)

    def _rewind(self, length: int) -> None:
        """Set the layers to what they held after `length` tokens, for which there is a snapshot if there are any."""
        if not length:
            self.cache = None if self.has_state else type(self.cache)()
            return
        if length in self._snapshots:
            self._restore(self._snapshots[length])
        for layer in self.cache.layers:
            if _grows(layer) and layer.is_initialized:
                layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]

    def _restore(self, snapshot: list[dict[str, Any]]) -> None:
        for part, values in zip([*self.cache.layers, self.cache], snapshot, strict=True):
            for name, value in values.items():
                setattr(part, name, _copy(value))

    def lengths(self) -> list[int]:
        """Return the lengths that texts may be kept at for other sequences: those of snapshots, if it has a state."""
        return list(self._snapshots) if self.has_state else [self.length]

    def copy_segment(self, start: int, end: int) -> Segment:
        """Return a copy of keys and values of the tokens from `start` to `end`, and the state after them, if known."""
        layers = {
            index: (layer.keys[0, :, start:end], layer.values[0, :, start:end])
            for index, layer in enumerate(self.cache.layers)
            if _grows(layer) and layer.is_initialized
        }
        if end not in self._snapshots:
            return Segment(end - start, layers).copy()
        prototype = copy(self.cache)
        prototype.layers = [object.__new__(type(layer)) for layer in self.cache.layers]  # the snapshot has the rest
        snapshot = self._snapshots[end]
        return Segment(end - start, layers, (prototype, snapshot), sum(map(_size, snapshot))).copy()

    def load(self, segments: Sequence[Segment], length: int) -> None:
        """Fill an empty cache with the `length` tokens of segments, and with the state of the last one."""
        if segments[-1].state is not None:
            prototype, snapshot = segments[-1].state
            self.cache = copy(prototype)
            self.cache.layers = [copy(layer) for layer in prototype.layers]
            self._snapshots = {length: snapshot}
            for layer in self.cache.layers:
                layer.keys = layer.values = torch.empty(0)
            self._restore(snapshot)
        for index in segments[0].layers:
            keys, values = (
                torch.cat(parts, dim=1)[None] for parts in zip(*(s.layers[index] for s in segments), strict=True)
            )
            if self.has_state:
                self.cache.layers[index].keys, self.cache.layers[index].values = keys, values
            else:
                self.cache.update(keys, values, index)
        self.length = length


def _expendable(lengths: list[int]) -> int:
    """Return the length, in rising order, whose neighbours lie closest together for how far it lies back."""
    end = lengths[-1]
    gaps = {
        length: (after - before) / (end - length)
        for before, length, after in zip([0, *lengths], lengths[:-_RECENT], lengths[1:], strict=False)
    }
    return min(gaps, key=lambda length: gaps[length])


def _grows(layer: Any) -> bool:
    """Whether a layer's keys and values are those of all tokens."""
    return isinstance(layer, DynamicLayer) and not isinstance(layer, DynamicSlidingWindowLayer)


def _snapshot(layer: Any) -> dict[str, Any]:
    """Return what a layer holds, but for keys and values that can be cropped."""
    cropped = ("keys", "values") if _grows(layer) else ()
    return {name: _copy(value) for name, value in vars(layer).items() if name not in cropped}


def _own_state(cache: Any) -> dict[str, Any]:
    """Return the tensors that a cache holds outside its layers."""
    return {name: value for name, value in vars(cache).items() if name != "layers" and _size(value)}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(part) for key, part in value.items()}
    return [_copy(part) for part in value] if isinstance(value, list) else value


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_size, parts))
