"""What a gate and a forward cost, for `router_study`: microseconds at one position, outside of any model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from mixlm.engines import Engine
from mixlm.fitting.gate_trainer import WIDTH, GateKind
from mixlm.routing import PromptContext
from mixlm.routing.base import TOP_K
from mixlm.routing.gate import Gate
from mixlm.routing.gate_router import GateInputs, GateRouter
from mixlm.routing.observation import observation
from mixlm.types import Ids

_CACHED = 128  # tokens in the KV cache when a forward is timed
_FORWARDS = 9
_CALLS = 200


def forward_seconds(engine: Engine) -> float:
    """Return the median time of a forward of one token after a cached prefix."""
    token = next(i for i, data in enumerate(engine.vocabulary.tokens) if data)
    cached = min(_CACHED, engine.context_length - _FORWARDS - 2)
    ids, session = np.full(cached + _FORWARDS + 1, token, dtype=np.int64), engine.session()
    session.logits(ids[: cached + 1])
    return _median(lambda number: session.logits(ids[: cached + 2 + number]), _FORWARDS)


def gate_seconds(names: Sequence[str], groups: Sequence[str], kind: GateKind, vocabulary: int, hidden: int) -> float:
    """Return the median time from the observed member's logits, float32 (vocabulary,), to the weights.

    The gate's numbers are random: its time does not depend on them. hidden: numbers in the hidden state.
    """
    rng = np.random.default_rng(0)
    observed = any(group != "text" for group in groups)
    inputs = GateInputs(
        tuple(groups),
        names[0] if observed else None,
        TOP_K if "top_k" in groups else 0,
        hidden if "hidden" in groups else 0,
    )
    members = len(names)
    shapes = Gate.shapes(members, inputs.size, WIDTH if kind == "mlp" else 0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    router = GateRouter(Gate(**{**arrays, "scale": np.ones_like(arrays["scale"])}), names, inputs)
    route = router.begin(PromptContext(b"the river sings, " * 100, lambda: np.zeros(members)))
    row, state = rng.normal(size=vocabulary).astype(np.float32), rng.normal(size=hidden).astype(np.float16)
    text = _Text(b"and one bird falls under two. " * 300)

    def call(_: int) -> object:
        if router.observes is None:
            return route(text)  # type: ignore[call-arg]
        return route(text, observation(row, router.observes, state if router.observes.hidden else None))  # type: ignore[call-arg]

    return _median(call, _CALLS)


class _Text:
    """A text as a router's state."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def tail(self, length: int) -> bytes:
        return self._data[-length:]

    def ids(self, member: int) -> Ids:
        raise NotImplementedError

    def prompt_length(self, member: int) -> int:
        raise NotImplementedError


def _median(function: Callable[[int], object], count: int) -> float:
    seconds = []
    for number in range(count):
        start = time.perf_counter()
        function(number)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
