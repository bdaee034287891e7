"""A model's RMS norms as one operation each (Zhang and Sennrich, 2019), in place of the eight that they are written as.

On a GPU a norm of one token is nothing but the time to start its kernels, and there are two in every layer. PyTorch has
one kernel for it (`rms_norm`); it rounds once where the layer's own code rounds twice, so the usual forward is left as
it is, and only steps, which are compared with it, are run with these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import rms_norm

_ROWS = 4  # that a layer is tried with
_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative, and of the largest value


class FusedNorms:
    """The norms of a model that one operation gives the same numbers as: found by trying, whatever they are called."""

    def __init__(self, model: Any) -> None:
        with torch.inference_mode():
            found = [(one, self._replaced(one)) for one in model.modules() if type(one).__name__.endswith("RMSNorm")]
        self._those = [(one, forward) for one, forward in found if forward is not None]

    def __len__(self) -> int:
        return len(self._those)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Run what is inside with them."""
        try:
            for one, forward in self._those:
                one.forward = forward
            yield
        finally:
            for one, _ in self._those:
                one.__dict__.pop("forward", None)

    def _replaced(self, norm: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Return what does for a norm, one of two kinds: its weight as it is, or 1 added to it; None for others."""
        weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if weight is None or weight.dim() != 1 or not isinstance(epsilon, float) or weight.dtype not in _CLOSE:
            return None
        x = torch.linspace(-2, 3, _ROWS * weight.numel(), device=weight.device).view(_ROWS, -1).to(weight.dtype)
        expected = norm(x)
        off = _CLOSE[weight.dtype]
        for kind in (partial(_plain, weight, epsilon), partial(_raised, 1 + weight.float(), epsilon)):
            if torch.allclose(kind(x), expected, rtol=off, atol=off * float(expected.abs().max())):
                return kind
        return None


def _plain(weight: torch.Tensor, epsilon: float, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight.shape, weight, epsilon)


def _raised(weight: torch.Tensor, epsilon: float, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x.float(), weight.shape, weight, epsilon).to(x.dtype)
