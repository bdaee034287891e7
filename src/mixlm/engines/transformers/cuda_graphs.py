"""Forward passes of one sequence in a few fixed shapes, which a GPU can start with one call: CUDA graphs.

In eager PyTorch, launching its kernels, over a thousand of them, bounds a short forward pass. Where neither shapes nor
addresses change, and nothing is decided on the host, they can be captured into a CUDA graph once and then started with
one call. So a pass has 1, 2, 4, … tokens, padded at the end. Its only inputs are the ids, the length of the sequence
before them and the positions whose logits are needed, all of them numbers on the device. Keys and values lie in a
`KVBuffer` of fixed size, and attention covers all of it, through a mask made from the length. Padding follows the
end of the sequence, so no token attends to it, and later tokens overwrite it.

The RMS norm (Zhang and Sennrich, 2019) of one token costs only the launches of its eight kernels, and there are two
norms in every layer. PyTorch has one kernel for it (`rms_norm`). It rounds once where a layer's own code rounds twice,
so it is used in these passes alone, which are tested against the plain one.

Without CUDA the same pass runs eagerly: slower than the plain one, but with equal results, so a test can compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch.nn.functional import rms_norm

from mixlm.engines.transformers.attention import AttentionForm, QueryKeyValue, causal_mask
from mixlm.engines.transformers.kv_cache import KVBuffer, KVBufferPool, KVCache
from mixlm.types import Ids

PADDED_LENGTHS = (1, 2, 4, 8, 16, 32)  # tokens of a pass; a longer one is run plainly
_MAX_IDLE = 2  # buffers of each size that are kept for other sequences, with what is captured on them
_MAX_CAPTURED = 4  # sequences at once with captured passes: each takes a fraction of a second a shape to capture
_NORM_ROWS = 4
# Largest difference from the layer's own result, relative and as a fraction of its largest value.
_NORM_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}

Norm = Callable[[torch.Tensor], torch.Tensor]


class FixedShapeSequence:
    """The sequence of a pass: its buffer, and the positions of its tokens, int64 (tokens,) on the device."""

    def __init__(self, buffer: KVBuffer, positions: torch.Tensor) -> None:
        self._buffer = buffer
        self._positions = positions
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(self, layer: int, qkv: QueryKeyValue, form: AttentionForm) -> torch.Tensor:
        """Write keys and values and attend to the whole buffer: see `attention.attend`."""
        query, key, value = qkv
        keys, values = self._buffer.layer(layer, key[0], value[0])
        keys.index_copy_(1, self._positions, key[0])
        values.index_copy_(1, self._positions, value[0])
        heads, count = key.shape[1], query.shape[2]
        groups = query.shape[1] // heads
        if form.window not in self._masks:
            # As numbers: attention would make them of a boolean mask in every layer.
            mask = causal_mask(self._positions, self._buffer.size, form.window).repeat(groups, 1)
            self._masks[form.window] = query.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        grouped = query.reshape(1, heads, groups * count, -1)
        attended = form.attend(grouped, keys[None], values[None], self._masks[form.window])
        return attended.view(1, heads * groups, count, -1).transpose(1, 2)


class FixedShapeForward:
    """A forward pass of `tokens` tokens that returns the logits of `outputs` of them."""

    def __init__(self, model: Any, norms: FusedNorms, tokens: int, outputs: int) -> None:
        self._model, self._norms = model, norms
        self.tokens, self.outputs = tokens, outputs
        device = model.device
        # One array, so that one transfer fills all: ids, the length before, the positions of the outputs.
        self._host = torch.zeros(tokens + 1 + outputs, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._numbers = self._host.numpy()
        self._inputs = self._host.to(device)
        self._offsets = torch.arange(tokens, device=device)

    def set_inputs(self, ids: Ids, length: int, last: int) -> None:
        """Set the inputs of the next run: up to `tokens` ids after `length` others, outputs for the `last` ones."""
        count, numbers = len(ids), self._numbers
        numbers[:count] = ids
        numbers[count : self.tokens] = 0
        numbers[self.tokens] = length
        outputs = numbers[self.tokens + 1 :]
        outputs[:] = count - 1
        outputs[:last] = range(count - last, count)
        self._inputs.copy_(self._host, non_blocking=True)

    def set_token(self, token: torch.Tensor, length: int) -> None:
        """Set the input of the next run to one token that only the device knows, int64 (1,), after `length` others.

        Nothing of it lies on the host, so any number of such runs may be queued. Only for passes of one token.
        """
        self._inputs[:1].copy_(token)
        self._inputs[1:2].fill_(length)

    def run(self, buffer: KVBuffer) -> torch.Tensor:
        """Return the logits: (outputs, vocab). Nothing in here waits for the device or depends on its results."""
        ids, numbers = self._inputs[: self.tokens], self._inputs[self.tokens :]
        start, outputs = numbers[:1], numbers[1:]
        # Padding gets the last token's position, since a model may have no further one.
        positions = start + torch.minimum(self._offsets, outputs[-1])
        with self._norms.applied():
            result = self._model(
                input_ids=ids[None],
                position_ids=positions[None],
                logits_to_keep=outputs,
                use_cache=False,
                attention_batch=FixedShapeSequence(buffer, start + self._offsets),
            )
        logits: torch.Tensor = result.logits[0]
        return logits


class CapturedForward(FixedShapeForward):
    """A pass as a CUDA graph: run eagerly the first time, captured the second, replayed from then on.

    It always runs on the same buffer. pool: memory that the graphs of one model share, since no two run at once.
    """

    def __init__(self, model: Any, norms: FusedNorms, tokens: int, outputs: int, *, pool: Any) -> None:
        super().__init__(model, norms, tokens, outputs)
        self._pool = pool
        self._graph: Any = None
        self._logits: torch.Tensor | None = None

    def run(self, buffer: KVBuffer) -> torch.Tensor:
        """Return the logits, (outputs, vocab), valid until the next run."""
        run, device = partial(super().run, buffer), self._model.device
        if self._logits is None:
            self._logits = warm_up(run, device)
        else:
            if self._graph is None:
                self._graph, self._logits = capture(run, device, self._pool)
            self._graph.replay()
        return self._logits


def warm_up(run: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """Run what is to be captured once: what libraries set up on first use must not be captured.

    PyTorch requires a stream of its own for this.
    """
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        logits = run()
    current.wait_stream(stream)
    return logits


def capture(run: Callable[[], torch.Tensor], device: torch.device, pool: Any) -> tuple[Any, torch.Tensor]:
    """Return a graph of all that `run` starts on a device, and the tensor it fills. Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream(device)
    mode = "thread_local"  # another thread may use another device or model
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            logits = run()
    finally:
        torch.cuda.set_stream(current)  # a failed capture does not restore it
    return graph, logits


