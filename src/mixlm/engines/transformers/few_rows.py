"""Linear layers on a CPU, for the few tokens of a decode step, a catch-up, a verification or a batch.

`x Wᵀ` of 2 to 64 rows x should cost little more than of one: reading W is what takes the time. But some math libraries
rearrange all of W for it, in float32 on processors of some kinds: two rows then take twice as long as one. `W xᵀ` is
the same product, in which it is the few rows that are rearranged.
"""

from __future__ import annotations

from typing import Any

import torch

_MOST_ROWS = 64
_LEAST_WEIGHTS = 1 << 19  # with fewer, both take no time


class FewRowsLinear(torch.nn.Linear):
    """A linear layer that multiplies in the order that suits few rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x Wᵀ + b`: (…, inputs) to (…, outputs)."""
        rows = x.numel() // self.in_features
        if not 2 <= rows <= _MOST_ROWS:
            return super().forward(x)
        product = torch.mm(self.weight, x.reshape(rows, -1).T).T.contiguous()
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)


def speed_up_linear_layers(model: Any) -> None:
    """Let the large float32 layers of a model on a CPU multiply in the faster order."""
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
    19 and 22 in the usual order, 6, 9, 10 and 15 in this one; one row takes 6. It is no trial, since rounding differs:
    equal seeds shall give equal texts, however busy a machine was when it loaded the model.
    """
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return has_mkl and bool(torch.backends.cpu.get_cpu_capability() == "AVX2")
