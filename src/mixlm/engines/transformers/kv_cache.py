"""KV caches of sequences, in buffers that attention reads in place.

A token is written in place, and rollback sets the length. A buffer by itself is twice as large each time it is full,
and what it holds is copied. Buffers that lie side by side begin with addresses for thousands of tokens, and the system
gives memory to what is written.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

_MIN_TOKENS = 256  # of a buffer by itself
# Of one among others, which takes memory as it is written: whole pages, whatever a token takes.
_MIN_SLOT_TOKENS = max(4096, mmap.PAGESIZE)
_MAX_IDLE_BYTES = 1 << 30  # of all buffers that are kept for other sequences
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on

LayerTensors = dict[int, tuple[torch.Tensor, torch.Tensor]]  # keys and values, (KV heads, n, head dimension) each


class Segment(NamedTuple):
    """What a cache holds of successive tokens. state: of the recurrent layers after the last one, None if unknown."""

    tokens: int
    layers: LayerTensors
    state: Any = None
    state_bytes: int = 0

    def cut(self, start: int, end: int) -> Segment:
        """Return the tokens from `start` to `end` as views, with the state if the last one is among them."""
        layers = {layer: (keys[:, start:end], values[:, start:end]) for layer, (keys, values) in self.layers.items()}
        return Segment(end - start, layers, *((self.state, self.state_bytes) if end == self.tokens else ()))

    def copy(self) -> Segment:
        """Return the same with keys and values of its own."""
        return self._replace(
            layers={layer: (keys.clone(), values.clone()) for layer, (keys, values) in self.layers.items()}
        )

    @property
    def nbytes(self) -> int:
        """Memory of it."""
        tensors = [tensor for pair in self.layers.values() for tensor in pair]
        return self.state_bytes + sum(tensor.nbytes for tensor in tensors)


class SlabError(MemoryError):
    """The system has no addresses for a slab."""


class KVSlab:
    """Buffers of one size that lie side by side: two tensors a layer, (slots, KV heads, size, head dimension).

    They begin as zeros, so that masked positions are numbers that attention can multiply by 0. used: how many of its
    slots sequences use.
    """

    def __init__(self, size: int, slots: int) -> None:
        self.size = size
        self.slots = slots
        self.layers: LayerTensors = {}
        self.used = 0
        self._maps: list[mmap.mmap] = []

    def layer(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's tensors, created to hold keys and values like these: (KV heads, n, head dimension)."""
        tensors = self.layers.get(layer)
        if tensors is None:
            tensors = self.layers[layer] = self._zeros(key), self._zeros(value)
        return tensors

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        shape = self.slots, like.shape[0], self.size, like.shape[2]
        if self.slots == 1:
            return like.new_zeros(shape)
        # Linux gives memory to the pages that are written, and no others.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            memory = mmap.mmap(-1, math.prod(shape) * like.element_size(), flags=flags)
        except OSError as error:
            raise SlabError(f"{self.slots} KV buffers cannot lie side by side: {error}") from error
        with suppress(OSError):  # the system has no huge pages, each of which would be written as a whole
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._maps.append(memory)
        return torch.frombuffer(memory, dtype=like.dtype).view(shape)

    def free(self, slot: int) -> None:
        """Give the memory of a slot back to the system, where it takes memory as it is written: it is zeros again."""
        for memory in list(self._maps):
            size = len(memory) // self.slots
            memory.madvise(mmap.MADV_DONTNEED, slot * size, size)


