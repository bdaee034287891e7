"""A model's RMS norms (Zhang and Sennrich, 2019) as one kernel each, in place of the eight that they are written as.

On a GPU the norm of one token costs only the launches of its kernels, and there are two norms in every layer. PyTorch
has one kernel for it (`rms_norm`). It rounds once where the layer's own code rounds twice, so the plain forward pass is
left as it is; only passes in fixed shapes (`cuda_graphs`), which are tested against it, use the fused norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import rms_norm

_TEST_ROWS = 4
# Largest difference from the layer's own result, relative and as a fraction of its largest value.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}

Norm = Callable[[torch.Tensor], torch.Tensor]


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
    if weight is None or weight.dim() != 1 or not isinstance(epsilon, float) or weight.dtype not in _TOLERANCE:
        return None
    x = torch.linspace(-2, 3, _TEST_ROWS * weight.numel(), device=weight.device).view(_TEST_ROWS, -1).to(weight.dtype)
    expected = norm(x)
    tolerance = _TOLERANCE[weight.dtype]
    shifted = 1 + weight.float()
    candidates: tuple[Norm, Norm] = (
        lambda x: rms_norm(x, weight.shape, weight, epsilon),
        lambda x: rms_norm(x.float(), weight.shape, shifted, epsilon).to(x.dtype),
    )
    for forward in candidates:
        if torch.allclose(forward(x), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            return forward
    return None