class CudaGraphRunner:
    """All fixed-shape passes of one model. captures: into CUDA graphs. pool: the KV buffers of its sequences.

    A captured pass belongs to a buffer, and buffers go from one sequence to the next. Few buffers at a time have such
    passes, since capturing takes time: a sequence beyond those is run plainly.
    """

    def __init__(self, model: Any, *, capture: bool) -> None:
        self.pool = KVBufferPool(_MAX_IDLE if capture else 0)
        self.captures = capture
        self.buffers: WeakSet[KVBuffer] = WeakSet()  # with captured passes
        self._model = model
        self._norms = FusedNorms(model)
        self._graph_pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def fits(self, cache: KVCache, tokens: int) -> bool:
        """Whether there is a pass for so many further tokens of a sequence."""
        if tokens > PADDED_LENGTHS[-1]:
            return False
        buffer = cache.reserve(cache.length + _padded(tokens))
        if self.captures and buffer not in self.buffers:
            if sum(not other.idle for other in self.buffers) >= _MAX_CAPTURED:
                return False
            self.buffers.add(buffer)
        return True

    def run(self, cache: KVCache, ids: Ids, last: int) -> torch.Tensor:
        """Run ids, int64 (n,), that fit. Return the last positions' logits, (last, vocab), valid until the next run."""
        tokens = _padded(len(ids))
        buffer = cache.reserve(cache.length + tokens)
        forward = self._forward(buffer, tokens, 1 if last == 1 else tokens)
        forward.set_inputs(ids, cache.length, last)
        logits = forward.run(buffer)[:last]
        cache.length += len(ids)
        return logits

    def run_token(self, buffer: KVBuffer, token: torch.Tensor, length: int) -> torch.Tensor:
        """Run one token, int64 (1,) on the device, after `length` others. Returns its logits, (1, vocab).

        The token must fit, and counts once a KV cache's length includes it. The logits are valid until the next run.
        """
        forward = self._forward(buffer, 1, 1)
        forward.set_token(token, length)
        return forward.run(buffer)

    def _forward(self, buffer: KVBuffer, tokens: int, outputs: int) -> FixedShapeForward:
        if (tokens, outputs) not in buffer.graphs:
            new = partial(CapturedForward, pool=self._graph_pool) if self.captures else FixedShapeForward
            buffer.graphs[tokens, outputs] = new(self._model, self._norms, tokens, outputs)
        forward: FixedShapeForward = buffer.graphs[tokens, outputs]
        return forward


def _padded(tokens: int) -> int:
    """Return the smallest length of a pass that holds so many tokens."""
    return next(length for length in PADDED_LENGTHS if length >= tokens)


class FusedNorms:
    """The norms of a model that one kernel gives the same numbers as: found by a test, whatever their class."""

    def __init__(self, model: Any) -> None:
        with torch.inference_mode():
            norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
            fused = [(norm, _fused(norm)) for norm in norms]
        self._norms = [(norm, forward) for norm, forward in fused if forward is not None]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use them in the forward passes in this context."""
        try:
            for norm, forward in self._norms:
                norm.forward = forward
            yield
        finally:
            for norm, _ in self._norms:
                norm.__dict__.pop("forward", None)


def _fused(norm: Any) -> Norm | None:
    """Return a fused norm with the layer's weight, or with 1 added to it; None where neither gives its numbers."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(epsilon, float) or weight.dtype not in _NORM_TOLERANCE:
        return None
    x = torch.linspace(-2, 3, _NORM_ROWS * weight.numel(), device=weight.device).view(_NORM_ROWS, -1).to(weight.dtype)
    expected = norm(x)
    tolerance = _NORM_TOLERANCE[weight.dtype]
    shifted = 1 + weight.float()
    candidates: tuple[Norm, Norm] = (
        lambda x: rms_norm(x, weight.shape, weight, epsilon),
        lambda x: rms_norm(x.float(), weight.shape, shifted, epsilon).to(x.dtype),
    )
    for forward in candidates:
        if torch.allclose(forward(x), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            return forward
    return None
