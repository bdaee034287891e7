"""Forwards of one sequence in a few fixed shapes, so that a GPU can be handed a whole one at once.

In eager PyTorch a short forward is bound by starting its kernels, over a thousand of them. Where neither shapes nor
addresses change, and nothing is decided on the host, they can be captured into a CUDA graph once and started with one
call. So a step takes 1, 2, 4, … tokens, what is missing filled up with padding; its only inputs are the ids, the
length of the sequence before, and the positions whose logits are asked for, all of them numbers on the device; keys and
values lie in a room of fixed size, all of which is looked at through a mask that is made from the length. Padding
stands behind the sequence's end, so no token looks at it, and later tokens overwrite it.

Without CUDA the same step is called directly: slower than the usual forward, but equal to it, and a test can say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch.nn.functional import scaled_dot_product_attention

from mixlm.engines.transformers.fused_norms import FusedNorms
from mixlm.engines.transformers.kv_cache import KVBuffer, KVBufferPool, KVCache, visible
from mixlm.types import Ids

LENGTHS = (1, 2, 4, 8, 16, 32)  # tokens of a step; what is longer is run as it is
_KEPT = 2  # rooms of each size that wait for another sequence, with what is captured on them
_CAPTURED = 4  # sequences at once that steps are captured for: each takes a fraction of a second for each shape


class OneRow:
    """The sequence of a step: its room, and where its tokens stand, int64 (tokens,) on the device."""

    def __init__(self, room: KVBuffer, positions: torch.Tensor) -> None:
        self._room = room
        self._positions = positions
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(
        self, layer: int, asked: tuple[torch.Tensor, ...], window: int | None, scale: float | None
    ) -> torch.Tensor:
        """Write keys and values down and attend to the whole room: see `attention.Attending`."""
        query, key, value = asked
        keys, values = self._room.layer(layer, key[0], value[0])
        keys.index_copy_(1, self._positions, key[0])
        values.index_copy_(1, self._positions, value[0])
        heads, count = key.shape[1], query.shape[2]
        groups = query.shape[1] // heads
        if window not in self._masks:
            # In numbers, which attention would otherwise make of it in every layer anew.
            seen = visible(self._positions, self._room.size, window).repeat(groups, 1)
            self._masks[window] = query.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
        grouped = query[0].reshape(1, heads, groups * count, -1)
        found = scaled_dot_product_attention(
            grouped, keys[None], values[None], attn_mask=self._masks[window], scale=scale
        )
        return found.view(heads * groups, count, -1).transpose(0, 1)[None]


class Step:
    """A forward of `tokens` tokens that gives the logits of `asked` of them."""

    def __init__(self, model: Any, norms: FusedNorms, tokens: int, asked: int) -> None:
        self._model, self._norms = model, norms
        self._tokens = tokens
        device = model.device
        # One array, so that one transfer fills all: ids, the length before, the positions asked for.
        self._host = torch.zeros(tokens + 1 + asked, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._numbers = self._host.numpy()
        self._inputs = self._host.to(device)
        self._offsets = torch.arange(tokens, device=device)

    def fill(self, ids: Ids, length: int, last: int) -> None:
        """Say what is run next: up to `tokens` ids behind `length` others, the `last` ones asked for."""
        count, numbers = len(ids), self._numbers
        numbers[:count] = ids
        numbers[count : self._tokens] = 0
        numbers[self._tokens] = length
        asked = numbers[self._tokens + 1 :]
        asked[:] = count - 1
        asked[:last] = range(count - last, count)
        self._inputs.copy_(self._host, non_blocking=True)

    def put(self, token: torch.Tensor, length: int) -> None:
        """Say what is run next where the device alone knows it: one token, int64 (1,), behind `length` others.

        Nothing of it lies on the host, so any number of these may be on their way at once. For steps of one token.
        """
        self._inputs[:1].copy_(token)
        self._inputs[1:2].fill_(length)

    def run(self, room: KVBuffer) -> torch.Tensor:
        """Run it: (asked, vocab). Nothing in here waits for the device, or depends on what it computes."""
        ids, numbers = self._inputs[: self._tokens], self._inputs[self._tokens :]
        start, asked = numbers[:1], numbers[1:]
        # Padding gets the last token's position, since a model may have no further one.
        positions = start + torch.minimum(self._offsets, asked[-1])
        with self._norms.used():
            out = self._model(
                input_ids=ids[None],
                position_ids=positions[None],
                logits_to_keep=asked,
                use_cache=False,
                rows=OneRow(room, start + self._offsets),
            )
        logits: torch.Tensor = out.logits[0]
        return logits


class CapturedStep(Step):
    """A step as a CUDA graph: run as it is the first time, captured the second, and replayed from then on.

    It is always run on the same room. pool: memory that the graphs of one model share, since no two run at once.
    """

    def __init__(self, model: Any, norms: FusedNorms, tokens: int, asked: int, *, pool: Any) -> None:
        super().__init__(model, norms, tokens, asked)
        self._pool = pool
        self._graph: Any = None
        self._out: torch.Tensor | None = None

    def run(self, room: KVBuffer) -> torch.Tensor:
        """Run it, or let the device do all of it at once. What it returns is good until the next run."""
        if self._out is None:
            self._out = warmed_up(lambda: Step.run(self, room), self._model.device)
        elif self._graph is None:
            self._graph, self._out = captured(lambda: Step.run(self, room), self._model.device, self._pool)
            self._graph.replay()
        else:
            self._graph.replay()
        return self._out


def warmed_up(run: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """Run what is to be captured once: what libraries set up when they are first used must not be captured.

    PyTorch asks for this to be done on a stream of its own.
    """
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    usual = torch.cuda.current_stream(device)
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        out = run()
    usual.wait_stream(stream)
    return out


def captured(run: Callable[[], torch.Tensor], device: torch.device, pool: Any) -> tuple[Any, torch.Tensor]:
    """Return what replays all that `run` lets a device do, and what it fills with the result. Nothing is computed."""
    graph = torch.cuda.CUDAGraph()
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    usual = torch.cuda.current_stream(device)
    # Another thread may be at work on another device, or on another model.
    others = "thread_local"
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=others):
            out = run()
    finally:
        torch.cuda.set_stream(usual)  # which a capture that failed does not see to
    return graph, out


class CudaGraphRunner:
    """All steps of one model. captures: into CUDA graphs. rooms: where its sequences' keys and values lie.

    Steps that are captured belong to a room, and a room goes from one sequence to the next. Few rooms at a time have
    such steps, since capturing takes time: a sequence beyond those is run as if there were no steps.
    """

    def __init__(self, model: Any, *, capture: bool) -> None:
        self.rooms = KVBufferPool(_KEPT if capture else 0)
        self._model = model
        self._norms = FusedNorms(model)
        self.captures = capture
        self._captured: WeakSet[KVBuffer] = WeakSet()
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def anew(self) -> CudaGraphRunner:
        """Return the same steps with nothing captured yet."""
        return CudaGraphRunner(self._model, capture=self.captures)

    def fit(self, cache: KVCache, tokens: int) -> bool:
        """Whether there is a step for so many tokens of a sequence."""
        if tokens > LENGTHS[-1]:
            return False
        room = cache.reserve(cache.length + _padded(tokens))
        if self.captures and room not in self._captured:
            if sum(not one.idle for one in self._captured) >= _CAPTURED:
                return False
            self._captured.add(room)
        return True

    def run(self, cache: KVCache, ids: Ids, last: int) -> torch.Tensor:
        """Run ids, int64 (n,), that `fit`: the logits of the last positions, (last, vocab), until the next run."""
        tokens = _padded(len(ids))
        asked = 1 if last == 1 else tokens
        room = cache.reserve(cache.length + tokens)
        step = self._step(room, tokens, asked)
        step.fill(ids, cache.length, last)
        out = step.run(room)[:last]
        cache.length += len(ids)
        return out

    def run_on(self, room: KVBuffer, token: torch.Tensor, length: int) -> torch.Tensor:
        """Run one token, int64 (1,) on the device, behind `length` others: its logits, (1, vocab), until the next run.

        It must `fit`. No cache takes it down: what is there counts once a cache's length says so.
        """
        step = self._step(room, 1, 1)
        step.put(token, length)
        return step.run(room)

    def _step(self, room: KVBuffer, tokens: int, asked: int) -> Step:
        step: Step | None = room.steps.get((tokens, asked))
        if step is None:
            if self.captures:
                step = CapturedStep(self._model, self._norms, tokens, asked, pool=self._pool)
            else:
                step = Step(self._model, self._norms, tokens, asked)
            room.steps[tokens, asked] = step
        return step


def _padded(tokens: int) -> int:
    """Return the smallest length of a step that takes so many tokens."""
    return next(one for one in LENGTHS if one >= tokens)
