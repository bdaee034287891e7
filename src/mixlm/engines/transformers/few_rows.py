"""Linear layers on a CPU, for the few tokens of a decode step, a catch-up, a verification or a batch.

`x Wᵀ` of up to 64 rows x should cost little more than of one: reading W is what takes the time. But MKL multiplies one
row in a single thread, and on processors of some kinds it rearranges all of W for two. `W xᵀ` is the same product, in
which it is the few rows that are rearranged; and oneDNN has faster instructions for it than MKL uses there.
"""

from __future__ import annotations

from typing import Any

import torch

_MOST_ROWS = 64
_LEAST_WEIGHTS = 1 << 19  # with fewer, both take no time
_LEAST_WEIGHTS_ONEDNN = 1 << 22  # with fewer, calling it takes as long as it saves


class FewRowsLinear(torch.nn.Linear):
    """A linear layer that multiplies in the way that suits few rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x Wᵀ + b`: (…, inputs) to (…, outputs)."""
        rows = x.numel() // self.in_features
        if rows and self.weight.numel() >= _LEAST_WEIGHTS_ONEDNN and not torch.is_grad_enabled():
            multiply = torch.ops.mkldnn._linear_pointwise
            if rows > _MOST_ROWS:
                product: torch.Tensor = multiply(x.reshape(rows, -1), self.weight, self.bias, "none", [], "")
                return product.view(*x.shape[:-1], self.out_features)
            product = multiply(self.weight, x.reshape(rows, -1), None, "none", [], "").T.contiguous()
        elif 2 <= rows <= _MOST_ROWS:
            product = torch.mm(self.weight, x.reshape(rows, -1).T).T.contiguous()
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
    weight = getattr(module, "weight", None)
    # torchao replaces the weight, accelerate's hooks `forward`.
    if type(module) is not torch.nn.Linear or type(weight) is not torch.nn.Parameter or "forward" in vars(module):
        return False
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return is_plain and weight.numel() >= _LEAST_WEIGHTS


def transposed_is_faster() -> bool:
    """Whether few float32 rows are multiplied faster in this way: with MKL on processors without AVX-512.

    Measured with two threads on an AVX2 processor, milliseconds of 1, 2, 4, 8, 16 and 64 rows by 8960 x 1536 weights:
    6, 12, 23, 24, 24 and 36 by `linear`; 6, 6, 7, 12, 14 and 27 by `mm`; 4, 6, 6, 6, 6 and 18 by oneDNN. It is no
    trial, since rounding differs: equal seeds shall give equal texts, however busy a machine was when it loaded the
    model.
    """
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    return has_mkl and has_onednn and bool(torch.backends.cpu.get_cpu_capability() == "AVX2")