class KVBuffer:
    """Keys and values of one sequence of up to `size` tokens, in a slot of a slab.

    graphs: what was set up to run on these buffers and no others. idle: no sequence uses it.
    """

    def __init__(self, slab: KVSlab, slot: int) -> None:
        self.size = slab.size
        self.slab = slab
        self.slot = slot
        self.graphs: dict[tuple[int, int], Any] = {}
        self.idle = False
        self._layers: LayerTensors = {}

    def layer(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's tensors, created to hold keys and values like these: (KV heads, n, head dimension)."""
        tensors = self._layers.get(layer)
        if tensors is None:
            keys, values = self.slab.layer(layer, key, value)
            tensors = self._layers[layer] = keys[self.slot], values[self.slot]
        return tensors

    @property
    def layers(self) -> LayerTensors:
        """The tensors of each layer, (KV heads, size, head dimension)."""
        return {layer: (keys[self.slot], values[self.slot]) for layer, (keys, values) in list(self.slab.layers.items())}

    def fill(self, start: int, segment: Segment) -> None:
        """Write the tokens of a segment from `start` on."""
        for layer, tensors in segment.layers.items():
            for target, source in zip(self.layer(layer, *tensors), tensors, strict=True):
                target[:, start : start + segment.tokens] = source

    @property
    def nbytes(self) -> int:
        """Memory of its tensors, if all of it is written."""
        return sum(tensor.nbytes for tensors in self.layers.values() for tensor in tensors)

    def clear(self) -> None:
        """Make it zeros again."""
        for tensors in self.layers.values():
            for tensor in tensors:
                tensor.zero_()


class KVBufferPool:
    """Buffers for the sequences of one model.

    max_idle: how many of each size are kept for other sequences, where each is for itself. slots: how many lie side by
    side; 1 unless this is Linux. Where it is more, buffers are large from the start: they take memory as it is written.
    """

    def __init__(self, max_idle: int = 0, slots: int = 1) -> None:
        self._max_idle = max_idle
        self.slots = slots if sys.platform == "linux" else 1
        self._free: dict[int, list[KVBuffer]] = {}
        self._lock = threading.RLock()  # whoever collects garbage may be in here

    def acquire(self, tokens: int) -> KVBuffer:
        """Return a buffer for so many tokens; its size is the next power of two, or larger."""
        with self._lock:
            size = max(1 << (tokens - 1).bit_length(), _MIN_TOKENS if self.slots == 1 else _MIN_SLOT_TOKENS)
            free = self._free.setdefault(size, [])
            if not free:
                slab = KVSlab(size, self.slots)
                free += [KVBuffer(slab, slot) for slot in range(self.slots)]
            buffer = min(free, key=lambda buffer: (-buffer.slab.used, buffer.slot))
            buffer.slab.used += 1
            if buffer in free:
                free.remove(buffer)
        buffer.idle = False
        if buffer.slab.slots == 1:
            buffer.clear()
        return buffer

    def release(self, buffer: KVBuffer) -> None:
        """Take a buffer back. A slab that no sequence uses any more goes, unless it may be kept."""
        buffer.idle = True
        slab = buffer.slab
        slab.free(buffer.slot)
        with self._lock:
            free = self._free.setdefault(slab.size, [])
            slab.used -= 1
            if slab.slots > self.slots:
                return
            idle = (other for others in self._free.values() for other in others if not other.slab.used)
            if slab.used or (
                len(free) < self._max_idle and buffer.nbytes + sum(other.nbytes for other in idle) <= _MAX_IDLE_BYTES
            ):
                free.append(buffer)
            else:
                free[:] = [other for other in free if other.slab is not slab]

    def separate(self) -> None:
        """Let every buffer be for itself from now on. Sequences leave what lies side by side when they go on."""
        with self._lock:
            self.slots = 1
            self._free.clear()


class KVCache:
    """The KV cache of one sequence. length: tokens in it; it changes when a forward pass is done."""

    has_state = False

    def __init__(self, pool: KVBufferPool | None = None) -> None:
        self.length = 0
        self._pool = pool or KVBufferPool()
        self._buffer: KVBuffer | None = None

    def __del__(self) -> None:
        # At the end of the process the names of a module may be gone before its objects.
        if self._buffer is not None and sys is not None and not sys.is_finalizing():
            self._pool.release(self._buffer)

    def reserve(self, tokens: int) -> KVBuffer:
        """Return the buffer, grown to hold so many tokens in all."""
        old = self._buffer
        if old is None or old.size < tokens or old.slab.slots > self._pool.slots:
            buffer = self._pool.acquire(max(tokens, self.length))
            if old is not None:
                try:
                    buffer.fill(0, Segment(old.size, old.layers).cut(0, self.length))
                except BaseException:
                    self._pool.release(buffer)
                    raise
                self._pool.release(old)
            old = self._buffer = buffer
        return old

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
        return Segment(self.length, {} if self._buffer is None else self._buffer.layers).cut(start, end).copy()

    def load(self, segments: Sequence[Segment], length: int) -> None:
        """Fill an empty cache with the `length` tokens of segments."""
        buffer, start = self.reserve(length), 0
        for segment in segments:
            buffer.fill(start, segment)
            start += segment.tokens
        self.length = length

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values, (KV heads, n, head dimension), after the first `length`; return all as views."""
        end = self.length + key.shape[1]
        keys, values = self.reserve(end).layer(layer, key, value)
        keys[:, self.length : end] = key
        values[:, self.length : end] = value
        return keys[:, :end], values[:, :end]
