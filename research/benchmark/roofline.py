"""What a step cannot do without: bytes read, arithmetic, kernels launched; and the time that takes at best.

One new token reads every weight once, whatever the number of tokens that share the forward, and the keys and values of
all tokens before it. See docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DeviceSpec:
    """Figures of one device, from its data sheet. launch: seconds to start a kernel. reduce: seconds of an all-reduce.

    bandwidth: bytes a second. compute: operations a second, a multiplication and an addition being two.
    """

    bandwidth: float
    compute: float
    launch: float = 0.0
    reduce: float = 0.0


H100 = DeviceSpec(3.35e12, 989e12, launch=4e-6, reduce=1e-5)
H200 = DeviceSpec(4.8e12, 989e12, launch=4e-6, reduce=1e-5)


@dataclass(frozen=True)
class ForwardNeeds:
    """What a forward of one model needs.

    weights, cache: numbers that are read, for each forward and for each token before it. attention: operations for each
    pair of tokens.
    """

    weights: int
    cache: int
    layers: int
    attention: int

    @classmethod
    def of(cls, shape: Mapping[str, Any]) -> ForwardNeeds:
        """Return what a shape of `SHAPES` needs. Of the input embeddings, only single rows are read."""
        hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
        heads, keys = shape["num_attention_heads"], shape["num_key_value_heads"]
        size = shape.get("head_dim") or hidden // heads
        biases = (heads + 2 * keys) * size if shape["model_type"] == "qwen2" else 0
        layer = 2 * hidden * heads * size + 2 * hidden * keys * size + 3 * hidden * inner + 2 * hidden + biases
        weights = layers * layer + hidden + shape["vocab_size"] * hidden
        return cls(weights, 2 * layers * keys * size, layers, 4 * layers * heads * size)

    def bytes(self, context: int = 0, *, width: int = 2, rows: int = 1) -> int:
        """Return the bytes that a forward reads. rows: sequences of `context` tokens. width: bytes of a number."""
        return width * (self.weights + rows * context * self.cache)

    def operations(self, tokens: int = 1, context: int = 0) -> int:
        """Return the operations of a forward of so many tokens, each of which looks at `context` others."""
        return tokens * (2 * self.weights + context * self.attention)

    def seconds(
        self, machine: DeviceSpec, context: int = 0, *, tokens: int = 1, devices: int = 1, launches: int = 0
    ) -> float:
        """Return the least time of a forward of one sequence in 16-bit numbers, its weights cut over `devices`.

        Reading, computing and launching kernels overlap, so the longest of them counts; with captured graphs there is
        one launch. With several devices each layer adds up its
        parts twice, after attention and after the rest.
        """
        read = self.bytes(context) / (machine.bandwidth * devices)
        computed = self.operations(tokens, context) / (machine.compute * devices)
        return max(read, computed, launches * machine.launch) + (
            2 * self.layers * machine.reduce if devices > 1 else 0.0
        )


def batch_share(completions: int, members: int, calls: int = 4000) -> float:
    """Return the share of completions that a call serves on average, the longest queue first, by playing it through.

    Every completion waits for a member sampled anew, all equally likely, after each token. For many completions it is
    2 / (members + 1).
    """
    import numpy as np

    rng = np.random.default_rng(0)
    queues = rng.multinomial(completions, np.full(members, 1 / members))
    total = 0
    for call in range(2 * calls):
        longest = int(np.argmax(queues))
        count = int(queues[longest])
        queues[longest] = 0
        queues += rng.multinomial(count, np.full(members, 1 / members))
        total += count if call >= calls else 0
    return total / calls / completions
