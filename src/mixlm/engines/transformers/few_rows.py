"""Linear layers on a CPU, for the few tokens of a decode step, a catch-up, a verification or a batch.

`x Wᵀ` of 2 to 64 rows x should cost little more than of one: reading W is what takes the time. But some math libraries
rearrange all of W for it, in float32 on processors of some kinds: two rows then take twice as long as one. `W xᵀ` is
the same product, in which it is the few rows that are rearranged. And they multiply one row in a single thread: W as a
batch of matrices is divided among the threads, with the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

_MOST_ROWS = 64
_LEAST_WEIGHTS = 1 << 19  # with fewer, both take no time
_LEAST_WEIGHTS_ONE_ROW = 1 << 22  # with fewer, waking the other threads takes as long
_MATRICES = 16  # in the batch for one row; a divisor of it where the outputs are no multiple


class FewRowsLinear(torch.nn.Linear):
    """A linear layer that multiplies in the way that suits few rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x Wᵀ + b`: (…, inputs) to (…, outputs)."""
        rows = x.numel() // self.in_features
        if 2 <= rows <= _MOST_ROWS:
            product = torch.mm(self.weight, x.reshape(rows, -1).T).T.contiguous()
        elif rows == 1 and self.weight.numel() >= _LEAST_WEIGHTS_ONE_ROW:
            matrices = self.weight.view(math.gcd(self.out_features, _MATRICES), -1, self.in_features)
            product = torch.bmm(x.reshape(1, 1, -1).expand(len(matrices), -1, -1), matrices.mT).view(1, -1)
        else:
            return super().forward(x)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)


def speed_up_linear_layers(model: Any) -> None:
    """Let the large float32 layers of a model on a CPU multiply in the faster way."""
    layers = [module for module in model.modules() if _is_plain(module)]
    if layers and transposed_is_faster():
        for layer in layers:
            layer.__class__ = FewRowsLinear  # not another module: adapters and tied weights refer to this one


def _is_plain(module: Any) -> bool:
    if type(module) is not torch.nn.Linear or "forward" in vars(module):  # accelerate's hooks replace it
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _LEAST_WEIGHTS


def transposed_is_faster() -> bool:
    """Whether few float32 rows are multiplied faster in the other order: with MKL on processors without AVX-512.

    Measured with two threads on an AVX2 processor, milliseconds of 2, 4, 8 and 16 rows by 8960 x 1536 weights: 12, 18,
    19 and 22 in the usual order, 6, 9, 10 and 15 in this one. One row takes 6; as a batch of matrices, two
    threads work for 0.56 of the time each that one does otherwise. It is no trial, since rounding differs: equal seeds
    shall give equal texts, however busy a machine was when it loaded the model.
    """
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return has_mkl and bool(torch.backends.cpu.get_cpu_capability() == "AVX2")
